//! The device smoltcp sees: one packet in at a time, a bounded queue out.

use std::collections::VecDeque;
use std::net::IpAddr;

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::packet::{self, Sent};

/// Buffers kept for the next packets.
const SPARE_BUFFERS: usize = 256;

/// Where smoltcp reads and writes packets.
#[derive(Debug)]
pub(super) struct Phy {
    mtu: usize,
    incoming: Option<Vec<u8>>,
    pub(super) out: Outgoing,
}

/// Packets that smoltcp has made.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Packets for the mesh, oldest first.
    packets: VecDeque<Vec<u8>>,
    /// Packets for ourselves, oldest first.
    looped: VecDeque<Vec<u8>>,
    /// Our own addresses.
    own: Vec<IpAddr>,
    /// How many packets may wait in `packets`.
    limit: usize,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
    /// The last TCP segment that was sent.
    sent: Option<Sent>,
}

impl Phy {
    pub(super) fn new(mtu: usize, limit: usize) -> Self {
        Self { mtu, incoming: None, out: Outgoing { limit, ..Outgoing::default() } }
    }

    pub(super) fn mtu(&self) -> usize {
        self.mtu
    }

    /// Lays down the packet that the next `receive` hands out.
    pub(super) fn offer(&mut self, packet: Vec<u8>) {
        self.incoming = Some(packet);
    }

    /// Takes the offered packet's buffer back for another packet.
    pub(super) fn recycle(&mut self) {
        if let Some(packet) = self.incoming.take() {
            self.out.recycle(packet);
        }
    }

    /// Whether a socket may send another packet now.
    pub(super) fn has_room(&self) -> bool {
        self.out.packets.len() < self.out.limit && self.out.looped.len() < self.out.limit.max(64)
    }

    pub(super) fn set_limit(&mut self, limit: usize) {
        self.out.limit = limit;
    }

    pub(super) fn set_own(&mut self, own: Vec<IpAddr>) {
        self.out.own = own;
    }
}

impl Outgoing {
    /// Queues a whole packet, to the mesh or back to ourselves.
    pub(super) fn push(&mut self, packet: Vec<u8>) {
        if packet::destination(&packet).is_some_and(|address| self.own.contains(&address)) {
            self.looped.push_back(packet);
        } else {
            self.packets.push_back(packet);
        }
    }

    pub(super) fn pop(&mut self) -> Option<Vec<u8>> {
        self.packets.pop_front()
    }

    pub(super) fn pop_looped(&mut self) -> Option<Vec<u8>> {
        self.looped.pop_front()
    }

    pub(super) fn recycle(&mut self, packet: Vec<u8>) {
        if self.spare.len() < SPARE_BUFFERS {
            self.spare.push(packet);
        }
    }

    /// The last TCP segment that was sent since this was asked.
    pub(super) fn take_sent(&mut self) -> Option<Sent> {
        self.sent.take()
    }

    fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(len, 0);
        buffer
    }
}

/// The packet being received.
pub(super) struct Receive<'a>(&'a [u8]);

impl RxToken for Receive<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one packet. Replies to a received packet are not held to the limit: there is at most one each.
pub(super) struct Transmit<'a>(&'a mut Outgoing);

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut buffer = self.0.buffer(len);
        let result = f(&mut buffer);
        self.0.sent = packet::sent(&buffer).or(self.0.sent);
        self.0.push(buffer);
        result
    }
}

impl Device for Phy {
    type RxToken<'a> = Receive<'a>;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Receive<'_>, Transmit<'_>)> {
        let packet = self.incoming.as_deref()?;
        Some((Receive(packet), Transmit(&mut self.out)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Transmit<'_>> {
        self.has_room().then_some(Transmit(&mut self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}
