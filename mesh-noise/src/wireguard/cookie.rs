//! The two MACs that end a handshake message, and cookies (whitepaper §5.3, §5.4.4, §5.4.7).
//!
//! `mac1` shows that the sender knows the receiver's public key, and costs the receiver nearly nothing: what lacks it
//! is not answered, so that a scanner sees silence. Under load a responder wants `mac2` as well, made with a cookie
//! that it has sent to the sender's address: this binds a handshake to an address, and per address there is a limit.
//!
//! A cookie is `MAC(secret, address ‖ port)`. The secret changes every two minutes, and no state is kept per cookie.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::AeadInPlace;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::Reject;
use super::message::{CookieReply, MAC_LEN};
use crate::key::NodePublic;
use crate::random::SeededRng;

/// How long a secret is used, and how long a cookie may be worth something.
const SECRET_LIFETIME: Duration = Duration::from_secs(120);
/// A cookie is not used in its last seconds: it might arrive after the secret changed.
const COOKIE_LIFETIME: Duration = Duration::from_secs(115);
/// Once under load, this much longer.
const LOAD_MEMORY: Duration = Duration::from_secs(1);
/// Under load, handshake messages per second and address …
const PER_SOURCE_RATE: u32 = 20;
/// … and how many may come at once.
const PER_SOURCE_BURST: u32 = 5;
/// Addresses remembered at a time. Beyond that, new ones are refused while we are under load.
const MAX_SOURCES: usize = 4096;

const MAC1: &[u8; 8] = b"mac1----";
const COOKIE: &[u8; 8] = b"cookie--";

type Mac = [u8; MAC_LEN];

fn mac(key: &[u8], parts: &[&[u8]]) -> Mac {
    let mut mac = Blake2sMac::<U16>::new_from_slice(key).expect("a key of at most 32 bytes");
    for part in parts {
        mac.update(part);
    }
    mac.finalize_fixed().into()
}

fn labelled(label: &[u8; 8], public: &NodePublic) -> [u8; 32] {
    Blake2s256::new().chain_update(label).chain_update(public.as_bytes()).finalize().into()
}

/// What is hashed for mac1, and what for mac2.
fn signed(message: &[u8]) -> (&[u8], &[u8]) {
    (&message[..message.len() - 2 * MAC_LEN], &message[..message.len() - MAC_LEN])
}

fn macs(message: &[u8]) -> (Mac, Mac) {
    let (rest, mac2) = message.split_last_chunk().expect("handshake messages end with two MACs");
    (*rest.last_chunk().expect("handshake messages end with two MACs"), *mac2)
}

/// Puts the MACs on messages to one peer, and remembers its cookie. The two keys are one hash of the peer's public key
/// each, so they are made when needed: ten thousand peers at rest should not keep them.
#[derive(Default)]
pub(crate) struct Stamper {
    last_mac1: Option<Mac>,
    cookie: Option<(Instant, Mac)>,
}

// By hand, since a cookie is worth a handshake to whoever reads it, and the secret makes every cookie.
impl fmt::Debug for Stamper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stamper").field("has_cookie", &self.cookie.is_some()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checker")
            .field("limit", &self.limit)
            .field("under_load_until", &self.under_load_until)
            .field("sources", &self.sources.len())
            .finish_non_exhaustive()
    }
}

impl Stamper {
    /// Fills both MACs of a handshake message to `peer`.
    pub(crate) fn stamp(&mut self, now: Instant, peer: &NodePublic, message: &mut [u8]) {
        let len = message.len();
        let mac1 = mac(&labelled(MAC1, peer), &[signed(message).0]);
        message[len - 2 * MAC_LEN..len - MAC_LEN].copy_from_slice(&mac1);
        self.last_mac1 = Some(mac1);
        if let Some((received, cookie)) = self.cookie {
            if now.saturating_duration_since(received) < COOKIE_LIFETIME {
                let mac2 = mac(&cookie, &[signed(message).1]);
                message[len - MAC_LEN..].copy_from_slice(&mac2);
            } else {
                self.cookie = None;
            }
        }
    }

    /// Takes the peer's cookie, which is bound to the mac1 of our last message. One reply per message.
    pub(crate) fn take_reply(&mut self, now: Instant, peer: &NodePublic, reply: &CookieReply) -> Result<(), Reject> {
        let mac1 = self.last_mac1.ok_or(Reject::Authentication)?;
        let (mut cookie, tag) = (Mac::default(), &reply.sealed[MAC_LEN..]);
        cookie.copy_from_slice(&reply.sealed[..MAC_LEN]);
        XChaCha20Poly1305::new(&labelled(COOKIE, peer).into())
            .decrypt_in_place_detached(&reply.nonce.into(), &mac1, &mut cookie, tag.into())
            .map_err(|_| Reject::Authentication)?;
        self.last_mac1 = None;
        self.cookie = Some((now, cookie));
        Ok(())
    }
}

/// A token bucket: `rate` per second, at most `burst` at once.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: Duration,
    at: Instant,
}

impl Bucket {
    /// Tokens are kept as time: one token is worth the time in which it grows.
    fn full(now: Instant, rate: u32, burst: u32) -> Self {
        Self { tokens: Self::price(rate) * burst, at: now }
    }

    fn price(rate: u32) -> Duration {
        Duration::from_secs(1) / rate.max(1)
    }

    fn take(&mut self, now: Instant, rate: u32, burst: u32) -> bool {
        let price = Self::price(rate);
        let grown = self.tokens + now.saturating_duration_since(self.at);
        self.at = now;
        self.tokens = grown.min(price * burst);
        match self.tokens.checked_sub(price) {
            Some(rest) => {
                self.tokens = rest;
                true
            }
            None => false,
        }
    }
}

/// Checks the MACs of messages to us, and hands out cookies under load.
pub(crate) struct Checker {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    secret: Option<(Instant, Zeroizing<[u8; 32]>)>,
    /// Handshake messages per second beyond which we are under load.
    limit: u32,
    recent: Option<Bucket>,
    under_load_until: Option<Instant>,
    sources: BTreeMap<Option<IpAddr>, Bucket>,
}

impl Checker {
    pub(crate) fn new(us: &NodePublic, limit: u32) -> Self {
        Self {
            mac1_key: labelled(MAC1, us),
            cookie_key: labelled(COOKIE, us),
            secret: None,
            limit,
            recent: None,
            under_load_until: None,
            sources: BTreeMap::new(),
        }
    }

    /// Decides whether an initiation or a response is worth the curve's time.
    ///
    /// `source` is none for a relayed message: the relay knows its sender, so no cookie is asked for, but all of them
    /// share one limit. [`Reject::CookieRequired`] asks the caller to send [`reply`](Self::reply).
    pub(crate) fn check(
        &mut self,
        now: Instant,
        source: Option<SocketAddr>,
        message: &[u8],
        rng: &mut SeededRng,
    ) -> Result<(), Reject> {
        let (mac1, mac2) = macs(message);
        if !bool::from(mac(&self.mac1_key, &[signed(message).0]).ct_eq(&mac1)) {
            return Err(Reject::Mac1);
        }
        if !self.is_under_load(now) {
            return Ok(());
        }
        if let Some(source) = source {
            let cookie = self.cookie(now, source, rng);
            if !bool::from(mac(&cookie, &[signed(message).1]).ct_eq(&mac2)) {
                return Err(Reject::CookieRequired);
            }
        }
        if self.admits(now, source) { Ok(()) } else { Err(Reject::RateLimited) }
    }

    /// The cookie reply to a message that [`check`](Self::check) turned away.
    pub(crate) fn reply(
        &mut self,
        now: Instant,
        source: SocketAddr,
        message: &[u8],
        receiver: u32,
        rng: &mut SeededRng,
    ) -> CookieReply {
        let (mut cookie, nonce) = (self.cookie(now, source, rng), rng.array());
        let tag = XChaCha20Poly1305::new(&self.cookie_key.into())
            .encrypt_in_place_detached(&nonce.into(), &macs(message).0, &mut cookie)
            .expect("a cookie is short");
        let mut sealed = [0; 32];
        sealed[..MAC_LEN].copy_from_slice(&cookie);
        sealed[MAC_LEN..].copy_from_slice(&tag);
        CookieReply { receiver, nonce, sealed }
    }

    fn is_under_load(&mut self, now: Instant) -> bool {
        let limit = self.limit;
        let bucket = self.recent.get_or_insert_with(|| Bucket::full(now, limit, limit));
        if !bucket.take(now, limit, limit) {
            self.under_load_until = Some(now + LOAD_MEMORY);
        }
        let under_load = self.under_load_until.is_some_and(|until| now < until);
        if !under_load {
            self.sources.clear();
        }
        under_load
    }

    fn cookie(&mut self, now: Instant, source: SocketAddr, rng: &mut SeededRng) -> Mac {
        let fresh = self.secret.take().filter(|(made, _)| now.saturating_duration_since(*made) < SECRET_LIFETIME);
        let (_, secret) = self.secret.insert(fresh.unwrap_or_else(|| (now, Zeroizing::new(rng.array()))));
        let port = source.port().to_be_bytes();
        match source.ip() {
            IpAddr::V4(ip) => mac(&secret[..], &[&ip.octets(), &port]),
            IpAddr::V6(ip) => mac(&secret[..], &[&ip.octets(), &port]),
        }
    }

    fn admits(&mut self, now: Instant, source: Option<SocketAddr>) -> bool {
        let key = source.map(|source| match source.ip() {
            IpAddr::V4(ip) => IpAddr::V4(ip),
            // Whoever has one address of a /64 has all of them.
            IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & !u128::from(u64::MAX)).into()),
        });
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&key) {
            let idle = Bucket::price(PER_SOURCE_RATE) * PER_SOURCE_BURST;
            self.sources.retain(|_, bucket| now.saturating_duration_since(bucket.at) < idle);
            if self.sources.len() >= MAX_SOURCES {
                return false;
            }
        }
        self.sources.entry(key).or_insert_with(|| Bucket::full(now, PER_SOURCE_RATE, PER_SOURCE_BURST)).take(
            now,
            PER_SOURCE_RATE,
            PER_SOURCE_BURST,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wireguard::interface::tests::start;
    use crate::wireguard::message::INITIATION_LEN;

    const US: NodePublic = NodePublic::from_bytes([5; 32]);

    fn source(last: u8) -> Option<SocketAddr> {
        Some(SocketAddr::from(([192, 0, 2, last], 51820)))
    }

    fn stamped(stamper: &mut Stamper, peer: &NodePublic, now: Instant) -> [u8; INITIATION_LEN] {
        let mut message = [1; INITIATION_LEN];
        message[116..].fill(0);
        stamper.stamp(now, peer, &mut message);
        message
    }

    #[test]
    fn mac1_shows_who_was_meant() {
        let (now, mut rng) = (start(), SeededRng::from_seed([1; 32]));
        let mut checker = Checker::new(&US, 100);
        let message = stamped(&mut Stamper::default(), &US, now);
        assert_eq!(checker.check(now, source(1), &message, &mut rng), Ok(()));
        let message = stamped(&mut Stamper::default(), &NodePublic::from_bytes([6; 32]), now);
        assert_eq!(checker.check(now, source(1), &message, &mut rng), Err(Reject::Mac1));
    }

    #[test]
    fn under_load_a_cookie_opens_the_door_for_its_address_only() {
        let (now, mut rng) = (start(), SeededRng::from_seed([2; 32]));
        let (mut checker, mut stamper) = (Checker::new(&US, 1), Stamper::default());
        let message = stamped(&mut stamper, &US, now);
        assert_eq!(checker.check(now, source(1), &message, &mut rng), Ok(()));
        assert_eq!(checker.check(now, source(1), &message, &mut rng), Err(Reject::CookieRequired));
        let reply = checker.reply(now, source(1).unwrap(), &message, 77, &mut rng);
        assert_eq!(reply.receiver, 77);
        let mut forged = reply;
        forged.sealed[3] ^= 1;
        assert_eq!(stamper.take_reply(now, &US, &forged), Err(Reject::Authentication));
        assert_eq!(stamper.take_reply(now, &US, &reply), Ok(()));
        assert_eq!(stamper.take_reply(now, &US, &reply), Err(Reject::Authentication), "one reply a message");
        let message = stamped(&mut stamper, &US, now);
        assert_eq!(checker.check(now, source(1), &message, &mut rng), Ok(()));
        assert_eq!(checker.check(now, source(2), &message, &mut rng), Err(Reject::CookieRequired));
        let later = now + COOKIE_LIFETIME;
        assert_eq!(macs(&stamped(&mut stamper, &US, later)).1, Mac::default(), "an old cookie is not used");
    }

    #[test]
    fn under_load_each_address_has_its_share_and_the_table_is_bounded() {
        let (now, mut rng) = (start(), SeededRng::from_seed([3; 32]));
        let mut checker = Checker::new(&US, 1);
        let message = stamped(&mut Stamper::default(), &US, now);
        let outcomes: Vec<_> = (0..8).map(|_| checker.check(now, None, &message, &mut rng)).collect();
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1 + 5, "{outcomes:?}");
        assert_eq!(outcomes[7], Err(Reject::RateLimited));
        for n in 0..2 * u32::try_from(MAX_SOURCES).unwrap() {
            checker.admits(now, Some(SocketAddr::from((std::net::Ipv4Addr::from(n), 1))));
        }
        assert_eq!(checker.sources.len(), MAX_SOURCES);
        let quiet = now + Duration::from_secs(5);
        assert_eq!(checker.check(quiet, None, &message, &mut rng), Ok(()));
        assert!(checker.sources.is_empty());
    }
}
