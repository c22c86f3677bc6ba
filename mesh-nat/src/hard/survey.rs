//! What our own NAT gives right now, asked of STUN servers from the sockets that are about to be used.
//!
//! It answers three questions: which port came last (for an allocator that counts), from which range ports come, and
//! whether one port may serve flows towards several destinations at a time. The last decides how many flows a small block
//! can bear. Among `n` flows spread over `v` servers about `n²(1 − 1/v)/2R` pairs share a port where the NAT allows it, so
//! that over 512 ports nearly all surveys of 96 flows see one, and most end after 40.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use rand::rngs::StdRng;

use crate::behaviour::PortRange;
use crate::path::SocketId;
use crate::stun::message::{Response, StunError, TransactionId, request};

/// The answers of one survey.
#[derive(Debug, Default)]
pub(super) struct Survey {
    asked: BTreeMap<TransactionId, SocketAddr>,
    /// Server and the address that it saw, in order of arrival.
    seen: Vec<(SocketAddr, SocketAddr)>,
    reuses: bool,
}

impl Survey {
    /// A question to `server`.
    pub(super) fn ask(&mut self, server: SocketAddr, rng: &mut StdRng) -> Vec<u8> {
        let tx = TransactionId::generate(rng);
        self.asked.insert(tx, server);
        request(tx)
    }

    /// Takes an answer.
    pub(super) fn handle_datagram(&mut self, datagram: &[u8]) -> Result<(), StunError> {
        let response = Response::decode(datagram)?;
        let server = self.asked.remove(&response.tx).ok_or(StunError::UnknownTransaction)?;
        self.reuses |= self.seen.iter().any(|(other, mapped)| *other != server && *mapped == response.mapped);
        self.seen.push((server, response.mapped));
        Ok(())
    }

    /// Whether nothing is awaited any more.
    pub(super) fn is_answered(&self) -> bool {
        self.asked.is_empty()
    }

    /// How many answers have come.
    pub(super) const fn answers(&self) -> usize {
        self.seen.len()
    }

    /// Whether two flows towards different servers were seen to share a port.
    pub(super) const fn reuses(&self) -> bool {
        self.reuses
    }

    /// The address that we are seen at.
    pub(super) fn outside(&self) -> Option<SocketAddr> {
        self.seen.last().map(|(_, mapped)| *mapped)
    }

    /// Whether all that was seen lies in `range`, and anything was.
    pub(super) fn confirms(&self, range: &PortRange) -> bool {
        !self.seen.is_empty() && self.seen.iter().all(|(_, mapped)| range.contains(mapped.port()))
    }

    /// The port furthest along the way of an allocator that counts by `stride`.
    pub(super) fn furthest(&self, stride: i16) -> Option<u16> {
        let (_, first) = self.seen.first()?;
        let along = |port: u16| {
            // Wraps like the counter; no survey is longer than half of all ports.
            let off = port.wrapping_sub(first.port()).cast_signed();
            if stride < 0 { -i32::from(off) } else { i32::from(off) }
        };
        self.seen.iter().map(|(_, mapped)| mapped.port()).max_by_key(|port| along(*port))
    }

    /// Where all ports seem to come from: what was seen and `gaps` mean gaps beyond. Ports go on for longer than that once
    /// in e^gaps. `None` if too few were seen to tell.
    pub(super) fn range(&self, gaps: u32) -> Option<PortRange> {
        /// Fewer say nothing.
        const ENOUGH: usize = 12;
        let mut ports: Vec<u16> = self.seen.iter().map(|(_, mapped)| mapped.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        let (first, last) = (*ports.first()?, *ports.last()?);
        let count = u32::try_from(ports.len()).ok().filter(|_| ports.len() >= ENOUGH)?;
        let gap = u16::try_from((PortRange { first, last }.len() * gaps).div_ceil(count)).unwrap_or(u16::MAX);
        let lowest = first.saturating_sub(gap).max(PortRange::ALL.first.min(first));
        Some(PortRange { first: lowest, last: last.saturating_add(gap) })
    }
}

/// Which socket asks which server: `flows` pairs, each socket asking all servers before the next one does.
pub(super) fn pairs(
    sockets: &[SocketId],
    servers: &[SocketAddr],
    flows: usize,
) -> impl Iterator<Item = (SocketId, SocketAddr)> {
    sockets.iter().flat_map(|socket| servers.iter().map(|server| (*socket, *server))).take(flows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stun::message::{Request, response};
    use rand::{RngExt, SeedableRng};

    fn answered(ports: &[(u8, u16)]) -> Survey {
        let mut rng = StdRng::seed_from_u64(1);
        let mut survey = Survey::default();
        for (server, port) in ports {
            let server = SocketAddr::from(([192, 0, 2, *server], 3478));
            let tx = Request::decode(&survey.ask(server, &mut rng)).unwrap().tx;
            let mapped = SocketAddr::from(([198, 51, 100, 1], *port));
            survey.handle_datagram(&response(tx, mapped)).unwrap();
        }
        survey
    }

    #[test]
    fn the_last_port_is_found_though_answers_are_reordered() {
        assert_eq!(answered(&[(1, 5001), (2, 5003), (3, 5002)]).furthest(1), Some(5003));
        assert_eq!(answered(&[(1, 5001), (2, 4997), (3, 4999)]).furthest(-2), Some(4997));
        assert_eq!(answered(&[(1, 65535), (2, 1024)]).furthest(1), Some(1024));
        assert_eq!(answered(&[]).furthest(1), None);
    }

    #[test]
    fn one_port_towards_two_servers_shows_reuse() {
        assert!(answered(&[(1, 5001), (2, 5002), (3, 5001)]).reuses());
        assert!(!answered(&[(1, 5001), (2, 5002), (3, 5003)]).reuses());
    }

    #[test]
    fn the_estimated_range_covers_a_block_and_not_much_more() {
        let mut covered = 0;
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let ports: Vec<_> = (0..32).map(|nth| (nth, rng.random_range(4096u16..4608))).collect();
            let range = answered(&ports).range(6).unwrap();
            covered += u32::from(range.first <= 4096 && range.last >= 4607);
            assert!(range.len() <= 512 + 2 * 120, "{range:?}");
        }
        assert!(covered >= 196, "{covered} of 200");
        assert_eq!(answered(&[(1, 5000), (2, 5010)]).range(6), None);
    }

    #[test]
    fn an_answer_to_no_question_is_refused() {
        let mut survey = answered(&[(1, 5001)]);
        let stray = response(TransactionId([9; 12]), "198.51.100.1:1".parse().unwrap());
        assert_eq!(survey.handle_datagram(&stray), Err(StunError::UnknownTransaction));
        assert!(survey.is_answered());
    }
}
