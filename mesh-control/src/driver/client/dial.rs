//! From a URL to HTTP/2 inside the channel: TCP, TLS, `/key`, the upgrade, the handshakes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_noise::key::{MachinePrivate, MachinePublic};
use mesh_noise::random::SeededRng;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig};

use super::USER_AGENT_TEXT;
use crate::channel::{
    ChannelError, ClientChannel, HANDSHAKE_HEADER, UPGRADE_PATH, UPGRADE_PROTOCOL, initiation_to_header,
};
use crate::client::Problem;
use crate::driver::stream::NoiseStream;
use crate::version::CapabilityVersion;
use crate::wire::{self, KeyResponse};

/// How long all of it may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(15);
const MAX_KEY_BODY: usize = 64 << 10;
const MAX_HEAD: usize = 16 << 10;

pub(super) type Sender = http2::SendRequest<Full<Bytes>>;
pub(super) type Connection = http2::Connection<TokioIo<NoiseStream<Transport>>, Full<Bytes>, TokioExecutor>;
pub(super) type Transport = Box<dyn Io>;

pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Whether `url` can be a coordinator's; asks nobody.
///
/// # Errors
/// What is wrong with it, for people.
pub fn check_url(url: &str) -> Result<(), &'static str> {
    Server::read(url.trim_end_matches('/')).map(drop)
}

/// Where the coordinator is.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) url: String,
    /// Host and port as they stand in the URL.
    pub(super) authority: String,
    host: String,
    port: u16,
    tls: bool,
}

impl Server {
    pub(super) fn parse(url: &str) -> Result<Self, Problem> {
        let url = url.trim_end_matches('/');
        Self::read(url).map_err(|reason| Problem::NotACoordinator { url: url.to_owned(), reason: reason.to_owned() })
    }

    fn read(url: &str) -> Result<Self, &'static str> {
        let uri: Uri = url.parse().map_err(|_| "this is no URL")?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            Some(_) | None => return Err("expected a URL that begins with http:// or https://"),
        };
        let authority = uri.authority().ok_or("the URL names no host")?;
        if authority.as_str().contains('@') {
            return Err("the URL must not contain a user name");
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err("the URL must end after host and port");
        }
        Ok(Self {
            url: url.to_owned(),
            authority: authority.as_str().to_owned(),
            host: authority.host().trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            tls,
        })
    }

    pub(super) fn unreachable(&self, reason: impl Into<String>) -> Problem {
        Problem::Unreachable { url: self.url.clone(), reason: reason.into() }
    }

    fn not_a_coordinator(&self, reason: impl Into<String>) -> Problem {
        Problem::NotACoordinator { url: self.url.clone(), reason: reason.into() }
    }

    fn io(&self, error: &io::Error) -> Problem {
        let inner = error.get_ref();
        if let Some(channel) = inner.and_then(|inner| inner.downcast_ref::<ChannelError>()) {
            return Problem::Channel(channel.clone());
        }
        if let Some(rustls::Error::InvalidCertificate(reason)) = inner.and_then(|inner| inner.downcast_ref()) {
            return Problem::Certificate { url: self.url.clone(), reason: certificate_reason(reason) };
        }
        self.unreachable(error.to_string())
    }
}

/// Why a certificate is refused, with what to do about it where something can be done.
fn certificate_reason(reason: &rustls::CertificateError) -> String {
    use rustls::CertificateError as Reason;
    if matches!(reason, Reason::UnknownIssuer) {
        return "no authority that this machine trusts has signed it; name the certificate or its authority with the \
                daemon's --ca-file"
            .to_owned();
    }
    if matches!(reason, Reason::NotValidForName | Reason::NotValidForNameContext { .. }) {
        return "it is for another name or address; use the one that it is for in the URL".to_owned();
    }
    reason.to_string()
}

/// All that it takes to open a channel.
#[derive(Clone)]
pub(super) struct Dialer {
    pub(super) server: Server,
    pub(super) machine: MachinePrivate,
    /// The key from when this node joined; `None`: trust the one that is shown.
    pub(super) control: Option<MachinePublic>,
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) version: CapabilityVersion,
}

pub(super) struct Dialed {
    pub(super) sender: Sender,
    pub(super) connection: Connection,
    pub(super) control: MachinePublic,
}

impl Dialer {
    pub(super) async fn dial(self, rng: SeededRng) -> Result<Dialed, Problem> {
        let server = self.server.clone();
        tokio::time::timeout(DIAL_TIMEOUT, self.dial_without_limit(rng))
            .await
            .unwrap_or_else(|_| Err(server.unreachable(format!("no answer within {} s", DIAL_TIMEOUT.as_secs()))))
    }

    async fn dial_without_limit(self, mut rng: SeededRng) -> Result<Dialed, Problem> {
        let control = self.fetch_key().await?;
        if let Some(expected) = self.control.filter(|expected| *expected != control) {
            return Err(Problem::WrongServerKey { url: self.server.url.clone(), expected, got: control });
        }
        let (channel, initiation) = ClientChannel::start(self.version, &self.machine, &control, &mut rng)?;
        let mut transport = self.open().await?;
        let read_ahead = self.upgrade(&mut transport, &initiation_to_header(&initiation)).await?;
        let stream = NoiseStream::connect(transport, channel, &read_ahead).await.map_err(|e| self.server.io(&e))?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(20))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.server.unreachable(reason(&error)))?;
        Ok(Dialed { sender, connection, control })
    }

    /// A TCP connection, with TLS around it if the URL says so.
    async fn open(&self) -> Result<Transport, Problem> {
        let server = &self.server;
        let tcp = TcpStream::connect((server.host.as_str(), server.port)).await.map_err(|e| server.io(&e))?;
        // Small requests should not wait for one another; a socket that refuses this works all the same.
        let _ = tcp.set_nodelay(true);
        if !server.tls {
            return Ok(Box::new(tcp));
        }
        let Some(config) = &self.tls else {
            return Err(server.unreachable("this client was set up without TLS and can only use http:// addresses"));
        };
        let name = ServerName::try_from(server.host.clone())
            .map_err(|_| server.not_a_coordinator("the host is no name that a certificate can have"))?;
        let stream = TlsConnector::from(Arc::clone(config)).connect(name, tcp).await.map_err(|e| server.io(&e))?;
        Ok(Box::new(stream))
    }

    /// Asks `/key` on a connection of its own.
    async fn fetch_key(&self) -> Result<MachinePublic, Problem> {
        let server = &self.server;
        let transport = self.open().await?;
        let failed = |error: hyper::Error| {
            if error.is_parse() {
                server.not_a_coordinator("it does not speak HTTP")
            } else {
                server.unreachable(reason(&error))
            }
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(transport)).await.map_err(failed)?;
        let request = Request::get(format!("/key?v={}", self.version))
            .header(HOST, &server.authority)
            .header(USER_AGENT, USER_AGENT_TEXT)
            .body(Empty::<Bytes>::new())
            .map_err(|error| server.not_a_coordinator(error.to_string()))?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(failed)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_KEY_BODY).collect().await;
            let body = body.map_err(|_| server.not_a_coordinator("its answer to /key is cut short or too long"))?;
            Ok::<_, Problem>((status, body.to_bytes()))
        };
        // The connection ends by itself once the exchange has dropped its sender.
        let (answer, _) = tokio::join!(exchange, connection);
        let (status, body) = answer?;
        if status != StatusCode::OK {
            return Err(server.not_a_coordinator(format!("/key answers with status {}", status.as_u16())));
        }
        let keys: KeyResponse =
            wire::decode(&body).map_err(|_| server.not_a_coordinator("/key does not answer with a key"))?;
        if keys.public_key.is_zero() {
            return Err(server.not_a_coordinator("/key answers without a key; the server may be too old"));
        }
        Ok(keys.public_key)
    }

    /// Upgrades the connection and returns what was read behind the answer's head.
    async fn upgrade(&self, transport: &mut Transport, handshake: &str) -> Result<Vec<u8>, Problem> {
        let server = &self.server;
        let head = format!(
            "POST {UPGRADE_PATH} HTTP/1.1\r\nHost: {}\r\nUser-Agent: {USER_AGENT_TEXT}\r\nContent-Length: 0\r\n\
             Connection: upgrade\r\nUpgrade: {UPGRADE_PROTOCOL}\r\n{HANDSHAKE_HEADER}: {handshake}\r\n\r\n",
            server.authority
        );
        transport.write_all(head.as_bytes()).await.map_err(|e| server.io(&e))?;
        transport.flush().await.map_err(|e| server.io(&e))?;
        let mut buffer = Vec::new();
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if buffer.len() > MAX_HEAD {
                return Err(server.not_a_coordinator("its answer to the upgrade has no end"));
            }
            if transport.read_buf(&mut buffer).await.map_err(|e| server.io(&e))? == 0 {
                return Err(server.unreachable("the connection was closed during the upgrade; a proxy may not pass it"));
            }
        };
        let read_ahead = buffer.split_off(end + 4);
        check_upgrade(&buffer).map_err(|reason| server.not_a_coordinator(reason))?;
        Ok(read_ahead)
    }
}

/// Whether the head of an answer agrees to the upgrade.
fn check_upgrade(head: &[u8]) -> Result<(), String> {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).unwrap_or_default();
    if !status.starts_with("101") {
        let status: String = status.chars().filter(|c| !c.is_control()).take(60).collect();
        return Err(format!(
            "{UPGRADE_PATH} answers \"{status}\" instead of switching protocols; a proxy may not pass it"
        ));
    }
    let agrees = lines.filter_map(|line| line.split_once(':')).any(|(name, value)| {
        name.eq_ignore_ascii_case("upgrade") && value.trim().eq_ignore_ascii_case(UPGRADE_PROTOCOL)
    });
    if agrees { Ok(()) } else { Err(format!("{UPGRADE_PATH} switches to another protocol")) }
}

/// An error and its causes on one line.
pub(super) fn reason(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_host_and_port() {
        let server = Server::parse("http://[::1]:8080/").unwrap();
        assert_eq!((server.host.as_str(), server.port, server.tls), ("::1", 8080, false));
        assert_eq!(server.authority, "[::1]:8080");
        let server = Server::parse("https://control.example").unwrap();
        assert_eq!((server.host.as_str(), server.port, server.tls), ("control.example", 443, true));
        assert_eq!(Server::parse("http://h").unwrap().port, 80);
        for url in ["", "control.example", "ftp://x", "http://", "http://h/path", "http://u@h", "http://h/?q"] {
            assert!(matches!(Server::parse(url), Err(Problem::NotACoordinator { .. })), "{url}");
        }
    }

    #[test]
    fn only_101_with_the_right_token_is_an_upgrade() {
        assert_eq!(check_upgrade(b"HTTP/1.1 101 Switching\r\nUpgrade: Tailscale-Control-Protocol\r\n\r\n"), Ok(()));
        assert!(check_upgrade(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n").is_err());
        assert!(check_upgrade(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").unwrap_err().contains("502"));
        assert!(check_upgrade(b"\xff").is_err());
    }
}
