//! Where forwarded traffic really goes.

use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};

use crate::netstack::Netstack;

/// Knows where traffic that peers address to us, or to somebody behind us, really goes.
pub trait Targets: Debug + Send + Sync {
    /// Where to connect to for `destination`; `None` refuses. Echo requests ask with port 0.
    fn target(&self, destination: SocketAddr) -> Option<SocketAddr>;
}

/// This host as its own programs see it: our addresses in the mesh are its loopback address, others are what they are.
///
/// This host's loopback address is never reached by way of a subnet: it is refused, however wide the prefix, and so are
/// link-local, multicast, broadcast and unspecified addresses.
#[derive(Debug, Clone)]
pub struct ThisHost {
    netstack: Netstack,
    loopback: IpAddr,
}

impl ThisHost {
    /// Takes what is for addresses of `netstack` to `loopback`.
    pub fn new(netstack: Netstack, loopback: IpAddr) -> Self {
        Self { netstack, loopback }
    }
}

impl Targets for ThisHost {
    fn target(&self, destination: SocketAddr) -> Option<SocketAddr> {
        if self.netstack.addresses().contains(&destination.ip()) {
            return Some(SocketAddr::new(self.loopback, destination.port()));
        }
        is_elsewhere(destination.ip()).then_some(destination)
    }
}

/// Whether `address` can be a single host other than this one.
fn is_elsewhere(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let here = v4.is_loopback() || v4.is_unspecified() || v4.octets()[0] == 0;
            !here && !v4.is_link_local() && !v4.is_multicast() && v4.octets()[0] < 240
        }
        IpAddr::V6(v6) => {
            !v6.is_loopback() && !v6.is_unspecified() && !v6.is_multicast() && !v6.is_unicast_link_local()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netstack::Config;

    #[test]
    fn our_own_addresses_are_this_host_and_others_are_what_they_are() {
        let own = ["100.64.0.1", "fd7a:115c:a1e0::1"].map(|address| address.parse().unwrap());
        let (netstack, _device) = Netstack::start(Config::with_addresses(own)).unwrap();
        let targets = ThisHost::new(netstack, "127.0.0.1".parse().unwrap());
        let target = |destination: &str| targets.target(destination.parse().unwrap()).map(|target| target.to_string());
        assert_eq!(target("100.64.0.1:80").as_deref(), Some("127.0.0.1:80"));
        assert_eq!(target("[fd7a:115c:a1e0::1]:80").as_deref(), Some("127.0.0.1:80"));
        for elsewhere in ["10.1.2.3:80", "[2001:db8::1]:53"] {
            assert_eq!(target(elsewhere).as_deref(), Some(elsewhere));
        }
        for here in [
            "127.0.0.1:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "169.254.169.254:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "[::1]:80",
            "[::]:80",
            "[::ffff:127.0.0.1]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
        ] {
            assert_eq!(target(here), None, "{here}");
        }
    }
}
