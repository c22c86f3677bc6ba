//! The ts2021 channel: Noise IK inside an upgraded HTTP connection, without I/O.
//!
//! From the outside in: TCP, perhaps TLS, an HTTP/1.1 upgrade, Noise records, perhaps an early payload, HTTP/2.
//!
//! 1. The client POSTs to `/ts2021` with `Upgrade: tailscale-control-protocol` and its handshake initiation as standard
//!    base64 in `X-Tailscale-Handshake`. [`ClientChannel::start`] makes the initiation, [`initiation_from_header`] reads it.
//! 2. The server answers `101 Switching Protocols` and then sends its response: [`ServerChannel::accept`] makes it,
//!    [`ClientChannel::receive`] takes it.
//! 3. From here on both sides exchange [`Records`]: a byte stream cut into sealed pieces.
//! 4. The server's first bytes may be an early payload, which the client's [`Records`] take out of the stream.
//!
//! The [handshake messages](mesh_noise::noise::ik) are followed by (integers big-endian):
//!
//! | message | offset | size | content |
//! |---|---|---|---|
//! | record | 0 | 1 | type, 4 |
//! | | 1 | 2 | length of the ciphertext, at most 4093 |
//! | | 3 | n | ciphertext and tag (16 bytes) |
//! | error, instead of the response | 0 | 1 | type, 3 |
//! | | 1 | 2 | length of the text |
//! | | 3 | n | UTF-8, authenticated by nobody: a hint for people |
//! | early payload, plaintext | 0 | 5 | `FF FF FF 54 53`, which cannot begin an HTTP/2 frame |
//! | | 5 | 4 | length of the JSON |
//! | | 9 | n | an [`EarlyNoise`] |
//!
//! Records are opened in order, each direction with its own counter; any failure is final. Record boundaries mean
//! nothing, and an empty record is skipped.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mesh_noise::key::{MachinePrivate, MachinePublic};
use mesh_noise::noise::NoiseError;
use mesh_noise::noise::ik::{Accepted, CipherKey, INITIATION_LEN, Initiator, RESPONSE_LEN, Responder, Split};
use rand_core::CryptoRng;

use crate::version::CapabilityVersion;
use crate::wire::{self, EarlyNoise};

/// The path that is upgraded.
pub const UPGRADE_PATH: &str = "/ts2021";
/// The `Upgrade` token.
pub const UPGRADE_PROTOCOL: &str = "tailscale-control-protocol";
/// The header that carries the initiation.
pub const HANDSHAKE_HEADER: &str = "x-tailscale-handshake";

/// The longest record, header included, in bytes.
pub const MAX_RECORD: usize = 4096;
/// The most plaintext that one record carries, in bytes.
pub const MAX_PLAINTEXT: usize = MAX_RECORD - HEADER_LEN - TAG_LEN;
/// The longest early payload that is read, in bytes. Real ones have about 100; one client refuses more than 1024.
pub const MAX_EARLY: usize = 64 << 10;

const HEADER_LEN: usize = 3;
const TAG_LEN: usize = 16;
const TYPE_RESPONSE: u8 = 2;
const TYPE_ERROR: u8 = 3;
const TYPE_RECORD: u8 = 4;
const EARLY_MAGIC: [u8; 5] = [0xff, 0xff, 0xff, b'T', b'S'];
const EARLY_HEADER: usize = 9;

/// Why a channel ended. Final: a new one has to be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The handshake or a record does not verify.
    #[error("the secure channel failed: {0}")]
    Noise(#[from] NoiseError),
    /// The server said why it refuses. Nobody vouches for the text.
    #[error("the server refused the secure channel, saying (unverified): {0}")]
    Refused(String),
    /// A message of a type that does not belong here.
    #[error("expected a message of type {expected} in the secure channel, got type {got}")]
    Type {
        /// The type that belongs here.
        expected: u8,
        /// The type that came.
        got: u8,
    },
    /// A record's length is impossible.
    #[error("a record of {0} bytes does not fit the secure channel")]
    RecordLength(usize),
    /// The early payload is too long or is not what it should be.
    #[error("the server's early payload cannot be read")]
    Early,
    /// The handshake header is missing or is not base64 of an initiation.
    #[error("the handshake header holds no initiation")]
    Header,
}

/// The initiation as the handshake header carries it.
#[must_use]
pub fn initiation_to_header(initiation: &[u8; INITIATION_LEN]) -> String {
    STANDARD.encode(initiation)
}

/// Reads a handshake header.
///
/// # Errors
/// [`ChannelError::Header`] if it is not standard base64 of 101 bytes.
pub fn initiation_from_header(value: &[u8]) -> Result<[u8; INITIATION_LEN], ChannelError> {
    let bytes = STANDARD.decode(value).map_err(|_| ChannelError::Header)?;
    bytes.try_into().map_err(|_| ChannelError::Header)
}

/// A client that has made its initiation and waits for the response.
#[derive(Debug)]
pub struct ClientChannel {
    /// `None` once the response was taken or refused.
    initiator: Option<Initiator>,
    buffer: Vec<u8>,
}

impl ClientChannel {
    /// Starts a handshake with the server whose key `/key` gave. The array goes into the handshake header.
    ///
    /// # Errors
    /// [`ChannelError::Noise`] if `control` is no proper key.
    pub fn start(
        version: CapabilityVersion,
        machine: &MachinePrivate,
        control: &MachinePublic,
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> Result<(Self, [u8; INITIATION_LEN]), ChannelError> {
        let (initiator, initiation) = Initiator::start(version.0, machine, control, rng)?;
        Ok((Self { initiator: Some(initiator), buffer: Vec::new() }, initiation))
    }

    /// Takes bytes that follow the 101 answer, however they are cut. Returns the open channel once the response is
    /// complete; what followed the response is already in it.
    ///
    /// # Errors
    /// If what came is no valid response of the server that was addressed, or the server refuses. Called again after
    /// it has returned a channel or an error: [`ChannelError::Noise`].
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Option<Records>, ChannelError> {
        self.buffer.extend_from_slice(bytes);
        let Some(&kind) = self.buffer.first() else { return Ok(None) };
        if kind == TYPE_ERROR {
            let Some((header, text)) = self.buffer.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
            let Some(text) = text.get(..usize::from(u16::from_be_bytes([header[1], header[2]]))) else {
                return Ok(None);
            };
            self.initiator = None;
            return Err(ChannelError::Refused(printable(text)));
        }
        if kind != TYPE_RESPONSE {
            self.initiator = None;
            return Err(ChannelError::Type { expected: TYPE_RESPONSE, got: kind });
        }
        if self.buffer.len() < RESPONSE_LEN {
            return Ok(None);
        }
        let initiator = self.initiator.take().ok_or(NoiseError::Authentication)?;
        let split = initiator.finish(&self.buffer[..RESPONSE_LEN])?;
        let mut records = Records::new(split, Early::Expected(Vec::new()));
        records.receive(&self.buffer[RESPONSE_LEN..])?;
        Ok(Some(records))
    }
}

/// What a server has once it accepted a client's initiation.
#[derive(Debug)]
pub struct ServerChannel {
    /// What the client speaks.
    pub version: CapabilityVersion,
    /// Who the client is. Proven once its first record opens.
    pub machine: MachinePublic,
    /// To be sent first, before any record.
    pub response: [u8; RESPONSE_LEN],
    /// The open channel.
    pub records: Records,
}

impl ServerChannel {
    /// Answers an initiation.
    ///
    /// # Errors
    /// If it is malformed or was made for another server key.
    pub fn accept(
        control: &MachinePrivate,
        initiation: &[u8],
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> Result<Self, ChannelError> {
        let (Accepted { version, machine, split, .. }, response) = Responder::accept(control, initiation, rng)?;
        let records = Records::new(split, Early::Done);
        Ok(Self { version: CapabilityVersion(version), machine, response, records })
    }

    /// Puts an early payload before everything else. Call it before anything is written to `records`.
    ///
    /// # Errors
    /// As [`Records::write`].
    pub fn write_early(&mut self, early: &EarlyNoise) -> Result<(), ChannelError> {
        let json = wire::encode(early);
        let length = u32::try_from(json.len()).map_err(|_| ChannelError::Early)?;
        let mut payload = Vec::with_capacity(EARLY_HEADER + json.len());
        payload.extend_from_slice(&EARLY_MAGIC);
        payload.extend_from_slice(&length.to_be_bytes());
        payload.extend_from_slice(&json);
        self.records.write(&payload)
    }
}

/// A text that bears no authentication, made fit for one line of a log.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(200).collect()
}

/// An open channel: bytes in both directions, sealed in records.
///
/// Ciphertext goes in by [`receive`](Self::receive) and comes out of [`output`](Self::output); plaintext goes in by
/// [`write`](Self::write) and comes out of [`read`](Self::read). Nothing is bounded here: whoever drives it stops
/// writing and receiving while the other end is slow.
#[derive(Debug)]
pub struct Records {
    tx: CipherKey,
    rx: CipherKey,
    handshake_hash: [u8; 32],
    /// Ciphertext that is no whole record yet.
    partial: Vec<u8>,
    plaintext: Queue,
    output: Queue,
    early: Early,
    failed: Option<ChannelError>,
}

#[derive(Debug)]
enum Early {
    /// The first bytes, until they say what they are.
    Expected(Vec<u8>),
    Received(EarlyNoise),
    Done,
}

impl Records {
    fn new(split: Split, early: Early) -> Self {
        Self {
            tx: split.tx,
            rx: split.rx,
            handshake_hash: split.handshake_hash,
            partial: Vec::new(),
            plaintext: Queue::default(),
            output: Queue::default(),
            early,
            failed: None,
        }
    }

    /// The channel binding: equal on both sides, different for every handshake.
    #[must_use]
    pub fn handshake_hash(&self) -> &[u8; 32] {
        &self.handshake_hash
    }

    /// The server's early payload, once it has come. Always `None` on the server.
    #[must_use]
    pub fn early(&self) -> Option<&EarlyNoise> {
        match &self.early {
            Early::Received(early) => Some(early),
            Early::Expected(_) | Early::Done => None,
        }
    }

    /// Takes ciphertext, however it is cut.
    ///
    /// # Errors
    /// If a record does not verify or is malformed, and the same again ever after. What came before it stays readable.
    pub fn receive(&mut self, mut bytes: &[u8]) -> Result<(), ChannelError> {
        self.check()?;
        let result = loop {
            if self.partial.len() < HEADER_LEN {
                take(&mut self.partial, &mut bytes, HEADER_LEN);
                if self.partial.len() < HEADER_LEN {
                    break Ok(());
                }
                if let Err(error) = record_len(&self.partial) {
                    break Err(error);
                }
            }
            let total = HEADER_LEN + usize::from(u16::from_be_bytes([self.partial[1], self.partial[2]]));
            take(&mut self.partial, &mut bytes, total);
            if self.partial.len() < total {
                break Ok(());
            }
            if let Err(error) = self.open() {
                break Err(error);
            }
        };
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    /// Opens the whole record in `partial`.
    fn open(&mut self) -> Result<(), ChannelError> {
        let plaintext = self.rx.open(&mut self.partial[HEADER_LEN..])?;
        if let Early::Expected(first) = &mut self.early {
            first.extend_from_slice(plaintext);
            let taken = early_payload(first)?;
            match taken {
                EarlyPayload::Undecided => {}
                EarlyPayload::Absent => {
                    self.plaintext.push(first);
                    self.early = Early::Done;
                }
                EarlyPayload::Present(early, length) => {
                    self.plaintext.push(&first[length..]);
                    self.early = Early::Received(early);
                }
            }
        } else {
            self.plaintext.push(plaintext);
        }
        self.partial.clear();
        Ok(())
    }

    /// Moves plaintext that has arrived into `out` and returns how much; 0 if there is none.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        self.plaintext.pop(out)
    }

    /// How many bytes of plaintext wait to be read.
    #[must_use]
    pub fn readable(&self) -> usize {
        self.plaintext.as_slice().len()
    }

    /// Whether part of a record has come and the rest has not: the stream must not end here.
    #[must_use]
    pub fn mid_record(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Seals `plaintext` into as many records as it takes; nothing for nothing.
    ///
    /// # Errors
    /// If the channel has failed, or the cipher key is exhausted.
    pub fn write(&mut self, plaintext: &[u8]) -> Result<(), ChannelError> {
        self.check()?;
        for piece in plaintext.chunks(MAX_PLAINTEXT) {
            let length = u16::try_from(piece.len() + TAG_LEN).map_err(|_| ChannelError::RecordLength(piece.len()))?;
            let output = self.output.tail();
            output.push(TYPE_RECORD);
            output.extend_from_slice(&length.to_be_bytes());
            if let Err(error) = self.tx.seal(piece, output) {
                self.failed = Some(error.into());
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Ciphertext to be sent.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        self.output.as_slice()
    }

    /// Says that the first `count` bytes of [`output`](Self::output) have been sent.
    pub fn consume_output(&mut self, count: usize) {
        self.output.consume(count);
    }

    fn check(&self) -> Result<(), ChannelError> {
        self.failed.clone().map_or(Ok(()), Err)
    }
}

/// Moves bytes until `buffer` holds `wanted` or there are no more.
fn take(buffer: &mut Vec<u8>, bytes: &mut &[u8], wanted: usize) {
    let count = wanted.saturating_sub(buffer.len()).min(bytes.len());
    let (now, later) = bytes.split_at(count);
    buffer.extend_from_slice(now);
    *bytes = later;
}

fn record_len(header: &[u8]) -> Result<usize, ChannelError> {
    if header[0] != TYPE_RECORD {
        return Err(ChannelError::Type { expected: TYPE_RECORD, got: header[0] });
    }
    let length = usize::from(u16::from_be_bytes([header[1], header[2]]));
    if (TAG_LEN..=MAX_RECORD - HEADER_LEN).contains(&length) {
        Ok(length)
    } else {
        Err(ChannelError::RecordLength(length))
    }
}

enum EarlyPayload {
    Undecided,
    Absent,
    /// The payload, and how many bytes it took.
    Present(EarlyNoise, usize),
}

fn early_payload(first: &[u8]) -> Result<EarlyPayload, ChannelError> {
    let begun = first.len().min(EARLY_MAGIC.len());
    if first[..begun] != EARLY_MAGIC[..begun] {
        return Ok(EarlyPayload::Absent);
    }
    let Some((header, rest)) = first.split_first_chunk::<EARLY_HEADER>() else { return Ok(EarlyPayload::Undecided) };
    let length = u32::from_be_bytes([header[5], header[6], header[7], header[8]]) as usize;
    if length > MAX_EARLY {
        return Err(ChannelError::Early);
    }
    let Some(json) = rest.get(..length) else { return Ok(EarlyPayload::Undecided) };
    let early = wire::decode(json).map_err(|_| ChannelError::Early)?;
    Ok(EarlyPayload::Present(early, EARLY_HEADER + length))
}

/// Bytes that are appended behind and consumed in front.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    consumed: usize,
}

impl Queue {
    fn as_slice(&self) -> &[u8] {
        &self.bytes[self.consumed..]
    }

    /// The buffer to append to, with what was consumed taken out if that is cheap.
    fn tail(&mut self) -> &mut Vec<u8> {
        if self.consumed == self.bytes.len() {
            self.bytes.clear();
            self.consumed = 0;
        } else if self.consumed > 64 << 10 {
            self.bytes.drain(..self.consumed);
            self.consumed = 0;
        }
        &mut self.bytes
    }

    fn push(&mut self, bytes: &[u8]) {
        self.tail().extend_from_slice(bytes);
    }

    fn pop(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.as_slice().len());
        out[..count].copy_from_slice(&self.as_slice()[..count]);
        self.consume(count);
        count
    }

    fn consume(&mut self, count: usize) {
        self.consumed = (self.consumed + count).min(self.bytes.len());
    }
}

#[cfg(test)]
mod tests;
