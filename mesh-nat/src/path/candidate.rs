//! Addresses worth trying for one peer, where we know them from, and what trying them has shown. Bounded.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::probe::RoundTrip;
use super::{Path, SocketId};

/// Candidates that one peer may have.
pub(crate) const MAX_CANDIDATES: usize = 100;

/// A remote address seen from one of our sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Target {
    pub(crate) socket: SocketId,
    pub(crate) remote: SocketAddr,
}

impl From<Target> for Path {
    fn from(target: Target) -> Self {
        Self::Direct { socket: target.socket, remote: target.remote }
    }
}

/// What is known about one target.
#[derive(Debug, Clone, Default)]
pub(crate) struct Candidate {
    /// Control lists it.
    pub(crate) listed: bool,
    /// The peer's latest call-me-maybe lists it.
    pub(crate) called: bool,
    /// When a ping last came from it.
    pub(crate) seen: Option<Instant>,
    /// When we last pinged it.
    pub(crate) pinged: Option<Instant>,
    /// When we last pinged it because a ping came from it.
    pub(crate) triggered: Option<Instant>,
    /// Pings of the present search that it has not answered; 0 if it is not to be tried again.
    pub(crate) tries: u8,
    /// When a pong last proved it.
    pub(crate) proven: Option<Instant>,
    pub(crate) round_trip: Option<RoundTrip>,
    /// Our address as the peer saw it there.
    pub(crate) observed: Option<SocketAddr>,
    /// The longest datagram that arrives, if that is less than is wanted.
    pub(crate) limit: Option<usize>,
}

impl Candidate {
    /// Whether a pong came from it within `span`.
    pub(crate) fn proven_within(&self, now: Instant, span: Duration) -> bool {
        self.proven.is_some_and(|at| now.saturating_duration_since(at) < span)
    }

    /// Forgets what trying has shown, not that it exists.
    pub(crate) fn forget(&mut self) {
        *self = Self { listed: self.listed, called: self.called, seen: self.seen, ..Self::default() };
    }

    fn is_wanted(&self, now: Instant, life: Duration) -> bool {
        self.listed
            || self.called
            || self.seen.is_some_and(|at| now.saturating_duration_since(at) < life)
            || self.proven_within(now, life)
    }
}

/// One peer's candidates, in address order. Most peers have three or four, and a node may have thousands of peers: a list
/// takes a third of what a tree would.
#[derive(Debug, Default)]
pub(crate) struct Candidates(Vec<(Target, Candidate)>);

impl Candidates {
    fn find(&self, target: &Target) -> Result<usize, usize> {
        self.0.binary_search_by_key(target, |(target, _)| *target)
    }

    pub(crate) fn get(&self, target: &Target) -> Option<&Candidate> {
        self.find(target).ok().map(|at| &self.0[at].1)
    }

    pub(crate) fn get_mut(&mut self, target: &Target) -> Option<&mut Candidate> {
        self.find(target).ok().map(|at| &mut self.0[at].1)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Target, &Candidate)> {
        self.0.iter().map(|(target, candidate)| (target, candidate))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&Target, &mut Candidate)> {
        self.0.iter_mut().map(|(target, candidate)| (&*target, candidate))
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut Candidate> {
        self.0.iter_mut().map(|(_, candidate)| candidate)
    }

    pub(crate) fn targets(&self) -> Vec<Target> {
        self.0.iter().map(|(target, _)| *target).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Finds or adds a candidate. When full, one that nobody lists any more makes room; `None` if there is none.
    pub(crate) fn admit(&mut self, now: Instant, target: Target) -> Option<&mut Candidate> {
        /// Longer than any path is trusted: what was proven within it may be in use.
        const IN_USE: Duration = Duration::from_secs(10);
        if self.find(&target).is_err() && self.0.len() >= MAX_CANDIDATES {
            let victim = self
                .0
                .iter()
                .enumerate()
                .filter(|(_, (_, held))| !held.listed && !held.called && !held.proven_within(now, IN_USE))
                .min_by_key(|(_, (_, held))| held.seen)
                .map(|(at, _)| at)?;
            self.0.remove(victim);
        }
        let at = self.find(&target).unwrap_or_else(|at| {
            // Few come after the first ones, and room for as many again would be wasted.
            self.0.reserve_exact(1);
            self.0.insert(at, (target, Candidate::default()));
            at
        });
        self.0.get_mut(at).map(|(_, candidate)| candidate)
    }

    /// Drops what nobody lists and nothing has come from for `life`.
    pub(crate) fn prune(&mut self, now: Instant, life: Duration) {
        self.0.retain(|(_, candidate)| candidate.is_wanted(now, life));
    }

    /// Drops what `keep` does not want.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&Target) -> bool) {
        self.0.retain(|(target, _)| keep(target));
    }
}

/// Makes an address that a peer or control gave us fit to be tried, or drops it.
///
/// IPv4-mapped addresses become IPv4. Port 0, unspecified, multicast, broadcast and IPv6 link-local addresses are of no
/// use. The overlay's own ranges (100.64.0.0/10 without 100.115.92.0/23, fd7a:115c:a1e0::/48) would send the mesh
/// through itself.
pub(crate) fn usable(address: SocketAddr) -> Option<SocketAddr> {
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let fits = match address.ip() {
        IpAddr::V4(ip) => {
            let octets = ip.octets();
            let overlay = octets[0] == 100 && octets[1] & 0xc0 == 64;
            let excepted = octets[..2] == [100, 115] && octets[2] & 0xfe == 92;
            !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast() && (!overlay || excepted)
        }
        IpAddr::V6(ip) => {
            let overlay = ip.segments()[..3] == [0xfd7a, 0x115c, 0xa1e0];
            !ip.is_unspecified() && !ip.is_multicast() && !ip.is_unicast_link_local() && !overlay
        }
    };
    (fits && address.port() != 0).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(port: usize) -> Target {
        let port = u16::try_from(port).unwrap();
        Target { socket: SocketId(0), remote: SocketAddr::from(([192, 0, 2, 1], port)) }
    }

    #[test]
    fn addresses_that_lead_nowhere_are_dropped() {
        for text in ["192.0.2.1:9", "10.0.0.1:9", "127.0.0.1:9", "100.115.92.4:9", "[2001:db8::1]:9", "[fd00::1]:9"] {
            assert_eq!(usable(text.parse().unwrap()), Some(text.parse().unwrap()));
        }
        let useless = [
            "192.0.2.1:0",
            "0.0.0.0:9",
            "224.0.0.1:9",
            "100.64.0.1:9",
            "[fe80::1]:9",
            "[fd7a:115c:a1e0::1]:9",
            "[::]:9",
        ];
        for text in useless {
            assert_eq!(usable(text.parse().unwrap()), None, "{text}");
        }
        assert_eq!(usable("[::ffff:192.0.2.1]:9".parse().unwrap()), Some("192.0.2.1:9".parse().unwrap()));
    }

    #[test]
    fn a_full_set_gives_up_what_nobody_lists() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut set = Candidates::default();
        for port in 1..MAX_CANDIDATES {
            set.admit(now, target(port)).unwrap().called = true;
        }
        set.admit(now, target(500)).unwrap().seen = Some(now);
        set.admit(now, target(501)).unwrap().called = true;
        assert!(set.get(&target(500)).is_none());
        assert!(set.admit(now, target(502)).is_none());
        assert_eq!(set.len(), MAX_CANDIDATES);
    }
}
