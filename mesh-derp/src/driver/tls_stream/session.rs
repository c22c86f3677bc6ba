//! TLS after the handshake, without I/O: records to plaintext, plaintext to records, and the few messages that may still
//! come.

use std::io::{self, IoSlice};
use std::ops::Range;

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion, SupportedCipherSuite};
use tokio::io::ReadBuf;

use super::record::{ALERT, DATA, Fault, HANDSHAKE, Keys, MAX_OVERHEAD, MAX_PLAIN, Plain};

/// How much plaintext is sealed at most at once: four full records.
pub(super) const MAX_BATCH: usize = 4 * MAX_PLAIN;
/// Room for a batch: its records and a key update.
pub(super) const BATCH_ROOM: usize = MAX_BATCH + 8 * MAX_OVERHEAD;
/// The longest handshake message after the handshake. A session ticket is a few hundred bytes long.
const MAX_MESSAGE: usize = 16 * 1024;
/// Key updates between two records of data. More are an attempt to keep us busy.
const MAX_KEY_UPDATES: u8 = 32;
/// Alerts that are only warnings, in all.
const MAX_WARNINGS: u8 = 4;

const WARNING: u8 = 1;
const FATAL: u8 = 2;
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;
const NO_RENEGOTIATION: u8 = 100;

const HELLO_REQUEST: u8 = 0;
const CLIENT_HELLO: u8 = 1;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// What is left of rustls's connection: its key schedule.
pub(super) enum Kernel {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

type Secrets = Result<(u64, ConnectionTrafficSecrets), rustls::Error>;

impl Kernel {
    fn suite(&self) -> SupportedCipherSuite {
        match self {
            Self::Client(kernel) => kernel.negotiated_cipher_suite(),
            Self::Server(kernel) => kernel.negotiated_cipher_suite(),
        }
    }

    fn update_tx(&mut self) -> Secrets {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
    }

    fn update_rx(&mut self) -> Secrets {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
    }

    const fn is_client(&self) -> bool {
        matches!(self, Self::Client(_))
    }
}

/// Bytes that came and were not wanted yet: plaintext, then records.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    plain: Range<usize>,
    records: usize,
}

/// A connection's state after the handshake. It holds buffers only while something waits in them.
pub(super) struct Session {
    kernel: Box<Kernel>,
    rx: Keys,
    tx: Keys,
    /// How many records may be sealed with one key.
    tx_limit: u64,
    inbox: Inbox,
    /// Sealed records, and how many of their bytes have been sent.
    outbox: Vec<u8>,
    sent: usize,
    /// The beginning of a handshake message.
    message: Vec<u8>,
    key_update_due: bool,
    key_updates: u8,
    warnings: u8,
    ended: bool,
    closed: bool,
    fault: Option<Failure>,
}

/// Why a connection has failed.
#[derive(Debug, Clone, Copy)]
enum Failure {
    Fault(Fault),
    Alert(u8),
    UsedUp,
}

impl Failure {
    fn error(self) -> io::Error {
        let reason = match self {
            Self::Fault(fault) => format!("tls: {}", fault.reason),
            Self::Alert(alert) => format!("tls: the peer gave up: {:?}", AlertDescription::from(alert)),
            Self::UsedUp => "tls: the connection's key is used up, connect again".to_owned(),
        };
        io::Error::new(io::ErrorKind::InvalidData, reason)
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

const INTERNAL: Fault = Fault { alert: 80, reason: "a key cannot be used" };

impl Session {
    /// Goes on where the handshake ended; `early` came behind it.
    pub(super) fn new(secrets: ExtractedSecrets, kernel: Kernel, early: &[u8]) -> io::Result<Self> {
        let suite = kernel.suite();
        let tx_limit = match suite {
            SupportedCipherSuite::Tls12(suite) => suite.common.confidentiality_limit,
            SupportedCipherSuite::Tls13(suite) => suite.common.confidentiality_limit,
        };
        let keys = |secrets| Keys::new(suite, secrets).ok_or_else(|| Failure::Fault(INTERNAL).error());
        let (rx, tx) = (keys(secrets.rx)?, keys(secrets.tx)?);
        let mut session = Self {
            kernel: Box::new(kernel),
            rx,
            tx,
            tx_limit,
            inbox: Inbox::default(),
            outbox: Vec::new(),
            sent: 0,
            message: Vec::new(),
            key_update_due: false,
            key_updates: 0,
            warnings: 0,
            ended: false,
            closed: false,
            fault: None,
        };
        session.keep(early, 0..0, 0);
        Ok(session)
    }

    pub(super) fn version(&self) -> ProtocolVersion {
        self.kernel.suite().version().version
    }

    fn is_tls13(&self) -> bool {
        matches!(self.kernel.suite(), SupportedCipherSuite::Tls13(_))
    }

    /// Bytes of memory held in buffers.
    pub(super) const fn buffered(&self) -> usize {
        self.inbox.bytes.capacity() + self.outbox.capacity() + self.message.capacity()
    }

    #[cfg(test)]
    pub(super) const fn limit_records(&mut self, limit: u64) {
        self.tx_limit = limit;
    }

    /// A record of ours with any content.
    #[cfg(test)]
    pub(super) fn seal_raw(&mut self, content: u8, plain: &[u8]) -> Vec<u8> {
        let mut record = vec![0; plain.len() + MAX_OVERHEAD];
        let length = self.tx.seal(content, Plain::Apart(plain), &mut record).unwrap();
        record.truncate(length);
        record
    }

    /// Goes on with a new key, as after a key update of ours.
    #[cfg(test)]
    pub(super) fn after_key_update(mut self) -> Self {
        self.tx = Keys::new(self.kernel.suite(), self.kernel.update_tx().unwrap()).unwrap();
        self
    }

    /// How many records have been sealed with the present key.
    #[cfg(test)]
    pub(super) const fn sent_with_key(&self) -> u64 {
        self.tx.sequence()
    }

    // Reading.

    /// Bytes of records that wait for the rest of theirs.
    pub(super) fn partial(&self) -> &[u8] {
        &self.inbox.bytes[self.inbox.records..]
    }

    /// Whether the peer has said that nothing more will come.
    pub(super) const fn ended(&self) -> bool {
        self.ended
    }

    /// Why nothing more will come, if it is not the peer's wish.
    pub(super) fn failed(&self) -> io::Result<()> {
        self.fault.map_or(Ok(()), |fault| Err(fault.error()))
    }

    /// Moves what has come and is kept into `buf`, as far as it fits.
    pub(super) fn read_kept(&mut self, buf: &mut ReadBuf<'_>) {
        if self.inbox.bytes.is_empty() {
            return;
        }
        let mut inbox = std::mem::take(&mut self.inbox);
        give(&inbox.bytes, &mut inbox.plain, buf);
        if inbox.plain.is_empty() {
            let (plain, records) = self.open_all(&mut inbox.bytes, inbox.records, buf);
            (inbox.plain, inbox.records) = (plain, records);
        }
        if !inbox.plain.is_empty() || inbox.records < inbox.bytes.len() {
            self.inbox = inbox;
        }
    }

    /// Opens the records in `bytes`, of which the first [`Session::partial`] were kept, into `buf`. What does not fit, and
    /// an incomplete record, is kept.
    pub(super) fn read(&mut self, bytes: &mut [u8], buf: &mut ReadBuf<'_>) {
        self.inbox = Inbox::default();
        let (plain, records) = self.open_all(bytes, 0, buf);
        self.keep(bytes, plain, records);
    }

    fn keep(&mut self, bytes: &[u8], plain: Range<usize>, records: usize) {
        let (plain, records) = (&bytes[plain], &bytes[records..]);
        if !plain.is_empty() || !records.is_empty() {
            let plain_len = plain.len();
            self.inbox = Inbox { bytes: [plain, records].concat(), plain: 0..plain_len, records: plain_len };
        }
    }

    /// Opens records from `at` on until the next one is incomplete or there is plaintext that does not fit into `buf`:
    /// where that stands, and where the next record begins.
    fn open_all(&mut self, bytes: &mut [u8], mut at: usize, buf: &mut ReadBuf<'_>) -> (Range<usize>, usize) {
        while buf.remaining() > 0 && !self.ended && self.fault.is_none() {
            match self.open_one(&mut bytes[at..], buf) {
                Ok(None) => return (0..0, at),
                Ok(Some((mut plain, length))) => {
                    plain = at + plain.start..at + plain.end;
                    at += length;
                    give(bytes, &mut plain, buf);
                    if !plain.is_empty() {
                        return (plain, at);
                    }
                }
                Err(failure) => self.fail(failure),
            }
        }
        if self.ended || self.fault.is_some() {
            // Whatever follows is not looked at.
            at = bytes.len();
        }
        (0..0, at)
    }

    /// Opens the record at the front: how long it is, and where its plaintext stands unless it went into `buf` directly.
    fn open_one(&mut self, bytes: &mut [u8], buf: &mut ReadBuf<'_>) -> Result<Option<(Range<usize>, usize)>, Failure> {
        let Some(length) = self.rx.record_len(bytes)? else { return Ok(None) };
        let Some(record) = bytes.get_mut(..length) else { return Ok(None) };
        let room = self.rx.room(length);
        if room <= buf.remaining() {
            let into = buf.initialize_unfilled_to(room);
            let (content, plain_len) = self.rx.open_into(record, into)?;
            if content == DATA {
                self.note_data()?;
                buf.advance(plain_len);
            } else {
                self.control(content, &into[..plain_len])?;
            }
            return Ok(Some((0..0, length)));
        }
        let (content, plain) = self.rx.open_in_place(record)?;
        if content == DATA {
            self.note_data()?;
            return Ok(Some((plain, length)));
        }
        self.control(content, &record[plain])?;
        Ok(Some((0..0, length)))
    }

    fn note_data(&mut self) -> Result<(), Fault> {
        self.key_updates = 0;
        if self.message.is_empty() {
            Ok(())
        } else {
            Err(Fault::unexpected("data came in the middle of a handshake message"))
        }
    }

    /// Takes a record that holds no data.
    fn control(&mut self, content: u8, plain: &[u8]) -> Result<(), Failure> {
        match content {
            ALERT => self.alert(plain),
            HANDSHAKE if self.is_tls13() => self.messages(plain),
            HANDSHAKE => self.renegotiation(plain),
            _ => Err(Fault::unexpected("a record is neither data nor alert nor handshake").into()),
        }
    }

    fn alert(&mut self, plain: &[u8]) -> Result<(), Failure> {
        let &[level, alert] = plain else {
            return Err(Fault { alert: 50, reason: "an alert has another length than two bytes" }.into());
        };
        if alert == CLOSE_NOTIFY {
            self.ended = true;
            return Ok(());
        }
        // TLS 1.3 knows no warnings but this one.
        let harmless = !self.is_tls13() || alert == USER_CANCELED;
        if level == WARNING && harmless && self.warnings < MAX_WARNINGS {
            self.warnings += 1;
            return Ok(());
        }
        Err(Failure::Alert(alert))
    }

    /// TLS 1.2: asked to shake hands again, we decline once.
    fn renegotiation(&mut self, plain: &[u8]) -> Result<(), Failure> {
        let asked = if self.kernel.is_client() { HELLO_REQUEST } else { CLIENT_HELLO };
        if plain.first() != Some(&asked) || self.warnings > 0 {
            return Err(Fault::unexpected("a handshake message came after the handshake").into());
        }
        self.warnings += 1;
        self.send_alert(WARNING, NO_RENEGOTIATION);
        Ok(())
    }

    fn messages(&mut self, plain: &[u8]) -> Result<(), Failure> {
        if plain.is_empty() {
            return Err(Fault::unexpected("an empty handshake record").into());
        }
        let mut kept = std::mem::take(&mut self.message);
        let mut rest = plain;
        if !kept.is_empty() {
            kept.extend_from_slice(plain);
            rest = &kept;
        }
        while let Some((&[kind, a, b, c], body)) = rest.split_first_chunk::<4>() {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if length > MAX_MESSAGE {
                return Err(Fault::unexpected("a handshake message is too long").into());
            }
            let Some((body, behind)) = body.split_at_checked(length) else { break };
            self.message(kind, body, behind.is_empty())?;
            rest = behind;
        }
        self.message = rest.to_vec();
        Ok(())
    }

    fn message(&mut self, kind: u8, body: &[u8], last: bool) -> Result<(), Failure> {
        match (kind, self.kernel.as_mut()) {
            (KEY_UPDATE, kernel) => {
                let asked = match body {
                    [0] => false,
                    [1] => true,
                    _ => return Err(Fault { alert: 47, reason: "a key update is malformed" }.into()),
                };
                self.key_updates += 1;
                if !last || self.key_updates > MAX_KEY_UPDATES {
                    return Err(Fault::unexpected("key updates come too many or not alone").into());
                }
                let suite = kernel.suite();
                let keys = kernel.update_rx().ok().and_then(|secrets| Keys::new(suite, secrets));
                self.rx = keys.ok_or(INTERNAL)?;
                self.key_update_due |= asked;
                Ok(())
            }
            (NEW_SESSION_TICKET, Kernel::Client(kernel)) => kernel
                .handle_new_session_ticket(body)
                .map_err(|_| Fault { alert: 50, reason: "a session ticket is malformed" }.into()),
            _ => Err(Fault::unexpected("a handshake message came after the handshake").into()),
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.fault = Some(failure);
        self.message = Vec::new();
        if let Failure::Fault(fault) = failure {
            self.send_alert(FATAL, fault.alert);
        }
    }

    fn send_alert(&mut self, level: u8, alert: u8) {
        let start = self.outbox.len();
        self.outbox.resize(start + 2 + MAX_OVERHEAD, 0);
        let sealed = self.tx.seal(ALERT, Plain::Apart(&[level, alert]), &mut self.outbox[start..]);
        self.outbox.truncate(start + sealed.unwrap_or(0));
    }

    // Writing.

    /// What is sealed and not yet sent.
    pub(super) fn unsent(&self) -> &[u8] {
        &self.outbox[self.sent..]
    }

    /// Notes that more has been sent.
    pub(super) fn note_sent(&mut self, length: usize) {
        self.sent += length;
        if self.sent >= self.outbox.len() {
            self.outbox = Vec::new();
            self.sent = 0;
        }
    }

    /// Keeps sealed records that could not be sent at once.
    pub(super) fn keep_unsent(&mut self, bytes: &[u8]) {
        self.outbox.extend_from_slice(bytes);
    }

    /// Seals as much of `parts` as is taken at once into `out`, which is at least [`BATCH_ROOM`] long: how much was taken,
    /// and how long the records are.
    ///
    /// # Errors
    /// If the connection has failed or has been closed by us, or if its key is used up.
    pub(super) fn seal(&mut self, parts: &[IoSlice<'_>], out: &mut [u8]) -> io::Result<(usize, usize)> {
        self.failed()?;
        if self.closed {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "tls: written to after the end"));
        }
        let (mut length, mut taken) = (0, 0);
        if self.key_update_due {
            length += self.update_tx(&mut out[length..])?;
        }
        let mut parts = Parts { slices: parts, offset: 0 };
        while taken < MAX_BATCH {
            if self.tx.sequence().saturating_add(1) >= self.tx_limit {
                length += self.update_tx(&mut out[length..])?;
            }
            let record = &mut out[length..];
            let at = self.tx.payload_at();
            let plain = parts.next(MAX_PLAIN, &mut record[at..at + MAX_PLAIN]);
            let plain_len = match plain {
                Plain::Apart(bytes) => bytes.len(),
                Plain::InPlace(length) => length,
            };
            if plain_len == 0 {
                break;
            }
            length += self.tx.seal(DATA, plain, record).ok_or_else(|| Failure::Fault(INTERNAL).error())?;
            taken += plain_len;
        }
        Ok((taken, length))
    }

    /// Seals a key update and goes on with a new key.
    fn update_tx(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if !self.is_tls13() {
            self.fault = Some(Failure::UsedUp);
            return Err(Failure::UsedUp.error());
        }
        let length = self.tx.seal(HANDSHAKE, Plain::Apart(&[KEY_UPDATE, 0, 0, 1, 0]), out);
        let suite = self.kernel.suite();
        let keys = self.kernel.update_tx().ok().and_then(|secrets| Keys::new(suite, secrets));
        let (Some(length), Some(keys)) = (length, keys) else { return Err(Failure::Fault(INTERNAL).error()) };
        (self.tx, self.key_update_due) = (keys, false);
        Ok(length)
    }

    /// Says goodbye: nothing more will be written. Has to be sent.
    pub(super) fn close(&mut self) {
        if !self.closed && self.fault.is_none() {
            self.send_alert(WARNING, CLOSE_NOTIFY);
        }
        self.closed = true;
    }
}

/// Moves plaintext into `buf`, as far as it fits.
fn give(bytes: &[u8], plain: &mut Range<usize>, buf: &mut ReadBuf<'_>) {
    let now = plain.len().min(buf.remaining());
    buf.put_slice(&bytes[plain.start..plain.start + now]);
    plain.start += now;
}

/// What is left of several slices.
struct Parts<'a, 'b> {
    slices: &'b [IoSlice<'a>],
    offset: usize,
}

impl<'b> Parts<'_, 'b> {
    /// The plaintext of the next record: a part as it stands if it fills the record or is the last one, and otherwise
    /// several, gathered in `room`.
    fn next(&mut self, most: usize, room: &mut [u8]) -> Plain<'b> {
        let mut gathered = 0;
        while let Some((slice, behind)) = self.slices.split_first() {
            let part = &slice[self.offset..];
            if gathered == 0 && !part.is_empty() && (part.len() >= most || behind.is_empty()) {
                let now = part.len().min(most);
                self.offset += now;
                return Plain::Apart(&part[..now]);
            }
            let now = part.len().min(most - gathered);
            room[gathered..gathered + now].copy_from_slice(&part[..now]);
            (gathered, self.offset) = (gathered + now, self.offset + now);
            if self.offset < slice.len() {
                break;
            }
            (self.slices, self.offset) = (behind, 0);
        }
        Plain::InPlace(gathered)
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("version", &self.version()).finish_non_exhaustive()
    }
}
