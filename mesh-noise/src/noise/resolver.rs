//! Curve, cipher and randomness for `snow`, on aws-lc.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey, X25519};
use snow::Error;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::aead::{Aead, Order, TAG_LEN};

const LEN: usize = 32;

/// A static key with everything that can be computed once: parsed private half, public half, and what it agrees on
/// with the static keys of peers.
pub(crate) struct StaticKey {
    bytes: Zeroizing<[u8; LEN]>,
    private: PrivateKey,
    public: [u8; LEN],
    agreements: Mutex<Agreements>,
}

/// One of the four agreements of a handshake is between the two static keys, and the same every time.
#[derive(Default)]
struct Agreements {
    /// The last one computed, whoever it was with.
    last: Option<([u8; LEN], Zeroizing<[u8; LEN]>)>,
    /// Those with peers that have shown who they are. Strangers get no place here, so it cannot be filled by them.
    kept: BTreeMap<[u8; LEN], Zeroizing<[u8; LEN]>>,
}

impl StaticKey {
    pub(crate) fn new(bytes: &[u8; LEN]) -> Self {
        let private = PrivateKey::from_private_key(&X25519, bytes).expect("any 32 bytes are an X25519 private key");
        let mut public = [0; LEN];
        public.copy_from_slice(private.compute_public_key().expect("a private key has a public key").as_ref());
        Self { bytes: Zeroizing::new(*bytes), private, public, agreements: Mutex::default() }
    }

    /// The agreement with `remote`.
    fn agree(&self, remote: &[u8; LEN], out: &mut [u8; LEN]) -> Result<(), Error> {
        if let Some(kept) = self.agreements().kept.get(remote) {
            *out = **kept;
            return Ok(());
        }
        // aws-lc reports an all-zero result, which is what every low-order point leads to, as a failure.
        agreement::agree(&self.private, UnparsedPublicKey::new(&X25519, remote), Error::Dh, |shared| {
            out.copy_from_slice(shared);
            Ok(())
        })?;
        self.agreements().last = Some((*remote, Zeroizing::new(*out)));
        Ok(())
    }

    /// Keeps the agreement with `peer` for its next handshakes, if that was the last one computed.
    pub(crate) fn keep_agreement(&self, peer: &[u8; LEN]) {
        let mut agreements = self.agreements();
        if let Some((_, shared)) = agreements.last.take_if(|(remote, _)| remote == peer) {
            agreements.kept.insert(*peer, shared);
        }
    }

    /// Wipes what [`keep_agreement`](Self::keep_agreement) keeps for `peer`.
    pub(crate) fn forget_agreement(&self, peer: &[u8; LEN]) {
        let mut agreements = self.agreements();
        agreements.last = None;
        agreements.kept.remove(peer);
    }

    /// Whole values are put in and taken out, so a poisoned table is sound.
    fn agreements(&self) -> MutexGuard<'_, Agreements> {
        self.agreements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bytes(&self) -> &[u8; LEN] {
        &self.bytes
    }

    pub(crate) fn public(&self) -> &[u8; LEN] {
        &self.public
    }
}

/// Serves one handshake: one static key, one ephemeral.
pub(crate) struct Resolver {
    pub(crate) statik: Arc<StaticKey>,
    pub(crate) ephemeral: Zeroizing<[u8; LEN]>,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(OneDraw(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        match choice {
            DHChoice::Curve25519 => Some(Box::new(X25519Dh { known: Arc::clone(&self.statik), key: None })),
            _ => None,
        }
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        match choice {
            CipherChoice::ChaChaPoly => Some(Box::new(ChaChaPoly(Aead::new(&[0; LEN])))),
            _ => None,
        }
    }
}

/// Gives its 32 bytes once. A handshake of ours generates one key; a second request would be a bug.
struct OneDraw(Option<Zeroizing<[u8; LEN]>>);

impl Random for OneDraw {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        let bytes = self.0.take().ok_or(Error::Rng)?;
        if dest.len() != LEN {
            return Err(Error::Rng);
        }
        dest.copy_from_slice(&*bytes);
        Ok(())
    }
}

struct X25519Dh {
    /// Saves a scalar multiplication when `snow` sets the static key, which it does in every handshake.
    known: Arc<StaticKey>,
    key: Option<Arc<StaticKey>>,
}

impl Dh for X25519Dh {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        LEN
    }

    fn priv_len(&self) -> usize {
        LEN
    }

    fn set(&mut self, privkey: &[u8]) {
        if bool::from(self.known.bytes[..].ct_eq(privkey)) {
            self.key = Some(Arc::clone(&self.known));
        } else if let Ok(bytes) = <&[u8; LEN]>::try_from(privkey) {
            self.key = Some(Arc::new(StaticKey::new(bytes)));
        }
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut bytes = Zeroizing::new([0; LEN]);
        rng.try_fill_bytes(&mut *bytes)?;
        self.key = Some(Arc::new(StaticKey::new(&bytes)));
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        self.key.as_ref().map_or(&[0; LEN], |key| &key.public[..])
    }

    fn privkey(&self) -> &[u8] {
        self.key.as_ref().map_or(&[0; LEN], |key| &key.bytes[..])
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let key = self.key.as_ref().ok_or(Error::Dh)?;
        let remote = pubkey.first_chunk().ok_or(Error::Dh)?;
        key.agree(remote, out.first_chunk_mut().ok_or(Error::Dh)?)
    }
}

struct ChaChaPoly(Aead);

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; LEN]) {
        self.0 = Aead::new(key);
    }

    fn encrypt(&self, nonce: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let (text, tag) = out.split_at_mut(plaintext.len());
        text.copy_from_slice(plaintext);
        tag[..TAG_LEN].copy_from_slice(&self.0.seal(nonce, Order::Little, authtext, text));
        plaintext.len() + TAG_LEN
    }

    fn decrypt(&self, nonce: u64, authtext: &[u8], ciphertext: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let len = ciphertext.len().checked_sub(TAG_LEN).ok_or(Error::Decrypt)?;
        let out = out.get_mut(..len).ok_or(Error::Decrypt)?;
        self.0.open_into(nonce, Order::Little, authtext, ciphertext, out).map_err(|_| Error::Decrypt)?;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use snow::{Builder, HandshakeState};

    fn bytes(value: &Value) -> Vec<u8> {
        hex::decode(value.as_str().unwrap()).unwrap()
    }

    fn key(value: &Value) -> [u8; LEN] {
        bytes(value).try_into().unwrap()
    }

    fn side(vector: &Value, side: &str) -> HandshakeState {
        let of = |name: &str| &vector[format!("{side}_{name}")];
        let statik = Arc::new(StaticKey::new(&key(of("static"))));
        let resolver = Resolver { statik: Arc::clone(&statik), ephemeral: Zeroizing::new(key(of("ephemeral"))) };
        let (name, prologue) = (vector["protocol_name"].as_str().unwrap(), bytes(of("prologue")));
        let remote = of("remote_static").as_str().map(|_| key(of("remote_static")));
        let psk = of("psks").as_array().map(|psks| key(&psks[0]));
        let mut builder = Builder::with_resolver(name.parse().unwrap(), Box::new(resolver));
        builder = builder.prologue(&prologue).unwrap().local_private_key(statik.bytes()).unwrap();
        if let Some(psk) = &psk {
            builder = builder.psk(2, psk).unwrap();
        }
        match &remote {
            Some(remote) => builder.remote_public_key(remote).unwrap().build_initiator().unwrap(),
            None => builder.build_responder().unwrap(),
        }
    }

    #[test]
    fn published_vectors_come_out_byte_for_byte() {
        let published: Value = serde_json::from_str(include_str!("../../tests/data/noise-cacophony.json")).unwrap();
        let vectors = published["vectors"].as_array().unwrap();
        assert_eq!(vectors.len(), 2);
        for vector in vectors {
            let (mut initiator, mut responder) = (side(vector, "init"), side(vector, "resp"));
            let messages = vector["messages"].as_array().unwrap();
            let (handshake, transport) = messages.split_at(2);
            let (mut sealed, mut opened) = (vec![0; 512], vec![0; 512]);
            for (message, initiates) in handshake.iter().zip([true, false]) {
                let (from, to) = match initiates {
                    true => (&mut initiator, &mut responder),
                    false => (&mut responder, &mut initiator),
                };
                let len = from.write_message(&bytes(&message["payload"]), &mut sealed).unwrap();
                assert_eq!(sealed[..len], bytes(&message["ciphertext"]));
                let len = to.read_message(&sealed[..len], &mut opened).unwrap();
                assert_eq!(opened[..len], bytes(&message["payload"]));
            }
            assert_eq!(initiator.get_handshake_hash(), bytes(&vector["handshake_hash"]));
            let (mut a, mut b) = (initiator.into_transport_mode().unwrap(), responder.into_transport_mode().unwrap());
            for (message, by_initiator) in transport.iter().zip([true, false].into_iter().cycle()) {
                let (from, to) = if by_initiator { (&mut a, &mut b) } else { (&mut b, &mut a) };
                let len = from.write_message(&bytes(&message["payload"]), &mut sealed).unwrap();
                assert_eq!(sealed[..len], bytes(&message["ciphertext"]));
                let len = to.read_message(&sealed[..len], &mut opened).unwrap();
                assert_eq!(opened[..len], bytes(&message["payload"]));
            }
        }
    }

    #[test]
    fn only_the_agreement_that_was_asked_for_last_is_kept_until_it_is_forgotten() {
        let key = StaticKey::new(&[1; LEN]);
        let [peer, stranger] = [2, 3].map(|seed| *StaticKey::new(&[seed; LEN]).public());
        let (mut first, mut again) = ([0; LEN], [0; LEN]);
        key.agree(&peer, &mut first).unwrap();
        key.keep_agreement(&stranger);
        assert!(key.agreements().kept.is_empty());
        key.keep_agreement(&peer);
        key.agree(&stranger, &mut [0; LEN]).unwrap();
        key.agree(&peer, &mut again).unwrap();
        assert_eq!((first, key.agreements().kept.len()), (again, 1));
        key.forget_agreement(&peer);
        assert!(key.agreements().kept.is_empty() && key.agreements().last.is_none());
        assert_eq!(key.agree(&[0; LEN], &mut again), Err(Error::Dh), "a low-order point");
    }

    #[test]
    fn one_ephemeral_is_all_there_is() {
        let mut rng = OneDraw(Some(Zeroizing::new([7; LEN])));
        let mut out = [0; LEN];
        assert_eq!(rng.try_fill_bytes(&mut out), Ok(()));
        assert_eq!((out, rng.try_fill_bytes(&mut out)), ([7; LEN], Err(Error::Rng)));
    }
}
