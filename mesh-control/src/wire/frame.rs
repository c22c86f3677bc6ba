//! The frames of a map stream: a little-endian length, then one message, perhaps a zstd frame.
//!
//! | offset | size | content |
//! |---|---|---|
//! | 0 | 4 | length of the payload in bytes, little-endian |
//! | 4 | n | JSON, or JSON as one complete zstd frame |

use std::io::Read;

use super::{MapResponse, WireError};

/// The longest payload a reader takes by default, before and after decompression: 128 MiB, room for a netmap of some
/// fifty thousand nodes.
pub const DEFAULT_LIMIT: usize = 128 << 20;

/// How the payloads of a stream are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Plain JSON.
    #[default]
    None,
    /// Each payload is one whole zstd frame (RFC 8878) with its content size; none refers to an earlier one.
    Zstd,
}

impl Compression {
    /// What `MapRequest.Compress` asks for: `"zstd"`, or anything else for plain JSON.
    #[must_use]
    pub fn asked(compress: &str) -> Self {
        if compress == "zstd" { Self::Zstd } else { Self::None }
    }

    /// The text that asks for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Zstd => "zstd",
        }
    }
}

/// Packs one encoded message as a frame.
///
/// # Errors
/// [`WireError::TooLong`] if it does not fit a 32-bit length, [`WireError::Zstd`] if the compressor fails.
pub fn pack(json: &[u8], compression: Compression) -> Result<Vec<u8>, WireError> {
    let compressed;
    let payload = match compression {
        Compression::None => json,
        Compression::Zstd => {
            compressed = zstd::bulk::compress(json, zstd::DEFAULT_COMPRESSION_LEVEL).map_err(|_| WireError::Zstd)?;
            &compressed
        }
    };
    let length = u32::try_from(payload.len())
        .map_err(|_| WireError::TooLong { length: payload.len(), limit: u32::MAX as usize })?;
    let mut frame = Vec::with_capacity(4 + payload.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Cuts a stream of bytes into messages, however it arrives.
#[derive(Debug)]
pub struct FrameReader {
    buffer: Vec<u8>,
    read: usize,
    compression: Compression,
    limit: usize,
}

impl FrameReader {
    /// A reader for a stream packed as `compression` says, with [`DEFAULT_LIMIT`].
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        Self { buffer: Vec::new(), read: 0, compression, limit: DEFAULT_LIMIT }
    }

    /// The same with another limit, in bytes of payload before and after decompression.
    #[must_use]
    pub fn with_limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Takes what arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.read > 0 {
            self.buffer.drain(..self.read);
            self.read = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole payload as JSON, or `None` until more arrives.
    ///
    /// # Errors
    /// [`WireError::TooLong`] and [`WireError::Zstd`]; the stream cannot be read further after either.
    pub fn next_json(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        let Some((length, rest)) = self.buffer[self.read..].split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > self.limit {
            return Err(WireError::TooLong { length, limit: self.limit });
        }
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let json = match self.compression {
            Compression::None => payload.to_vec(),
            Compression::Zstd => unpack(payload, self.limit)?,
        };
        self.read += 4 + length;
        Ok(Some(json))
    }

    /// The next whole message, or `None` until more arrives.
    ///
    /// # Errors
    /// As [`next_json`](Self::next_json), and [`WireError::Json`], after which the next message can still be read.
    pub fn next_message(&mut self) -> Result<Option<MapResponse>, WireError> {
        self.next_json()?.map(|json| super::decode(&json)).transpose()
    }
}

fn unpack(payload: &[u8], limit: usize) -> Result<Vec<u8>, WireError> {
    let mut json = Vec::new();
    let cap = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    zstd::stream::read::Decoder::with_buffer(payload)
        .and_then(|decoder| decoder.single_frame().take(cap).read_to_end(&mut json))
        .map_err(|_| WireError::Zstd)?;
    if json.len() > limit {
        return Err(WireError::TooLong { length: json.len(), limit });
    }
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_keep_alive_frame_is_the_documented_one() {
        let frame = pack(&super::super::encode(&MapResponse::keep_alive()), Compression::None).unwrap();
        assert_eq!(hex::encode(frame), "120000007b224b656570416c697665223a747275657d");
    }

    #[test]
    fn a_zstd_bomb_stops_at_the_limit() {
        let frame = pack(&vec![b' '; 1 << 20], Compression::Zstd).unwrap();
        let mut reader = FrameReader::new(Compression::Zstd).with_limit(1000);
        reader.push(&frame);
        assert!(matches!(reader.next_json(), Err(WireError::TooLong { limit: 1000, .. })));
    }

    #[test]
    fn plain_json_where_zstd_was_asked_for_is_an_error() {
        let mut reader = FrameReader::new(Compression::Zstd);
        reader.push(&pack(b"{}", Compression::None).unwrap());
        assert_eq!(reader.next_json(), Err(WireError::Zstd));
    }

    proptest! {
        #[test]
        fn messages_survive_any_chunking(
            texts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..6),
            cuts in prop::collection::vec(1_usize..50, 1..40),
            zstd in any::<bool>(),
        ) {
            let compression = if zstd { Compression::Zstd } else { Compression::None };
            let stream: Vec<u8> = texts.iter().flat_map(|text| pack(text, compression).unwrap()).collect();
            let mut reader = FrameReader::new(compression);
            let (mut rest, mut out) = (&stream[..], Vec::new());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                rest = later;
                reader.push(now);
                while let Some(json) = reader.next_json().unwrap() { out.push(json); }
            }
            prop_assert_eq!(out, texts);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), zstd in any::<bool>()) {
            let compression = if zstd { Compression::Zstd } else { Compression::None };
            let mut reader = FrameReader::new(compression);
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_message() {}
        }
    }
}
