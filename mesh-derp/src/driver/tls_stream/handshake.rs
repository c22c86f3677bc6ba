//! The TLS handshake. rustls does it; afterwards only its key schedule is kept.

use std::io;
use std::ops::Deref;
use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedConnectionCommon, UnbufferedStatus};
use rustls::{ClientConfig, ExtractedSecrets, ProtocolVersion, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::record::{HEADER_LEN, MAX_PLAIN};
use super::session::{Kernel, Session};

/// What the handshake told about the other side.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Peer {
    /// The version agreed on.
    pub version: ProtocolVersion,
    /// The certificates it showed, its own first.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The application protocol agreed on.
    pub alpn: Option<Vec<u8>>,
}

/// One side's handshake.
pub(super) trait Side: Deref<Target = UnbufferedConnectionCommon<Self::Data>> {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn into_kernel(self) -> Result<(ExtractedSecrets, Kernel), rustls::Error>;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_kernel(self) -> Result<(ExtractedSecrets, Kernel), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, kernel)| (secrets, Kernel::Server(kernel)))
    }
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_kernel(self) -> Result<(ExtractedSecrets, Kernel), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, kernel)| (secrets, Kernel::Client(kernel)))
    }
}

/// The server's side. A configuration that does not let its secrets out is copied.
pub(super) fn server(mut config: Arc<ServerConfig>) -> io::Result<UnbufferedServerConnection> {
    if !config.enable_secret_extraction {
        Arc::make_mut(&mut config).enable_secret_extraction = true;
    }
    UnbufferedServerConnection::new(config).map_err(invalid)
}

/// The client's side. A configuration that does not let its secrets out is copied.
pub(super) fn client(
    mut config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> io::Result<UnbufferedClientConnection> {
    if !config.enable_secret_extraction {
        Arc::make_mut(&mut config).enable_secret_extraction = true;
    }
    UnbufferedClientConnection::new(config, name).map_err(invalid)
}

/// Shakes hands over `io`.
pub(super) async fn run<S, IO>(mut side: S, io: &mut IO) -> io::Result<(Session, Peer)>
where
    S: Side,
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    // rustls is shown one record at a time, so that none behind the handshake's last is opened by it. What it has seen
    // and still needs (part of a message) stands in front.
    let mut shown = 0;
    loop {
        let step = advance(&mut side, &mut incoming[..shown], &mut outgoing);
        if !outgoing.is_empty() {
            // In the case of an error, an alert for the peer, whether or not it still listens.
            let written = async {
                io.write_all(&outgoing).await?;
                io.flush().await
            };
            if let (Err(error), true) = (written.await, step.is_ok()) {
                return Err(error);
            }
            outgoing.clear();
        }
        let (discard, next) = step?;
        incoming.drain(..discard);
        shown -= discard;
        match next {
            Next::Call => {}
            // A server may write before the client has finished; we wait for that.
            Next::Record if side.is_handshaking() => shown = read_record(io, &mut incoming, shown).await?,
            Next::Record => break,
        }
    }
    if shown > 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "tls handshake ended within a message"));
    }
    let peer = Peer {
        version: side.protocol_version().unwrap_or(ProtocolVersion::TLSv1_2),
        certificates: side.peer_certificates().unwrap_or_default().to_vec(),
        alpn: side.alpn_protocol().map(<[u8]>::to_vec),
    };
    let (secrets, kernel) = side.into_kernel().map_err(invalid)?;
    Ok((Session::new(secrets, kernel, &incoming)?, peer))
}

enum Next {
    /// It can go on at once.
    Call,
    /// It wants another record, or nothing more.
    Record,
}

/// One step of rustls: how many bytes it is done with, and what is to be done next.
fn advance<S: Side>(side: &mut S, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> io::Result<(usize, Next)> {
    let UnbufferedStatus { discard, state } = side.process(incoming);
    let next = match state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(&mut data, outgoing)?;
            Next::Call
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Next::Call
        }
        Ok(ConnectionState::WriteTraffic(_) | ConnectionState::BlockedHandshake) => Next::Record,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake broken off by the peer")),
        Err(error) => {
            // What is queued, an alert at the end, comes before anything else. What has come must stay as it was.
            while side.wants_write()
                && let UnbufferedStatus { state: Ok(ConnectionState::EncodeTlsData(mut queued)), .. } =
                    side.process(incoming)
            {
                encode(&mut queued, outgoing)?;
            }
            return Err(invalid(error));
        }
    };
    Ok((discard, next))
}

fn encode<Data>(data: &mut EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let start = outgoing.len();
    let missing = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(missing)) => missing.required_size,
        Ok(_) | Err(EncodeError::AlreadyEncoded) => return Ok(()),
    };
    outgoing.resize(start + missing, 0);
    let written = data.encode(&mut outgoing[start..]).map_err(io::Error::other)?;
    outgoing.truncate(start + written);
    Ok(())
}

/// Makes sure that one more record than the first `shown` bytes is there, and says where it ends.
async fn read_record<IO: AsyncRead + Unpin>(io: &mut IO, incoming: &mut Vec<u8>, shown: usize) -> io::Result<usize> {
    loop {
        if let Some(&[content, _, _, high, low]) = incoming[shown..].first_chunk::<HEADER_LEN>() {
            let body = usize::from(u16::from_be_bytes([high, low]));
            // Whatever is no TLS, rustls is shown at once, to say so.
            let sane = (20..=23).contains(&content) && body <= MAX_PLAIN + 2048;
            if !sane || incoming.len() - shown >= HEADER_LEN + body {
                return Ok(if sane { shown + HEADER_LEN + body } else { incoming.len() });
            }
        }
        incoming.reserve(4096);
        if io.read_buf(incoming).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof"));
        }
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
