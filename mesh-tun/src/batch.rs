//! Packets in one preallocated block of memory, with room around each for the headers that the next layer adds.
//!
//! ```text
//! slot:  | HEADROOM (32)          | packet (packet_size)            | TAILROOM (32)      |
//!          ▲ 8  encapsulation       ▲ read here                       ▲ 15 padding + 16 tag
//!          ▲ 16 transport header
//!          ▲ 10 virtio-net header
//! ```
//!
//! A packet is read once and then worked on where it lies: sealing grows it towards both ends, opening narrows it, and a
//! batch of either kind goes to the system in one call. Slots (memory) and packets (ranges) are separate, so that one
//! large slot can later hold many packets: that is how segmentation offloads fill a batch.

use std::ops::Range;

/// Bytes that every slot keeps free before its packet: 16 (WireGuard transport header) + 8 (further encapsulation) + 8
/// spare. A virtio-net header (10 bytes) takes the same room in the other direction.
pub const HEADROOM: usize = 32;

/// Bytes that every slot keeps free behind its packet: 15 of padding and 16 of authentication tag, rounded up.
pub const TAILROOM: usize = 32;

/// Packets, each in its own slot of one block; nothing is allocated after [`Batch::new`].
#[derive(Debug)]
pub struct Batch {
    storage: Box<[u8]>,
    stride: usize,
    used: usize,
    packets: Vec<Span>,
}

/// Where one packet lies, and how far its slot reaches.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: usize,
    end: usize,
    floor: usize,
    limit: usize,
}

impl Batch {
    /// A batch of `capacity` slots for packets of up to `packet_size` bytes.
    #[must_use]
    pub fn new(capacity: usize, packet_size: usize) -> Self {
        Self::with_slots(capacity, packet_size, 1)
    }

    /// A batch of `slots` slots of `slot_size` bytes, each of which may hold up to `packets` packets.
    pub(crate) fn with_slots(slots: usize, slot_size: usize, packets: usize) -> Self {
        let stride = (HEADROOM + slot_size + TAILROOM).next_multiple_of(64);
        let packets = Vec::with_capacity(slots * packets);
        Self { storage: vec![0; stride * slots].into(), stride, used: 0, packets }
    }

    /// How many slots there are.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.storage.len() / self.stride
    }

    /// How many packets are in it, dropped ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether no packet is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Whether no slot is left.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.used == self.capacity()
    }

    /// The longest packet a slot takes.
    #[must_use]
    pub fn packet_size(&self) -> usize {
        self.stride - HEADROOM - TAILROOM
    }

    /// Forgets all packets; the memory stays.
    pub fn clear(&mut self) {
        self.used = 0;
        self.packets.clear();
    }

    /// Copies a packet into the next slot; false, and nothing changed, if there is no slot or the packet is too long.
    pub fn push(&mut self, packet: &[u8]) -> bool {
        let Some(mut vacant) = self.vacant() else { return false };
        let Some(room) = vacant.buffer().get_mut(..packet.len()) else { return false };
        room.copy_from_slice(packet);
        vacant.commit(packet.len());
        true
    }

    /// The next free slot, to be read into; none when full.
    pub fn vacant(&mut self) -> Option<Vacant<'_>> {
        if self.is_full() { None } else { Some(Vacant { batch: self }) }
    }

    /// The packet at `index`; empty if it was dropped.
    ///
    /// # Panics
    /// If `index` is not below [`Batch::len`].
    #[must_use]
    pub fn packet(&self, index: usize) -> &[u8] {
        let span = self.packets[index];
        &self.storage[span.start..span.end]
    }

    /// The packet at `index`, to be changed in place; empty if it was dropped.
    ///
    /// # Panics
    /// If `index` is not below [`Batch::len`].
    pub fn packet_mut(&mut self, index: usize) -> &mut [u8] {
        let span = self.packets[index];
        &mut self.storage[span.start..span.end]
    }

    /// All packets in order; a dropped one is an empty slice.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.packets.iter().map(|span| &self.storage[span.start..span.end])
    }

    /// The packet at `index` with `headroom` bytes before it and all the room behind it, for sealing in place.
    ///
    /// # Panics
    /// If `index` is not below [`Batch::len`], or the slot has less than `headroom` bytes before the packet.
    pub fn with_room(&mut self, index: usize, headroom: usize) -> &mut [u8] {
        let span = self.packets[index];
        assert!(span.start - span.floor >= headroom, "the slot has less headroom than asked for");
        &mut self.storage[span.start - headroom..span.limit]
    }

    /// Moves the ends of the packet at `index`: it now begins `before` bytes earlier and is `len` bytes long.
    ///
    /// # Panics
    /// If `index` is not below [`Batch::len`], or the packet would leave its slot.
    pub fn grow(&mut self, index: usize, before: usize, len: usize) {
        let span = &mut self.packets[index];
        assert!(span.start - span.floor >= before, "the slot has less headroom than asked for");
        let start = span.start - before;
        assert!(len <= span.limit - start, "the slot has less room than asked for");
        (span.start, span.end) = (start, start + len);
    }

    /// Keeps only `range` of the packet at `index`, counted from its first byte.
    ///
    /// # Panics
    /// If `index` is not below [`Batch::len`], or `range` is not inside the packet.
    pub fn narrow(&mut self, index: usize, range: Range<usize>) {
        let span = &mut self.packets[index];
        assert!(range.start <= range.end && range.end <= span.end - span.start, "the range leaves the packet");
        (span.start, span.end) = (span.start + range.start, span.start + range.end);
    }

    /// Drops the packet at `index`: it stays as an empty one, and devices pass it over.
    ///
    /// # Panics
    /// If `index` is not below [`Batch::len`].
    pub fn discard(&mut self, index: usize) {
        let span = &mut self.packets[index];
        span.end = span.start;
    }

    /// The memory of the packet at `index` in [`Batch::storage`].
    #[cfg(target_os = "linux")]
    pub(crate) fn range(&self, index: usize) -> Range<usize> {
        let span = self.packets[index];
        span.start..span.end
    }

    /// The whole block.
    #[cfg(target_os = "linux")]
    pub(crate) fn storage(&self) -> &[u8] {
        &self.storage
    }

    /// The packet areas of the free slots, for reading many packets in one call. Follow with [`Batch::commit`].
    #[cfg(target_os = "linux")]
    pub(crate) fn vacancies(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let (stride, used) = (self.stride, self.used);
        self.storage.chunks_exact_mut(stride).skip(used).map(move |slot| &mut slot[HEADROOM..stride - TAILROOM])
    }

    /// Takes the next slot as holding a packet of `len` bytes.
    pub(crate) fn commit(&mut self, len: usize) {
        assert!(!self.is_full() && len <= self.packet_size(), "the packet is longer than its slot");
        let floor = self.used * self.stride;
        let start = floor + HEADROOM;
        self.used += 1;
        self.packets.push(Span { start, end: start + len, floor, limit: floor + self.stride });
    }

    /// Takes the next slot as holding packets of `segment` bytes, one behind another without room between them, the last
    /// maybe shorter: `len` bytes in all.
    #[cfg(target_os = "linux")]
    pub(crate) fn commit_many(&mut self, len: usize, segment: usize) {
        assert!(!self.is_full() && len <= self.packet_size(), "the packets are longer than their slot");
        assert_ne!(segment, 0, "a packet has a length");
        let start = self.used * self.stride + HEADROOM;
        self.used += 1;
        self.packets.extend((start..start + len).step_by(segment).map(|at| {
            let end = (at + segment).min(start + len);
            Span { start: at, end, floor: at, limit: end }
        }));
    }
}

/// A free slot of a [`Batch`].
#[derive(Debug)]
pub struct Vacant<'a> {
    batch: &'a mut Batch,
}

impl Vacant<'_> {
    /// Where to put the packet: [`Batch::packet_size`] bytes of unspecified content.
    pub fn buffer(&mut self) -> &mut [u8] {
        let start = self.batch.used * self.batch.stride + HEADROOM;
        let len = self.batch.packet_size();
        &mut self.batch.storage[start..start + len]
    }

    /// Adds the first `len` bytes of the buffer to the batch as a packet.
    ///
    /// # Panics
    /// If `len` is above [`Batch::packet_size`].
    pub fn commit(self, len: usize) {
        self.batch.commit(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_come_back_in_order() {
        let mut batch = Batch::new(3, 100);
        assert!(batch.push(b"one") && batch.push(b"two"));
        assert_eq!(batch.iter().collect::<Vec<_>>(), [b"one", b"two"]);
        assert_eq!((batch.len(), batch.capacity(), batch.is_full()), (2, 3, false));
    }

    #[test]
    fn a_full_batch_and_a_long_packet_are_refused() {
        let mut batch = Batch::new(1, 10);
        assert!(!batch.push(&vec![1; batch.packet_size() + 1]));
        assert!(batch.push(&[1; 10]));
        assert!(!batch.push(&[1]));
        assert!(batch.vacant().is_none());
    }

    #[test]
    fn sealing_grows_a_packet_towards_both_ends() {
        let mut batch = Batch::new(2, 64);
        assert!(batch.push(&[7; 64]) && batch.push(&[9; 64]));
        let room = batch.with_room(0, 16);
        assert!(room.len() >= 16 + 64 + TAILROOM);
        room[..16].fill(1);
        room[80..96].fill(2);
        batch.grow(0, 16, 96);
        assert_eq!(batch.packet(0), [[1; 16].as_slice(), &[7; 64], &[2; 16]].concat());
        assert_eq!(batch.packet(1), [9; 64], "the neighbour is untouched");
    }

    #[test]
    fn opening_narrows_a_packet_and_discarding_empties_it() {
        let mut batch = Batch::new(2, 64);
        assert!(batch.push(b"headpayloadtag") && batch.push(b"other"));
        batch.narrow(0, 4..11);
        batch.discard(1);
        assert_eq!(batch.iter().collect::<Vec<_>>(), [b"payload".as_slice(), b""]);
        batch.clear();
        assert!(batch.is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn one_slot_may_hold_many_packets() {
        let mut batch = Batch::with_slots(2, 64, 8);
        batch.vacancies().next().unwrap()[..7].copy_from_slice(b"aabbccd");
        batch.commit_many(7, 2);
        assert!(batch.push(b"next"));
        assert_eq!(batch.iter().collect::<Vec<_>>(), [b"aa".as_slice(), b"bb", b"cc", b"d", b"next"]);
        batch.narrow(1, 1..2);
        batch.discard(2);
        assert_eq!(batch.iter().collect::<Vec<_>>(), [b"aa".as_slice(), b"b", b"", b"d", b"next"]);
        assert!(batch.is_full());
    }

    #[test]
    #[should_panic(expected = "headroom")]
    fn headroom_ends_with_the_slot() {
        let mut batch = Batch::new(2, 64);
        assert!(batch.push(&[1]) && batch.push(&[2]));
        let _ = batch.with_room(1, HEADROOM + 1);
    }
}
