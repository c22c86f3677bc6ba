//! Which of two proven addresses is better.
//!
//! The faster one earns `100 − ⌊100 · fast / slow⌋` points. To that comes what kind of address it is: loopback 50, else
//! link-local 30, else private 20; and 10 for IPv6. This is the comparison that deployed peers make, so both ends tend
//! to agree. Unlike them we feed it smoothed round trips, take everything below 2 ms for equally fast, and ask for
//! some points more before leaving a path that works.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Round trips below this count as this: the difference is noise of schedulers, not of paths.
const FLOOR: Duration = Duration::from_millis(2);
/// Points that a challenger must be ahead of a path in use.
const HYSTERESIS: u32 = 5;
/// The same, if that path has only just replaced another one: what a private address is worth is enough.
const DWELL: u32 = 19;

/// What the comparison looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quality {
    /// The peer's address.
    pub remote: SocketAddr,
    /// Smoothed round trip.
    pub latency: Duration,
}

impl Quality {
    /// Whether this is better than `other`, nothing being in use yet.
    #[must_use]
    pub fn beats(&self, other: &Self) -> bool {
        self.points(other) > other.points(self)
    }

    /// Whether this is better enough to leave `current`, which works. If `current` is `dwelling`, since it has itself just
    /// replaced another path, this must be much better.
    #[must_use]
    pub fn displaces(&self, current: &Self, dwelling: bool) -> bool {
        let ahead = if dwelling { DWELL } else { HYSTERESIS };
        self.points(current) > current.points(self) + ahead
    }

    /// Points against `other`.
    #[must_use]
    pub fn points(&self, other: &Self) -> u32 {
        let (ours, theirs) = (self.latency.max(FLOOR), other.latency.max(FLOOR));
        let speed = if ours < theirs {
            let percent = ours.as_micros() * 100 / theirs.as_micros();
            100 - u32::try_from(percent).unwrap_or(100)
        } else {
            0
        };
        speed + kind(&self.remote.ip().to_canonical())
    }
}

fn kind(ip: &IpAddr) -> u32 {
    let (loopback, link_local, private, family) = match ip {
        IpAddr::V4(ip) => (ip.is_loopback(), ip.is_link_local(), ip.is_private(), 0),
        IpAddr::V6(ip) => (ip.is_loopback(), ip.is_unicast_link_local(), ip.is_unique_local(), 10),
    };
    let place = match (loopback, link_local, private) {
        (true, _, _) => 50,
        (_, true, _) => 30,
        (_, _, true) => 20,
        _ => 0,
    };
    place + family
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quality(remote: &str, millis: u64) -> Quality {
        Quality { remote: remote.parse().unwrap(), latency: Duration::from_millis(millis) }
    }

    #[test]
    fn the_faster_public_address_wins() {
        assert!(quality("192.0.2.1:1", 20).beats(&quality("198.51.100.1:1", 40)));
        assert!(!quality("198.51.100.1:1", 40).beats(&quality("192.0.2.1:1", 20)));
    }

    #[test]
    fn a_private_address_wins_unless_the_public_one_is_a_fifth_faster() {
        assert!(quality("10.0.0.1:1", 11).beats(&quality("192.0.2.1:1", 10)));
        assert!(!quality("10.0.0.1:1", 14).beats(&quality("192.0.2.1:1", 10)));
    }

    #[test]
    fn ipv6_wins_unless_ipv4_is_a_tenth_faster() {
        assert!(quality("[2001:db8::1]:1", 105).beats(&quality("192.0.2.1:1", 100)));
        assert!(!quality("[2001:db8::1]:1", 115).beats(&quality("192.0.2.1:1", 100)));
    }

    #[test]
    fn a_little_better_does_not_displace_and_noise_does_not_count() {
        let current = quality("192.0.2.1:1", 100);
        assert!(quality("198.51.100.1:1", 97).beats(&current));
        assert!(!quality("198.51.100.1:1", 97).displaces(&current, false));
        assert!(quality("198.51.100.1:1", 90).displaces(&current, false));
        assert_eq!(quality("192.0.2.1:1", 0).points(&quality("198.51.100.1:1", 1)), 0);
    }
}
