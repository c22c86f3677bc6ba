//! Two WireGuard interfaces and a link that loses, repeats, reorders and changes what it carries.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::wireguard::message::{MessageKind, kind};
use mesh_noise::wireguard::{Event, HEADER_LEN, Interface, PeerConfig, Session};

/// What a packet of these tunnels holds.
const PACKET_LEN: usize = 16;

struct End {
    core: Interface<u8>,
    peer: NodePublic,
    sessions: BTreeMap<u32, Arc<Session>>,
    sending: Option<Arc<Session>>,
    received: BTreeSet<u64>,
}

struct Tunnel {
    now: Instant,
    ends: [End; 2],
    /// What is under way: to whom, and the bytes.
    link: VecDeque<(usize, Vec<u8>)>,
    sent: u64,
}

/// Runs `steps`, one byte each, and then requires that the tunnel works again.
///
/// # Panics
/// When a packet arrives twice or that was never sent, a deadline stays due, or the tunnel does not recover.
pub(crate) fn run(now: Instant, steps: &[u8]) {
    let mut tunnel = Tunnel::new(now);
    let mut steps = steps.iter().copied();
    while let Some(step) = steps.next() {
        let end = usize::from(step >> 7);
        match step & 0x0f {
            0 => tunnel.want(end),
            1 => tunnel.deliver(),
            2 => {
                let again = tunnel.link.front().cloned();
                tunnel.deliver();
                tunnel.link.extend(again);
            }
            3 => drop(tunnel.link.pop_front()),
            4 => tunnel.link.rotate_left(usize::from(!tunnel.link.is_empty())),
            5 => tunnel.change(steps.next().unwrap_or(0), step >> 4 & 7),
            6 => tunnel.pass(Duration::from_millis(u64::from(steps.next().unwrap_or(0)).pow(2) * 4)),
            7 => tunnel.pass(Duration::from_millis(u64::from(steps.next().unwrap_or(0)))),
            8 => tunnel.forget(end),
            9 => tunnel.deliver_all(),
            _ => tunnel.send(end),
        }
    }
    tunnel.recover();
}

impl Tunnel {
    fn new(now: Instant) -> Self {
        let privates = [NodePrivate::from_bytes([1; 32]), NodePrivate::from_bytes([2; 32])];
        let ends = [0, 1].map(|own| {
            let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
            let mut core = Interface::new(now, wall, &privates[own], [[3; 32], [4; 32]][own]);
            let peer = privates[1 - own].public();
            core.set_peer(now, peer, PeerConfig::default());
            End { core, peer, sessions: BTreeMap::new(), sending: None, received: BTreeSet::new() }
        });
        Self { now, ends, link: VecDeque::new(), sent: 0 }
    }

    fn want(&mut self, end: usize) {
        let peer = self.ends[end].peer;
        self.ends[end].core.want_session(self.now, &peer);
        self.drain(end);
    }

    /// A peer is removed and added again, as an administrator may at any time.
    fn forget(&mut self, end: usize) {
        let (now, peer) = (self.now, self.ends[end].peer);
        self.ends[end].core.remove_peer(&peer);
        self.ends[end].core.set_peer(now, peer, PeerConfig::default());
        self.drain(end);
    }

    fn send(&mut self, from: usize) {
        let end = &mut self.ends[from];
        let Some((session, counter)) = end.sending.as_ref().and_then(|session| Some((session, session.reserve(1)?)))
        else {
            return self.want(from);
        };
        let mut datagram = vec![0; HEADER_LEN + PACKET_LEN + 16];
        datagram[HEADER_LEN..][..8].copy_from_slice(&self.sent.to_be_bytes());
        datagram[HEADER_LEN + 8] = 1 + u8::from(from == 1);
        self.sent += 1;
        session.seal(counter, &mut datagram, PACKET_LEN);
        let ms = end.core.clock_ms(self.now);
        if session.activity().note_sent(ms, 1, datagram.len() as u64) {
            end.core.peer_active(self.now, &end.peer);
        }
        self.link.push_back((1 - from, datagram));
        self.drain(from);
    }

    fn change(&mut self, at: u8, bit: u8) {
        if let Some((_, datagram)) = self.link.front_mut() {
            let at = usize::from(at) % datagram.len();
            datagram[at] ^= 1 << bit;
        }
    }

    fn deliver(&mut self) {
        let Some((to, mut datagram)) = self.link.pop_front() else { return };
        let (now, end) = (self.now, &mut self.ends[to]);
        if let Some(MessageKind::TransportData { receiver }) = kind(&datagram) {
            let Some(session) = end.sessions.get(&receiver) else { return };
            let len = datagram.len() as u64;
            let Ok(opened) = session.open(&mut datagram) else { return };
            if !session.replay().accept(opened.counter) {
                return;
            }
            let packets = u64::from(!opened.packet.is_empty());
            if let Some((serial, rest)) = opened.packet.split_first_chunk() {
                let serial = u64::from_be_bytes(*serial);
                assert!(serial < self.sent && rest[0] == 1 + u8::from(to == 0), "never sent to this end");
                assert!(end.received.insert(serial), "packet {serial} arrived twice");
            }
            if session.activity().note_received(end.core.clock_ms(now), packets, len) {
                end.core.peer_active(now, &end.peer);
            }
            end.core.session_used(now, receiver);
        } else {
            let source = ([192, 0, 2, 1], 51820).into();
            let _ = end.core.handle_datagram(now, &0, Some(source), &datagram);
        }
        self.drain(to);
    }

    fn deliver_all(&mut self) {
        // An end answers a message with fewer than it got in the long run, so this comes to rest.
        for _ in 0..100 {
            self.deliver();
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some((at, which)) = (0..2).filter_map(|end| Some((self.ends[end].core.poll_timeout()?, end))).min() {
            if at > end {
                break;
            }
            self.now = self.now.max(at);
            self.ends[which].core.handle_timeout(self.now);
            assert!(self.ends[which].core.poll_timeout().is_none_or(|next| next > self.now), "a deadline stays due");
            self.drain(which);
        }
        self.now = end;
    }

    fn recover(&mut self) {
        self.link.clear();
        for _ in 0..5 {
            for end in [0, 1] {
                self.send(end);
            }
            self.deliver_all();
            self.pass(Duration::from_secs(9));
            self.deliver_all();
        }
        let before = self.ends.each_ref().map(|end| end.received.len());
        for end in [0, 1] {
            self.send(end);
        }
        self.deliver_all();
        let after = self.ends.each_ref().map(|end| end.received.len());
        assert_eq!(after, before.map(|count| count + 1), "the tunnel has not recovered");
    }

    fn drain(&mut self, at: usize) {
        let end = &mut self.ends[at];
        while let Some(event) = end.core.poll_event() {
            match event {
                Event::SessionOpened { session, .. } => {
                    let double = end.sessions.insert(session.receiver_index(), session);
                    assert!(double.is_none(), "an index is given out once");
                }
                Event::SessionReady { session, .. } => end.sending = Some(session),
                Event::SessionClosed { receiver_index, .. } => {
                    assert!(end.sessions.remove(&receiver_index).is_some(), "opened before closed");
                    end.sending = end.sending.take().filter(|session| session.receiver_index() != receiver_index);
                }
                Event::HandshakeFailed { .. } | Event::Authenticated { .. } => {}
            }
        }
        while let Some(transmit) = end.core.poll_transmit() {
            self.link.push_back((1 - at, transmit.datagram));
        }
    }
}
