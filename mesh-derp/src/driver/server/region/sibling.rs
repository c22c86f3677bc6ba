//! How another relay of the region is named.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::map::{DerpNode, DerpRegion, PIN_PREFIX, RegionId};

/// Another relay of the same region, written as one URL:
///
/// ```text
/// https://HOST[:PORT][/ADDRESS][#sha256-raw:HEX]
/// ```
///
/// `HOST` is what its certificate is checked for, unless the fragment pins the certificate itself (the `CertName` of its
/// DERP-map node). `ADDRESS` is where to connect instead of looking `HOST` up, such as its address in a private network.
/// The port is 443 by default. `http://` (port 80) speaks without TLS: whoever is on the path then learns the mesh key, so
/// it is for loopback and for networks that are encrypted anyway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sibling {
    node: DerpNode,
    plain: bool,
}

/// A text that names no relay.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: {problem}; expected https://HOST[:PORT][/ADDRESS][#sha256-raw:HEX]")]
pub struct BadSibling {
    text: String,
    problem: &'static str,
}

impl Sibling {
    /// Whether it is spoken to without TLS.
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        self.plain
    }

    pub(super) fn region(&self) -> DerpRegion {
        let mut region = DerpRegion::new(self.node.region_id, "", "");
        region.nodes.push(self.node.clone());
        region
    }
}

impl fmt::Display for Sibling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.node.name)
    }
}

impl FromStr for Sibling {
    type Err = BadSibling;

    fn from_str(text: &str) -> Result<Self, BadSibling> {
        let wrong = |problem| BadSibling { text: text.to_owned(), problem };
        let (plain, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (false, rest),
            (None, Some(rest)) => (true, rest),
            (None, None) => return Err(wrong("no https://")),
        };
        let (rest, pin) = rest.split_once('#').unwrap_or((rest, ""));
        let (authority, address) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match authority.strip_prefix('[') {
            Some(bracketed) => {
                let (host, port) = bracketed.split_once(']').ok_or_else(|| wrong("no ] after an IPv6 address"))?;
                (host, port.strip_prefix(':').unwrap_or(port))
            }
            None => authority.split_once(':').unwrap_or((authority, "")),
        };
        if host.is_empty() || host.contains('@') {
            return Err(wrong("no host"));
        }
        let port = match port {
            "" => Some(if plain { 80 } else { 443 }),
            port => port.parse().ok().filter(|port| *port != 0),
        };
        let any_region = RegionId::new(u16::MAX).ok_or_else(|| wrong("no region"))?;
        let mut node = DerpNode::new(format!("{host}:{}", port.unwrap_or(0)), any_region, host);
        node.derp_port = port.ok_or_else(|| wrong("a port that is none"))?;
        let address: Option<IpAddr> = match address {
            "" => host.parse().ok(),
            address => Some(address.parse().map_err(|_| wrong("an address that is none"))?),
        };
        match address {
            Some(IpAddr::V4(ip)) => (node.ipv4, node.ipv6) = (ip.to_string(), "none".to_owned()),
            Some(IpAddr::V6(ip)) => (node.ipv4, node.ipv6) = ("none".to_owned(), ip.to_string()),
            None => {}
        }
        if !pin.is_empty() {
            if !pin.starts_with(PIN_PREFIX) {
                return Err(wrong("a pin that does not begin with sha256-raw:"));
            }
            pin.clone_into(&mut node.cert_name);
            node.cert_check().map_err(|_| wrong("a pin that is not 64 hexadecimal digits"))?;
        }
        Ok(Self { node, plain })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(text: &str) -> DerpNode {
        text.parse::<Sibling>().unwrap().node
    }

    #[test]
    fn a_url_says_where_the_relay_is_and_what_certificate_it_shows() {
        let plain = node("https://b.example");
        assert_eq!((plain.host_name.as_str(), plain.derp_port, plain.ipv4.as_str()), ("b.example", 443, ""));
        let pin = format!("sha256-raw:{}", "ab".repeat(32));
        let full = node(&format!("https://b.example:8443/10.0.0.2#{pin}"));
        assert_eq!((full.host_name.as_str(), full.derp_port), ("b.example", 8443));
        assert_eq!((full.ipv4.as_str(), full.ipv6.as_str(), full.cert_name), ("10.0.0.2", "none", pin));
        let six = node("https://[2001:db8::1]:444/");
        assert_eq!((six.host_name.as_str(), six.derp_port, six.ipv4.as_str()), ("2001:db8::1", 444, "none"));
        assert_eq!(six.ipv6, "2001:db8::1");
        assert!("http://127.0.0.1:3340".parse::<Sibling>().unwrap().is_plain());
    }

    #[test]
    fn what_is_no_url_of_a_relay_says_what_is_wrong() {
        for (text, problem) in [
            ("b.example", "no https://"),
            ("https://", "no host"),
            ("https://user@b.example", "no host"),
            ("https://b.example:0", "a port that is none"),
            ("https://b.example:x", "a port that is none"),
            ("https://b.example/derp", "an address that is none"),
            ("https://b.example#abcd", "a pin that does not begin with sha256-raw:"),
            ("https://b.example#sha256-raw:ab", "a pin that is not 64 hexadecimal digits"),
            ("https://[::1", "no ] after an IPv6 address"),
        ] {
            assert_eq!(text.parse::<Sibling>().unwrap_err().problem, problem, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_relay_or_an_error(text in "(https?://)?\\PC{0,40}") {
            let _ = text.parse::<Sibling>();
        }
    }
}
