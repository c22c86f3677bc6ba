//! The device smoltcp sees: one packet in at a time, a bounded queue out.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::num::NonZeroUsize;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{IPV4_HEADER_LEN, TCP_HEADER_LEN};

use super::packet::{self, Sent};
use super::parcel::{LONGEST, Parcel, Spare};

/// Packets that smoltcp has made, and what it may make of them.
#[derive(Debug)]
pub(super) struct Phy {
    mtu: usize,
    /// Parcels for the mesh, oldest first, and how many packets they are.
    parcels: VecDeque<Parcel>,
    packets: usize,
    /// Parcels for ourselves, oldest first.
    looped: VecDeque<Parcel>,
    /// Our own addresses.
    own: Vec<IpAddr>,
    /// How many packets may wait in `parcels`.
    limit: usize,
    spare: Spare,
    /// The largest window to offer, unscaled.
    window: Option<u16>,
    /// The last TCP segment that was sent.
    sent: Option<Sent>,
}

impl Phy {
    pub(super) fn new(mtu: usize, limit: usize) -> Self {
        Self {
            mtu,
            parcels: VecDeque::new(),
            packets: 0,
            looped: VecDeque::new(),
            own: Vec::new(),
            limit,
            spare: Spare::default(),
            window: None,
            sent: None,
        }
    }

    pub(super) fn mtu(&self) -> usize {
        self.mtu
    }

    /// What smoltcp works with, with `packet` as the one that has arrived.
    pub(super) fn port<'a>(&'a mut self, packet: Option<&'a [u8]>) -> Port<'a> {
        Port { phy: self, packet }
    }

    /// Whether a socket may send another packet now.
    pub(super) fn has_room(&self) -> bool {
        self.packets < self.limit && self.looped.len() < self.limit.max(64)
    }

    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Offers at most this window from now on, unscaled.
    pub(super) fn set_window(&mut self, most: Option<u16>) {
        self.window = most;
    }

    pub(super) fn set_own(&mut self, own: Vec<IpAddr>) {
        self.own = own;
    }

    /// Queues a packet, to the mesh or back to ourselves.
    pub(super) fn push(&mut self, parcel: Parcel) {
        if packet::destination(parcel.bytes()).is_some_and(|address| self.own.contains(&address)) {
            self.looped.push_back(parcel);
        } else {
            self.packets += parcel.count();
            self.parcels.push_back(parcel);
        }
    }

    /// Queues the newest packet again, if it is for the mesh.
    pub(super) fn repeat(&mut self) {
        let Some(last) = self.parcels.back() else { return };
        let len = last.bytes().len();
        let mut buffer = self.spare.take(len, self.mtu);
        buffer[..len].copy_from_slice(last.bytes());
        self.push(Parcel::new(buffer, len, 0));
    }

    pub(super) fn pop(&mut self) -> Option<Parcel> {
        let parcel = self.parcels.pop_front()?;
        self.packets -= parcel.count();
        Some(parcel)
    }

    pub(super) fn pop_looped(&mut self) -> Option<Parcel> {
        self.looped.pop_front()
    }

    /// Keeps a buffer for another packet.
    pub(super) fn recycle(&mut self, buffer: Vec<u8>) {
        self.spare.put(buffer, self.mtu);
    }

    /// The last TCP segment that was sent since this was asked.
    pub(super) fn take_sent(&mut self) -> Option<Sent> {
        self.sent.take()
    }
}

/// The two directions as smoltcp sees them.
pub(super) struct Port<'p> {
    phy: &'p mut Phy,
    packet: Option<&'p [u8]>,
}

/// The packet being received.
pub(super) struct Receive<'a>(&'a [u8]);

impl RxToken for Receive<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one packet. Replies to a received packet are not held to the limit: there is at most one each.
pub(super) struct Transmit<'a> {
    phy: &'a mut Phy,
    segment: u16,
}

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut buffer = self.phy.spare.take(len, self.phy.mtu);
        let packet = &mut buffer[..len];
        let result = f(packet);
        if let Some(most) = self.phy.window {
            packet::limit_window(packet, most);
        }
        self.phy.sent = packet::sent(packet).or(self.phy.sent);
        self.phy.push(Parcel::new(buffer, len, self.segment));
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map_or(0, Into::into);
    }
}

impl Device for Port<'_> {
    type RxToken<'a>
        = Receive<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Transmit<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(Receive<'_>, Transmit<'_>)> {
        Some((Receive(self.packet.take()?), Transmit { phy: self.phy, segment: 0 }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Transmit<'_>> {
        self.phy.has_room().then_some(Transmit { phy: self.phy, segment: 0 })
    }

    /// TCP over IPv4 is cut by [`Parcel`]; smoltcp 0.14 drops an IPv6 packet above the MTU even where that is offered.
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.phy.mtu;
        // Written when a parcel is cut, checked before a segment comes here.
        capabilities.checksum.tcp = Checksum::None;
        let headers = IPV4_HEADER_LEN + TCP_HEADER_LEN;
        // Whole packets only, where the peer's segments are as long as ours.
        let payload = self.phy.mtu.saturating_sub(headers).max(1);
        capabilities.segmentation.tcpv4 = NonZeroUsize::new(headers + (LONGEST - headers) / payload * payload);
        capabilities
    }
}
