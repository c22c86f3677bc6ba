//! Protection of TLS records: one direction's key, and the number of the next record (RFC 8446 §5, RFC 5246 §6.2.3.3,
//! RFC 5288, RFC 7905).
//!
//! A record is sealed from the caller's bytes straight into the output and opened straight into the reader's buffer.

use std::ops::Range;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::{ConnectionTrafficSecrets, SupportedCipherSuite};

/// A record's header: content type, version, length.
pub(super) const HEADER_LEN: usize = 5;
/// The longest plaintext of a record.
pub(super) const MAX_PLAIN: usize = 16 * 1024;
/// More than any record adds to its plaintext: header, explicit nonce, content type and tag.
pub(super) const MAX_OVERHEAD: usize = 32;

/// Content type of an alert.
pub(super) const ALERT: u8 = 21;
/// Content type of a handshake message.
pub(super) const HANDSHAKE: u8 = 22;
/// Content type of application data.
pub(super) const DATA: u8 = 23;

const TAG_LEN: usize = 16;
const LEGACY_VERSION: [u8; 2] = [3, 3];

/// What the peer did that ends the connection: the alert that tells it so, and one line for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) alert: u8,
    pub(super) reason: &'static str,
}

impl Fault {
    pub(super) const fn unexpected(reason: &'static str) -> Self {
        Self { alert: 10, reason }
    }
}

const FORGED: Fault = Fault { alert: 20, reason: "a record fails its authentication" };
const TOO_LONG: Fault = Fault { alert: 22, reason: "a record is longer than TLS allows" };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// The content type is inside, behind the plaintext; the header is authenticated as it stands.
    Tls13,
    /// Eight bytes of the nonce stand before the ciphertext.
    Tls12Gcm,
    Tls12Chacha,
}

impl Format {
    const fn explicit(self) -> usize {
        match self {
            Self::Tls12Gcm => 8,
            Self::Tls13 | Self::Tls12Chacha => 0,
        }
    }

    /// The longest record after its header.
    const fn max_body(self) -> usize {
        match self {
            Self::Tls13 => MAX_PLAIN + 256,
            Self::Tls12Gcm | Self::Tls12Chacha => MAX_PLAIN + 2048,
        }
    }
}

/// A plaintext to be sealed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Plain<'a> {
    /// It stands elsewhere.
    Apart(&'a [u8]),
    /// This many bytes stand in the output already, from [`Keys::payload_at`] on.
    InPlace(usize),
}

/// One direction's keys.
pub(super) struct Keys {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    format: Format,
}

impl Keys {
    /// Takes what a handshake or a key update gave: the number of the next record, and the secrets.
    pub(super) fn new(
        suite: SupportedCipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Option<Self> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&aead::CHACHA20_POLY1305, key, iv),
            _ => return None,
        };
        let format = match suite {
            SupportedCipherSuite::Tls13(_) => Format::Tls13,
            SupportedCipherSuite::Tls12(_) if *algorithm == aead::CHACHA20_POLY1305 => Format::Tls12Chacha,
            SupportedCipherSuite::Tls12(_) => Format::Tls12Gcm,
        };
        let key = LessSafeKey::new(UnboundKey::new(algorithm, key.as_ref()).ok()?);
        Some(Self { key, iv: iv.as_ref().try_into().ok()?, sequence, format })
    }

    /// How many records have been sealed or opened with this key.
    pub(super) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Where a record's plaintext stands before it is sealed in place.
    pub(super) const fn payload_at(&self) -> usize {
        HEADER_LEN + self.format.explicit()
    }

    /// Seals at most [`MAX_PLAIN`] bytes into a record at the front of `out`, and says how long it is. `None` if `out` is
    /// too short or records can no longer be counted.
    pub(super) fn seal(&mut self, content: u8, plain: Plain<'_>, out: &mut [u8]) -> Option<usize> {
        let length = match plain {
            Plain::Apart(bytes) => bytes.len(),
            Plain::InPlace(length) => length,
        };
        let inner = [content];
        let extra: &[u8] = if self.format == Format::Tls13 { &inner } else { &[] };
        let (head, rest) = out.split_at_mut_checked(self.payload_at())?;
        let (body, rest) = rest.split_at_mut_checked(length)?;
        let tail = rest.get_mut(..extra.len() + TAG_LEN)?;
        let total = self.format.explicit() + body.len() + tail.len();

        head[0] = if extra.is_empty() { content } else { DATA };
        head[1..3].copy_from_slice(&LEGACY_VERSION);
        head[3..5].copy_from_slice(&u16::try_from(total).ok()?.to_be_bytes());
        let nonce = self.nonce();
        let explicit = self.format.explicit();
        head[5..].copy_from_slice(&nonce[NONCE_LEN - explicit..]);
        let (aad, aad_len) = self.aad(content, &head[..HEADER_LEN], length);
        let (nonce, aad) = (Nonce::assume_unique_for_key(nonce), Aad::from(&aad[..aad_len]));
        // Counted first: a nonce is never used again, whatever happens.
        self.sequence = self.sequence.checked_add(1)?;
        match plain {
            Plain::Apart(bytes) => self.key.seal_out_of_place_scatter(nonce, aad, bytes, body, extra, tail).ok()?,
            Plain::InPlace(_) => self.key.seal_in_place_scatter(nonce, aad, body, extra, tail).ok()?,
        }
        Some(HEADER_LEN + total)
    }

    /// How long the record at the front of `bytes` is, header included; `None` until the header is there.
    pub(super) fn record_len(&self, bytes: &[u8]) -> Result<Option<usize>, Fault> {
        let Some(&[content, _, _, high, low]) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let protected = match self.format {
            Format::Tls13 => content == DATA,
            Format::Tls12Gcm | Format::Tls12Chacha => matches!(content, ALERT | HANDSHAKE | DATA),
        };
        if !protected {
            return Err(Fault::unexpected("what came is no protected TLS record"));
        }
        let body = usize::from(u16::from_be_bytes([high, low]));
        if body > self.format.max_body() {
            return Err(TOO_LONG);
        }
        Ok(Some(HEADER_LEN + body))
    }

    /// How much room the opening of a record of `record_len` bytes needs; at most one byte more than its plaintext and
    /// its padding have.
    pub(super) const fn room(&self, record_len: usize) -> usize {
        record_len.saturating_sub(self.payload_at() + TAG_LEN)
    }

    /// Opens a whole record into `into`, which is exactly [`Keys::room`] long: its content type and the length of its
    /// plaintext, which stands in front.
    pub(super) fn open_into(&mut self, record: &[u8], into: &mut [u8]) -> Result<(u8, usize), Fault> {
        let body = self.body(record)?;
        let (nonce, aad, aad_len) = self.expected(record, body.len());
        let (cipher, tag) = (&record[body.clone()], &record[body.end..]);
        let opened = self.key.open_separate_gather(nonce, Aad::from(&aad[..aad_len]), cipher, tag, into);
        opened.map_err(|_| FORGED)?;
        self.opened(record[0], into)
    }

    /// Opens a whole record in place: its content type, and where in `record` its plaintext stands.
    pub(super) fn open_in_place(&mut self, record: &mut [u8]) -> Result<(u8, Range<usize>), Fault> {
        let body = self.body(record)?;
        let (nonce, aad, aad_len) = self.expected(record, body.len());
        let (cipher, tag) = record.split_at_mut(body.end);
        let cipher = &mut cipher[body.start..];
        let opened = self.key.open_in_place_separate_tag(nonce, Aad::from(&aad[..aad_len]), tag, cipher);
        opened.map_err(|_| FORGED)?;
        let (content, length) = self.opened(record[0], &record[body.clone()])?;
        Ok((content, body.start..body.start + length))
    }

    /// Where in a record the ciphertext stands.
    fn body(&self, record: &[u8]) -> Result<Range<usize>, Fault> {
        let end = record.len().checked_sub(TAG_LEN).filter(|end| *end >= self.payload_at());
        Ok(self.payload_at()..end.ok_or(FORGED)?)
    }

    /// The nonce and what else has been authenticated with a record.
    fn expected(&self, record: &[u8], plain_len: usize) -> (Nonce, [u8; 13], usize) {
        let mut nonce = self.nonce();
        if self.format == Format::Tls12Gcm {
            nonce[4..].copy_from_slice(&record[HEADER_LEN..self.payload_at()]);
        }
        let (aad, aad_len) = self.aad(record[0], &record[..HEADER_LEN], plain_len);
        (Nonce::assume_unique_for_key(nonce), aad, aad_len)
    }

    fn opened(&mut self, outer: u8, plain: &[u8]) -> Result<(u8, usize), Fault> {
        self.sequence = self.sequence.checked_add(1).ok_or(TOO_LONG)?;
        if self.format != Format::Tls13 {
            return if plain.len() > MAX_PLAIN { Err(TOO_LONG) } else { Ok((outer, plain.len())) };
        }
        if plain.len() > MAX_PLAIN + 1 {
            return Err(TOO_LONG);
        }
        let end = plain.iter().rposition(|byte| *byte != 0);
        let end = end.ok_or(Fault::unexpected("a record is nothing but padding"))?;
        Ok((plain[end], end))
    }

    fn nonce(&self) -> [u8; NONCE_LEN] {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        nonce
    }

    fn aad(&self, content: u8, header: &[u8], plain_len: usize) -> ([u8; 13], usize) {
        let mut aad = [0; 13];
        if self.format == Format::Tls13 {
            aad[..HEADER_LEN].copy_from_slice(header);
            return (aad, HEADER_LEN);
        }
        aad[..8].copy_from_slice(&self.sequence.to_be_bytes());
        aad[8] = content;
        aad[9..11].copy_from_slice(&LEGACY_VERSION);
        // A record is at most 18 KiB long.
        aad[11..].copy_from_slice(&u16::try_from(plain_len).unwrap_or(u16::MAX).to_be_bytes());
        (aad, 13)
    }
}
