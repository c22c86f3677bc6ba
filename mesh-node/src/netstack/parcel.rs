//! Packets on their way out. TCP hands over super-packets, which are cut where they are copied anyway: into the data
//! plane's batch.
//!
//! smoltcp leaves TCP's checksums to us (its segmentation offload asks for that), so they are written here, while the
//! bytes are in the cache. Buffers go round: stack, outbox, reader, and back to the stack.

use mesh_tun::offload::{Header, Kind, Segments};
use mesh_tun::packet::checksum::pseudo_header;
use mesh_tun::packet::{self, Protocol};

/// The longest super-packet.
pub(super) const LONGEST: usize = mesh_tun::offload::MAX_PACKET;
/// Where TCP has its checksum.
const TCP_CHECKSUM: u16 = 16;
/// Buffers of each size kept for the next packets: 1 MiB of long ones, and what acknowledgements need.
const SPARE: (usize, usize) = (256, 16);

/// A packet, or a TCP super-packet to be cut into several.
#[derive(Debug)]
pub(super) struct Parcel {
    buffer: Vec<u8>,
    len: usize,
    /// Payload bytes of each packet it is cut into; 0 leaves it whole.
    segment: u16,
}

impl Parcel {
    /// The first `len` bytes of `buffer`, to be cut into segments with `segment` bytes of payload; 0 leaves it whole.
    pub(super) fn new(buffer: Vec<u8>, len: usize, segment: u16) -> Self {
        Self { buffer, len, segment }
    }

    /// A packet that is not cut.
    pub(super) fn whole(packet: Vec<u8>) -> Self {
        Self { len: packet.len(), buffer: packet, segment: 0 }
    }

    /// The packet or super-packet.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// How many packets it is cut into, about: headers count as payload.
    pub(super) fn count(&self) -> usize {
        match self.segment {
            0 => 1,
            segment => self.len.div_ceil(usize::from(segment)),
        }
    }

    /// The buffer, for another packet.
    pub(super) fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    /// Prepares cutting.
    pub(super) fn cut(mut self) -> Cutting {
        let header = self.header();
        // What smoltcp has built fits its own headers; anything else is left as it is.
        let segments =
            Segments::new(header, self.bytes()).or_else(|_| Segments::new(Header::SINGLE, self.bytes())).ok();
        Cutting { parcel: self, segments }
    }

    /// The virtio header that says what is left to do.
    fn header(&mut self) -> Header {
        let bytes = self.buffer.get_mut(..self.len).unwrap_or_default();
        let (kind, start, protocol) = match bytes {
            [first, ..] if *first >> 4 == 4 && bytes.len() >= 40 => (Kind::Tcp4, 20_u16, bytes[9]),
            [first, ..] if *first >> 4 == 6 && bytes.len() >= 60 => (Kind::Tcp6, 40, bytes[6]),
            _ => return Header::SINGLE,
        };
        if protocol != Protocol::TCP.0 {
            return Header::SINGLE;
        }
        // A checksum to be completed begins with the sum over the pseudo header.
        if let (Some(from), Some(to)) = (packet::source(bytes), packet::destination(bytes)) {
            let transport = &mut bytes[usize::from(start)..];
            let sum = pseudo_header(from, to, Protocol::TCP, transport.len()).finish();
            transport[usize::from(TCP_CHECKSUM)..][..2].copy_from_slice(&(!sum).to_be_bytes());
        }
        Header {
            kind: if self.segment == 0 { Kind::Single } else { kind },
            needs_checksum: true,
            header_len: 0,
            segment_size: self.segment,
            checksum_start: start,
            checksum_offset: TCP_CHECKSUM,
        }
    }
}

/// A parcel and how much of it has been cut off.
#[derive(Debug)]
pub(super) struct Cutting {
    parcel: Parcel,
    segments: Option<Segments>,
}

impl Cutting {
    /// Packets that are left.
    pub(super) fn remaining(&self) -> usize {
        self.segments.map_or(0, |segments| segments.remaining())
    }

    /// Writes the next packet to the beginning of `out` and returns its length; `None` when there is none left, or no
    /// room for it.
    pub(super) fn write_next(&mut self, out: &mut [u8]) -> Option<usize> {
        self.segments.as_mut()?.write_next(self.parcel.bytes(), out)?.ok()
    }

    /// The buffer, for another packet.
    pub(super) fn into_buffer(self) -> Vec<u8> {
        self.parcel.buffer
    }
}

/// Buffers that wait to be used again. Each is as long as the packets it is for, so that none is cleared first.
#[derive(Debug, Default)]
pub(super) struct Spare {
    short: Vec<Vec<u8>>,
    long: Vec<Vec<u8>>,
}

impl Spare {
    /// A buffer of at least `len` bytes, of unspecified content; those of up to `mtu` bytes are short.
    pub(super) fn take(&mut self, len: usize, mtu: usize) -> Vec<u8> {
        let (spare, size) = if len <= mtu { (&mut self.short, mtu) } else { (&mut self.long, LONGEST) };
        spare.pop().unwrap_or_else(|| vec![0; size.max(len)])
    }

    /// Keeps a buffer, unless there are enough.
    pub(super) fn put(&mut self, buffer: Vec<u8>, mtu: usize) {
        let (spare, most) = match buffer.len() {
            LONGEST => (&mut self.long, SPARE.1),
            len if len == mtu => (&mut self.short, SPARE.0),
            _ => return,
        };
        if spare.len() < most {
            spare.push(buffer);
        }
    }
}
