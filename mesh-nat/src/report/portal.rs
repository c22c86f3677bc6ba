//! Captive portals: networks that answer every HTTP request themselves until somebody has signed in.
//!
//! Relays that offer port 80 answer `GET /generate_204` with status 204 and, to a challenge, with a response that nobody
//! else would think of:
//!
//! | direction | header |
//! |---|---|
//! | request | `X-Tailscale-Challenge: ts_<host>` |
//! | response | `X-Tailscale-Response: response ts_<host>` |
//!
//! Any other answer comes from somebody in between. No answer at all is no portal: a portal wants to be seen.

use std::net::SocketAddr;

use mesh_derp::map::{DerpMap, FamilyAddress, RegionId};
use mesh_derp::upgrade;

/// How many relays are asked at once.
const MAX_CHECKS: usize = 5;

/// One question to one relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortalCheck {
    /// Where to connect by TCP.
    pub address: SocketAddr,
    /// What to send; the connection ends with the answer.
    pub request: Vec<u8>,
    challenge: String,
}

impl PortalCheck {
    /// Asks the relay that calls itself `host` at an address of its plain HTTP port.
    #[must_use]
    pub fn at(address: SocketAddr, host: &str) -> Self {
        let ip = address.ip();
        let challenge = format!("ts_{host}");
        let request = format!(
            "GET /generate_204 HTTP/1.1\r\nHost: {ip}\r\nX-Tailscale-Challenge: {challenge}\r\n\
             Cache-Control: no-cache\r\nConnection: close\r\n\r\n"
        );
        Self { address, request: request.into_bytes(), challenge }
    }

    /// Whether the answer, as far as it has been read, was given by somebody else. `None` while more must be read.
    #[must_use]
    pub fn judge(&self, answer: &[u8]) -> Option<bool> {
        match upgrade::parse_response(answer) {
            Ok(None) => None,
            Ok(Some((head, _))) => {
                let expected = format!("response {}", self.challenge);
                let right = head.status == 204 && head.headers.get("x-tailscale-response") == Some(expected.as_str());
                Some(!right)
            }
            Err(_) => Some(true),
        }
    }
}

/// Whom to ask: relays with port 80, those of `home` first.
pub(super) fn checks(map: &DerpMap, home: Option<RegionId>) -> Vec<PortalCheck> {
    let open = |(region, node): (RegionId, &mesh_derp::map::DerpNode)| match node.v4() {
        FamilyAddress::At(ip) if node.can_port80 => Some((region, PortalCheck::at((ip, 80).into(), &node.host_name))),
        FamilyAddress::At(_) | FamilyAddress::Disabled | FamilyAddress::Lookup => None,
    };
    let mut found: Vec<_> = map.nodes().filter_map(open).collect();
    found.sort_by_key(|(region, _)| Some(*region) != home);
    found.into_iter().map(|(_, check)| check).take(MAX_CHECKS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_derp::map::{DerpNode, DerpRegion};

    fn map() -> DerpMap {
        let mut map = DerpMap::default();
        for number in 1..=9 {
            let id = RegionId::new(number).unwrap();
            let mut region = DerpRegion::new(id, "r", "R");
            let mut node = DerpNode::new(format!("{number}a"), id, format!("relay{number}.example"));
            node.ipv4 = format!("192.0.2.{number}");
            node.can_port80 = number != 1;
            region.nodes.push(node);
            map.regions.insert(id, region);
        }
        map
    }

    #[test]
    fn relays_with_port_80_are_asked_the_home_first() {
        let found = checks(&map(), RegionId::new(7));
        assert_eq!(found.len(), MAX_CHECKS);
        assert_eq!(found[0].address, "192.0.2.7:80".parse().unwrap());
        assert_eq!(found[1].address, "192.0.2.2:80".parse().unwrap());
        assert!(checks(&DerpMap::default(), None).is_empty());
    }

    #[test]
    fn only_the_relays_own_answer_is_believed() {
        let check = &checks(&map(), None)[0];
        let answer = |status: &str, header: &str| format!("HTTP/1.1 {status}\r\n{header}\r\n\r\n").into_bytes();
        let right = answer("204 No Content", "X-Tailscale-Response: response ts_relay2.example");
        assert_eq!(check.judge(&right), Some(false));
        assert_eq!(check.judge(&right[..20]), None);
        assert_eq!(check.judge(&answer("204 No Content", "Server: hotel")), Some(true));
        assert_eq!(check.judge(&answer("302 Found", "Location: http://hotel.example/")), Some(true));
        assert_eq!(check.judge(b"\xff\xfe\r\n\r\n"), Some(true));
    }

    #[test]
    fn the_request_carries_the_challenge() {
        let check = &checks(&map(), None)[0];
        let (head, _) = upgrade::parse_request(&check.request).unwrap().unwrap();
        assert_eq!((head.path(), head.header("x-tailscale-challenge")), ("/generate_204", Some("ts_relay2.example")));
    }
}
