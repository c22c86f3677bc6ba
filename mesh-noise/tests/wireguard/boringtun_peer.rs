//! boringtun at the other end, in both roles.

use std::sync::Arc;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use mesh_noise::key::{NodePublic, PresharedKey};
use mesh_noise::wireguard::message::{MessageKind, kind};
use mesh_noise::wireguard::{Event, HEADER_LEN, Interface, PeerConfig, Session};
use proptest::prelude::*;

use crate::pair::{keys, origin, wall};

/// A minimal IPv4 packet: boringtun looks at the header.
fn packet(payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 20];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&u16::try_from(20 + payload.len()).expect("a short packet").to_be_bytes());
    packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
    packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
    packet.extend_from_slice(payload);
    packet
}

struct Ours {
    now: std::time::Instant,
    core: Interface<()>,
    peer: NodePublic,
    sessions: Vec<Arc<Session>>,
    sending: Option<Arc<Session>>,
    received: Vec<Vec<u8>>,
}

impl Ours {
    fn new(psk: Option<[u8; 32]>) -> Self {
        let (now, [us, them]) = (origin(), keys());
        let mut core = Interface::new(now, wall(), &us, [5; 32]);
        let preshared = PresharedKey::from_bytes(psk.unwrap_or_default());
        core.set_peer(now, them.public(), PeerConfig { preshared, ..PeerConfig::default() });
        Self { now, core, peer: them.public(), sessions: Vec::new(), sending: None, received: Vec::new() }
    }

    /// Everything the core wants sent.
    fn drain(&mut self) -> Vec<Vec<u8>> {
        while let Some(event) = self.core.poll_event() {
            match event {
                Event::SessionOpened { session, .. } => self.sessions.push(session),
                Event::SessionReady { session, .. } => self.sending = Some(session),
                Event::SessionClosed { receiver_index, .. } => {
                    self.sessions.retain(|session| session.receiver_index() != receiver_index);
                }
                Event::HandshakeFailed { .. } | Event::Authenticated { .. } => {}
            }
        }
        std::iter::from_fn(|| self.core.poll_transmit()).map(|transmit| transmit.datagram).collect()
    }

    fn initiate(&mut self) -> Vec<Vec<u8>> {
        self.now += std::time::Duration::from_secs(6);
        self.core.handle_timeout(self.now);
        self.core.want_session(self.now, &self.peer.clone());
        self.drain()
    }

    fn take(&mut self, mut datagram: Vec<u8>) -> Vec<Vec<u8>> {
        self.now += std::time::Duration::from_millis(30);
        match kind(&datagram) {
            Some(MessageKind::TransportData { receiver }) => {
                if let Some(session) = self.sessions.iter().find(|session| session.receiver_index() == receiver)
                    && let Ok(opened) = session.open(&mut datagram)
                    && session.replay().accept(opened.counter)
                {
                    if !opened.packet.is_empty() {
                        let len = usize::from(u16::from_be_bytes([opened.packet[2], opened.packet[3]]));
                        self.received.push(opened.packet[..len].to_vec());
                    }
                    self.core.session_used(self.now, receiver);
                }
            }
            Some(MessageKind::Initiation | MessageKind::Response | MessageKind::CookieReply) | None => {
                let _ = self.core.handle_datagram(self.now, &(), None, &datagram);
            }
        }
        self.drain()
    }

    fn seal(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let session = self.sending.as_ref()?;
        let mut datagram = vec![0; packet.len().next_multiple_of(16) + 32];
        datagram[HEADER_LEN..][..packet.len()].copy_from_slice(packet);
        session.seal(session.reserve(1)?, &mut datagram, packet.len());
        Some(datagram)
    }
}

struct Theirs {
    tunnel: Tunn,
    received: Vec<Vec<u8>>,
}

impl Theirs {
    fn new(psk: Option<[u8; 32]>) -> Self {
        let [us, them] = keys();
        let tunnel = Tunn::new(
            StaticSecret::from(*them.expose_secret()),
            PublicKey::from(*us.public().as_bytes()),
            psk,
            None,
            1,
            None,
        );
        Self { tunnel, received: Vec::new() }
    }

    fn initiate(&mut self) -> Vec<Vec<u8>> {
        let mut buf = vec![0; 2048];
        let initiation = network(self.tunnel.format_handshake_initiation(&mut buf, true));
        initiation.into_iter().collect()
    }

    fn take(&mut self, datagram: &[u8]) -> Vec<Vec<u8>> {
        let (mut out, mut input) = (Vec::new(), datagram);
        loop {
            let mut buf = vec![0; 2048];
            match self.tunnel.decapsulate(None, input, &mut buf) {
                TunnResult::WriteToNetwork(datagram) => out.push(datagram.to_vec()),
                TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                    self.received.push(packet.to_vec());
                    return out;
                }
                TunnResult::Done | TunnResult::Err(_) => return out,
            }
            input = &[];
        }
    }

    fn seal(&mut self, packet: &[u8]) -> Option<Vec<u8>> {
        let mut buf = vec![0; 2048];
        network(self.tunnel.encapsulate(packet, &mut buf))
    }
}

fn network(result: TunnResult<'_>) -> Option<Vec<u8>> {
    if let TunnResult::WriteToNetwork(datagram) = result { Some(datagram.to_vec()) } else { None }
}

/// Carries datagrams to and fro until nobody has any left. `lose` decides on each.
fn exchange(ours: &mut Ours, theirs: &mut Theirs, first: (bool, Vec<Vec<u8>>), mut lose: impl FnMut() -> usize) {
    let (mut to_us, mut to_them) = if first.0 { (Vec::new(), first.1) } else { (first.1, Vec::new()) };
    for _ in 0..20 {
        if to_us.is_empty() && to_them.is_empty() {
            return;
        }
        for datagram in std::mem::take(&mut to_them) {
            for _ in 0..lose() {
                to_us.extend(theirs.take(&datagram));
            }
        }
        for datagram in std::mem::take(&mut to_us) {
            for _ in 0..lose() {
                to_them.extend(ours.take(datagram.clone()));
            }
        }
    }
}

fn assert_traffic(ours: &mut Ours, theirs: &mut Theirs, rounds: u8) {
    for n in 0..rounds {
        let there = packet(&[n; 37]);
        let datagram = ours.seal(&there).expect("we may send");
        theirs.take(&datagram);
        assert_eq!(theirs.received.last(), Some(&there));
        let back = packet(&[!n; 1200]);
        let datagram = theirs.seal(&back).expect("boringtun may send");
        ours.take(datagram);
        assert_eq!(ours.received.last(), Some(&back));
    }
}

#[test]
fn we_initiate_and_packets_go_both_ways() {
    for psk in [None, Some([3; 32])] {
        let (mut ours, mut theirs) = (Ours::new(psk), Theirs::new(psk));
        let initiation = ours.initiate();
        exchange(&mut ours, &mut theirs, (true, initiation), || 1);
        assert_traffic(&mut ours, &mut theirs, 20);
    }
}

#[test]
fn boringtun_initiates_and_packets_go_both_ways() {
    for psk in [None, Some([3; 32])] {
        let (mut ours, mut theirs) = (Ours::new(psk), Theirs::new(psk));
        let initiation = theirs.initiate();
        exchange(&mut ours, &mut theirs, (false, initiation), || 1);
        assert_traffic(&mut ours, &mut theirs, 20);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever was lost or came twice, in any number of handshakes by either side: the next whole one works.
    #[test]
    fn a_whole_handshake_heals_every_broken_one(
        broken in proptest::collection::vec((any::<bool>(), proptest::collection::vec(0usize..3, 6)), 0..6),
        last: bool,
    ) {
        let (mut ours, mut theirs) = (Ours::new(None), Theirs::new(None));
        for (by_us, fates) in broken {
            let initiation = if by_us { ours.initiate() } else { theirs.initiate() };
            let mut fates = fates.into_iter();
            exchange(&mut ours, &mut theirs, (by_us, initiation), || fates.next().unwrap_or(1));
        }
        // An initiation of ours is due only without a session, so make sure that there is a reason.
        let initiation = if last && ours.sending.is_none() { ours.initiate() } else { theirs.initiate() };
        let by_us = last && ours.sending.is_none();
        exchange(&mut ours, &mut theirs, (by_us, initiation), || 1);
        assert_traffic(&mut ours, &mut theirs, 3);
    }
}

/// What the link does with one message.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Deliver,
    Lose,
    Twice,
    /// Behind everything else that is under way; alone, it is held until another message comes or nothing is left.
    Late,
}

const FATES: [Fate; 4] = [Fate::Deliver, Fate::Lose, Fate::Twice, Fate::Late];

/// As [`exchange`], but each message has a fate of its own; those beyond the list are delivered.
fn weather(ours: &mut Ours, theirs: &mut Theirs, first: Vec<(bool, Vec<u8>)>, fates: &[Fate]) {
    let mut fates = fates.iter().copied();
    let mut link: std::collections::VecDeque<_> =
        first.into_iter().map(|(to_us, datagram)| (to_us, datagram, fates.next().unwrap_or(Fate::Deliver))).collect();
    for _ in 0..60 {
        let Some((to_us, datagram, fate)) = link.pop_front() else { return };
        let copies = match fate {
            Fate::Deliver => 1,
            Fate::Lose => 0,
            Fate::Twice => 2,
            Fate::Late => {
                link.push_back((to_us, datagram, Fate::Deliver));
                continue;
            }
        };
        for _ in 0..copies {
            let answers = if to_us { ours.take(datagram.clone()) } else { theirs.take(&datagram) };
            for answer in answers {
                link.push_back((!to_us, answer, fates.next().unwrap_or(Fate::Deliver)));
            }
        }
    }
    panic!("the two never come to rest");
}

/// Every combination of fates for the first four messages, whoever begins: us, boringtun, or both at once.
#[test]
fn every_loss_reorder_and_duplication_of_every_message_heals() {
    for beginners in [[true, false], [false, true], [true, true]] {
        for number in 0..4_usize.pow(4) {
            let fates: Vec<_> = (0..4).map(|at| FATES[number >> (2 * at) & 3]).collect();
            let (mut ours, mut theirs) = (Ours::new(None), Theirs::new(None));
            let mut first = Vec::new();
            if beginners[0] {
                first.extend(ours.initiate().into_iter().map(|datagram| (false, datagram)));
            }
            if beginners[1] {
                first.extend(theirs.initiate().into_iter().map(|datagram| (true, datagram)));
            }
            weather(&mut ours, &mut theirs, first, &fates);
            // Whatever state that left: one whole handshake, begun by the other side this time, puts it right.
            let by_us = ours.sending.is_none() && !beginners[0];
            let initiation = if by_us { ours.initiate() } else { theirs.initiate() };
            exchange(&mut ours, &mut theirs, (by_us, initiation), || 1);
            assert_traffic(&mut ours, &mut theirs, 1);
        }
    }
}
