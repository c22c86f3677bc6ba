//! Cutting a byte stream into frames.

use bytes::{Buf, BytesMut};

use super::{Frame, FrameError, HEADER_LEN, Kind, MAX_UNKNOWN_LEN};

/// Cuts a byte stream, arriving in any pieces, into frames.
///
/// Bytes go in through [`Decoder::buffer`] or [`Decoder::extend`], frames come out of [`Decoder::next_frame`]. A header
/// that announces more than its kind allows is refused before the body is waited for, so what is held never exceeds one
/// frame and one read. Packets are handed out as slices of the buffer, without a copy.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    /// Bytes of an unknown frame still to be thrown away.
    skip: usize,
    skipped: u64,
    failed: Option<FrameError>,
}

impl Decoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Where a reader appends what it has read.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Appends bytes that were read elsewhere.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// How many frames of unknown kinds have been thrown away.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The next whole frame, `None` if more bytes are needed.
    ///
    /// # Errors
    /// If the stream broke the rules. From then on the same error is returned: there is no way to find the next frame.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let result = self.cut();
        self.failed = result.as_ref().err().copied();
        result
    }

    fn cut(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if self.skip > 0 {
                let now = self.skip.min(self.buffer.len());
                self.buffer.advance(now);
                self.skip -= now;
                if self.skip > 0 {
                    return Ok(None);
                }
            }
            let Some((header, _)) = self.buffer.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
            let [byte, length @ ..] = *header;
            let length = u32::from_be_bytes(length) as usize;
            let Some(kind) = Kind::from_byte(byte) else {
                if length > MAX_UNKNOWN_LEN {
                    return Err(FrameError::UnknownTooLong { kind: byte, length });
                }
                self.skip = HEADER_LEN + length;
                self.skipped += 1;
                continue;
            };
            let (min, max) = kind.body_len();
            if length < min || length > max {
                return Err(FrameError::Length { kind, length, min, max });
            }
            if self.buffer.len() < HEADER_LEN + length {
                return Ok(None);
            }
            self.buffer.advance(HEADER_LEN);
            return Frame::decode(kind, self.buffer.split_to(length).freeze()).map(Some);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::any_frame;
    use super::*;
    use proptest::prelude::*;

    fn drain(decoder: &mut Decoder) -> (Vec<Frame>, Option<FrameError>) {
        let mut frames = Vec::new();
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => return (frames, None),
                Err(error) => return (frames, Some(error)),
            }
        }
    }

    fn in_pieces(bytes: &[u8], cuts: &[usize]) -> (Vec<Frame>, Option<FrameError>) {
        let (mut decoder, mut frames, mut rest) = (Decoder::new(), Vec::new(), bytes);
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(1 + cuts.next().copied().unwrap_or(0)));
            decoder.extend(piece);
            let (found, error) = drain(&mut decoder);
            frames.extend(found);
            if error.is_some() {
                return (frames, error);
            }
            rest = after;
        }
        (frames, None)
    }

    proptest! {
        #[test]
        fn pieces_read_as_the_whole(frames in proptest::collection::vec(any_frame(), 0..8),
                                    cuts in proptest::collection::vec(0usize..90, 1..10)) {
            let mut bytes = BytesMut::new();
            for frame in &frames {
                frame.encode(&mut bytes);
            }
            prop_assert_eq!(in_pieces(&bytes, &cuts), (frames, None));
        }

        #[test]
        fn any_bytes_read_the_same_in_pieces(bytes in proptest::collection::vec(any::<u8>(), 0..400),
                                             cuts in proptest::collection::vec(0usize..20, 1..6)) {
            prop_assert_eq!(in_pieces(&bytes, &[bytes.len()]), in_pieces(&bytes, &cuts));
        }
    }

    #[test]
    fn unknown_frames_are_skipped_without_being_held() {
        let mut decoder = Decoder::new();
        decoder.extend(&[0x7f, 0, 0x10, 0, 0]);
        for _ in 0..1024 {
            decoder.extend(&[0; 1024]);
            assert_eq!(decoder.next_frame(), Ok(None));
            assert!(decoder.buffer().is_empty());
        }
        decoder.extend(&Frame::KeepAlive.to_bytes());
        assert_eq!(decoder.next_frame(), Ok(Some(Frame::KeepAlive)));
        assert_eq!(decoder.skipped(), 1);
    }

    #[test]
    fn a_broken_stream_stays_broken() {
        let mut decoder = Decoder::new();
        decoder.extend(&[0x04, 0xff, 0, 0, 0]);
        let error = decoder.next_frame().unwrap_err();
        assert_eq!(error, FrameError::Length { kind: Kind::SendPacket, length: 0xff00_0000, min: 32, max: 65_568 });
        decoder.extend(&Frame::KeepAlive.to_bytes());
        assert_eq!(decoder.next_frame(), Err(error));
        let mut decoder = Decoder::new();
        decoder.extend(&[0x7f, 0, 0x10, 0, 1]);
        assert_eq!(decoder.next_frame(), Err(FrameError::UnknownTooLong { kind: 0x7f, length: 0x10_0001 }));
    }
}
