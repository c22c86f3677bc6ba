//! What waits to be forwarded to another relay of the region.

use std::collections::VecDeque;

use bytes::{Buf as _, BytesMut};
use mesh_noise::key::NodePublic;

use crate::frame::Frame;
use crate::queue::Lane;

#[derive(Debug, Default)]
struct Line {
    /// Whole frames, as they will be written.
    bytes: BytesMut,
    lengths: VecDeque<usize>,
}

impl Line {
    fn push(&mut self, frame: &Frame, limit: usize) -> u64 {
        let before = self.bytes.len();
        frame.encode(&mut self.bytes);
        self.lengths.push_back(self.bytes.len() - before);
        let mut dropped = 0;
        while self.bytes.len() > limit
            && self.lengths.len() > 1
            && let Some(oldest) = self.lengths.pop_front()
        {
            self.bytes.advance(oldest);
            dropped += 1;
        }
        dropped
    }

    fn take(&mut self, out: &mut BytesMut, until: usize) -> u64 {
        let (mut frames, mut length) = (0, 0);
        while out.len() + length < until
            && let Some(oldest) = self.lengths.pop_front()
        {
            length += oldest;
            frames += 1;
        }
        out.extend_from_slice(&self.bytes[..length]);
        self.bytes.advance(length);
        if self.lengths.is_empty() {
            // An idle link keeps no memory.
            self.bytes = BytesMut::new();
        }
        frames
    }
}

/// ForwardPacket frames that wait for a link, disco before data. When a lane is full its oldest frames go.
///
/// They are encoded as they are put in: a copy of each packet, and in return no sender's read buffer is held while a
/// link stalls, and a batch is written as it stands. Senders are not kept apart here as they are in a
/// [`PacketQueue`](crate::queue::PacketQueue): what makes a receiver slow is its own line, and that queue is at the relay
/// it is connected to.
#[derive(Debug)]
pub struct Backlog {
    disco: Line,
    data: Line,
    limit: usize,
}

impl Backlog {
    /// An empty backlog of at most `limit` bytes a lane. One frame always fits.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { disco: Line::default(), data: Line::default(), limit }
    }

    /// Puts a packet in, and says how many older ones went for it.
    pub fn push(&mut self, source: NodePublic, destination: NodePublic, payload: bytes::Bytes) -> u64 {
        let line = match Lane::of(&payload) {
            Lane::Disco => &mut self.disco,
            Lane::Data => &mut self.data,
        };
        line.push(&Frame::ForwardPacket { source, destination, payload }, self.limit)
    }

    /// Moves whole frames to the end of `out` until that has `until` bytes; says how many frames.
    pub fn take(&mut self, out: &mut BytesMut, until: usize) -> u64 {
        self.disco.take(out, until) + self.data.take(out, until)
    }

    /// How many frames wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.disco.lengths.len() + self.data.lengths.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Decoder, HEADER_LEN};
    use bytes::Bytes;
    use proptest::prelude::*;

    const ZERO: NodePublic = NodePublic::ZERO;

    /// What a packet of that length takes up.
    const fn forwarded_len(packet: usize) -> usize {
        HEADER_LEN + 64 + packet
    }

    fn disco() -> Bytes {
        let mut packet = b"TS\xF0\x9F\x92\xAC".to_vec();
        packet.resize(62, 1);
        packet.into()
    }

    fn payloads(bytes: &[u8]) -> Vec<Bytes> {
        let mut decoder = Decoder::new();
        decoder.extend(bytes);
        let frames = std::iter::from_fn(|| decoder.next_frame().unwrap());
        frames.map(|frame| if let Frame::ForwardPacket { payload, .. } = frame { payload } else { panic!() }).collect()
    }

    #[test]
    fn disco_goes_first_and_is_not_displaced_by_data() {
        let mut backlog = Backlog::new(4 * forwarded_len(100));
        assert_eq!(backlog.push(ZERO, ZERO, disco()), 0);
        let dropped: u64 = (0..10).map(|n| backlog.push(ZERO, ZERO, vec![n; 100].into())).sum();
        assert_eq!((dropped, backlog.len()), (6, 5));
        let mut out = BytesMut::new();
        assert_eq!(backlog.take(&mut out, usize::MAX), 5);
        let expected: Vec<Bytes> = std::iter::once(disco()).chain((6..10).map(|n| vec![n; 100].into())).collect();
        assert_eq!(payloads(&out), expected);
    }

    #[test]
    fn a_packet_longer_than_the_limit_passes_alone() {
        let mut backlog = Backlog::new(10);
        assert_eq!(backlog.push(ZERO, ZERO, vec![1; 5000].into()), 0);
        assert_eq!(backlog.push(ZERO, ZERO, vec![2; 5000].into()), 1);
        let mut out = BytesMut::new();
        backlog.take(&mut out, 1);
        assert_eq!(payloads(&out), [Bytes::from(vec![2; 5000])]);
    }

    proptest! {
        #[test]
        fn what_comes_out_went_in_in_order_and_the_rest_is_counted(
            steps in proptest::collection::vec((0usize..300, any::<bool>(), 0usize..1000), 0..60),
        ) {
            let mut backlog = Backlog::new(800);
            let (mut pushed, mut dropped, mut seen) = (0u64, 0, Vec::new());
            for (length, take, until) in steps {
                let mut payload = vec![7; length + 8];
                payload[..8].copy_from_slice(&pushed.to_be_bytes());
                pushed += 1;
                dropped += backlog.push(ZERO, ZERO, payload.into());
                prop_assert!(backlog.data.bytes.len() <= 800 || backlog.len() == 1);
                if take {
                    let mut out = BytesMut::new();
                    let frames = backlog.take(&mut out, until);
                    let payloads = payloads(&out);
                    prop_assert_eq!(payloads.len() as u64, frames);
                    seen.extend(payloads.iter().map(|p| u64::from_be_bytes(*p.first_chunk().unwrap())));
                }
            }
            prop_assert!(seen.is_sorted());
            prop_assert_eq!(pushed, seen.len() as u64 + dropped + backlog.len() as u64);
        }
    }
}
