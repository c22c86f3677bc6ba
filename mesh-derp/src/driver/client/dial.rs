//! Reaching a relay: name, TCP, TLS, HTTP.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_noise::key::RelayPublic;
use rustls::ProtocolVersion;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::super::stream::{Rewind, Transport};
use super::super::{now, tune};
use crate::map::{DerpNode, DerpRegion, FamilyAddress};
use crate::tls::{ClientTls, TlsError, server_name};
use crate::upgrade::{self, HttpError, ResponseHead};
use crate::x509;

/// For one TCP connection.
const TCP_TIMEOUT: Duration = Duration::from_millis(1500);
/// For everything, from looking up the name to the relay's answer, at one node.
const NODE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why no relay of a region could be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The region has no node that relays.
    #[error("region has no relay")]
    NoRelay,
    /// A name could not be looked up, or gives no address of a usable family.
    #[error("{host}: no address: {reason}")]
    Lookup {
        /// The name.
        host: String,
        /// Why.
        reason: String,
    },
    /// No TCP connection.
    #[error("{address}: {source}")]
    Tcp {
        /// Where to.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The relay's certificate is not what the DERP map demands, or TLS failed otherwise.
    #[error("{host}: tls: {source}")]
    Tls {
        /// The relay.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// TLS could not be set up.
    #[error(transparent)]
    Setup(#[from] TlsError),
    /// The connection broke while asking.
    #[error("{host}: {source}")]
    Io {
        /// The relay.
        host: String,
        /// Why.
        source: std::io::Error,
    },
    /// The answer is not HTTP.
    #[error("{host}: {source}")]
    Http {
        /// The relay.
        host: String,
        /// Why.
        source: HttpError,
    },
    /// The answer is a refusal.
    #[error("{host}: answered {status} and not {expected}")]
    Refused {
        /// The relay.
        host: String,
        /// The status code.
        status: u16,
        /// The one that was needed.
        expected: u16,
    },
    /// It took too long.
    #[error("{host}: no relay connection within {} s", NODE_TIMEOUT.as_secs())]
    Timeout {
        /// The relay.
        host: String,
    },
}

/// A stream on which frames begin.
pub(crate) struct Link {
    pub(crate) node: String,
    pub(crate) stream: Rewind<Transport>,
    /// The relay's key, where TLS has told it.
    pub(crate) relay: Option<RelayPublic>,
    /// What has to be sent before the first frame.
    pub(crate) first: Vec<u8>,
}

/// Connects to the first relay of the region that works, in the map's order.
pub(crate) async fn dial(region: DerpRegion, tls: ClientTls) -> Result<Link, DialError> {
    let preferred = region.nodes.first().map(|node| node.name.clone());
    let mut last = DialError::NoRelay;
    for node in region.relays() {
        let ideal = preferred.as_deref().filter(|name| *name != node.name);
        match timeout(NODE_TIMEOUT, upgrade_to(node, &tls, ideal)).await {
            Ok(Ok(link)) => return Ok(link),
            Ok(Err(error)) => last = error,
            Err(_) => last = DialError::Timeout { host: node.host_name.clone() },
        }
    }
    Err(last)
}

async fn upgrade_to(node: &DerpNode, tls: &ClientTls, ideal: Option<&str>) -> Result<Link, DialError> {
    let (mut transport, relay) = connect(node, tls).await?;
    let request = upgrade::request(&host_header(node, tls), relay.is_some(), ideal);
    let name = node.name.clone();
    if relay.is_some() {
        return Ok(Link { node: name, stream: Rewind::new(Bytes::new(), transport), relay, first: request });
    }
    let (head, rest) = ask(&mut transport, node, &request).await?;
    if head.status != 101 {
        return Err(DialError::Refused { host: node.host_name.clone(), status: head.status, expected: 101 });
    }
    Ok(Link { node: name, stream: Rewind::new(rest, transport), relay: None, first: Vec::new() })
}

/// Measures how long a relay of the region takes to answer a small request over an established connection.
///
/// Connecting is not counted. At most 5 s, connecting included.
///
/// # Errors
/// If no relay of the region answers.
pub async fn latency_check(region: &DerpRegion, tls: &ClientTls) -> Result<Duration, DialError> {
    let mut last = DialError::NoRelay;
    for node in region.relays() {
        match timeout(Duration::from_secs(5), measure(node, tls)).await {
            Ok(Ok(latency)) => return Ok(latency),
            Ok(Err(error)) => last = error,
            Err(_) => last = DialError::Timeout { host: node.host_name.clone() },
        }
    }
    Err(last)
}

async fn measure(node: &DerpNode, tls: &ClientTls) -> Result<Duration, DialError> {
    let (mut transport, _) = connect(node, tls).await?;
    let request =
        format!("GET /derp/latency-check HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", host_header(node, tls));
    let before = now();
    let (head, _) = ask(&mut transport, node, request.as_bytes()).await?;
    let latency = now().duration_since(before);
    if head.status != 200 {
        return Err(DialError::Refused { host: node.host_name.clone(), status: head.status, expected: 200 });
    }
    Ok(latency)
}

fn host_header(node: &DerpNode, tls: &ClientTls) -> String {
    let usual = if tls.is_plain() { 80 } else { 443 };
    let host = &node.host_name;
    let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.clone() };
    if node.relay_port() == usual { host } else { format!("{host}:{}", node.relay_port()) }
}

async fn ask(transport: &mut Transport, node: &DerpNode, request: &[u8]) -> Result<(ResponseHead, Bytes), DialError> {
    let host = || node.host_name.clone();
    let io = |source| DialError::Io { host: host(), source };
    transport.write_all(request).await.map_err(io)?;
    transport.flush().await.map_err(io)?;
    let mut bytes = BytesMut::new();
    loop {
        let parsed = upgrade::parse_response(&bytes).map_err(|source| DialError::Http { host: host(), source })?;
        if let Some((head, len)) = parsed {
            return Ok((head, bytes.split_off(len).freeze()));
        }
        if transport.read_buf(&mut bytes).await.map_err(io)? == 0 {
            return Err(io(std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// TCP and, unless plain, TLS. The key is the relay's, if a meta-certificate told it under TLS 1.3.
async fn connect(node: &DerpNode, tls: &ClientTls) -> Result<(Transport, Option<RelayPublic>), DialError> {
    let tcp = connect_tcp(node).await?;
    if tls.is_plain() {
        return Ok((Transport::Plain(tcp), None));
    }
    let config = tls.for_node(node)?;
    let connector = TlsConnector::from(config);
    let secured = connector.connect(server_name(&node.host_name)?, tcp.into()).await;
    let secured = secured.map_err(|source| DialError::Tls { host: node.host_name.clone(), source })?;
    let session = secured.get_ref().1;
    let private = session.protocol_version() == Some(ProtocolVersion::TLSv1_3);
    let shown = session.peer_certificates().unwrap_or_default();
    let relay = shown.iter().find_map(|certificate| x509::meta(certificate));
    let relay = relay.filter(|(_, version)| private && *version != 0).map(|(key, _)| key);
    Ok((Transport::Tls(Box::new(secured.into())), relay))
}

async fn connect_tcp(node: &DerpNode) -> Result<TcpStream, DialError> {
    let addresses = addresses(node).await?;
    let mut last = None;
    for address in addresses {
        let connected = timeout(TCP_TIMEOUT, TcpStream::connect(address)).await;
        match connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                tune(&stream);
                return Ok(stream);
            }
            Err(source) => last = Some(DialError::Tcp { address, source }),
        }
    }
    Err(last.unwrap_or_else(|| no_address(node, "none of a usable family")))
}

fn no_address(node: &DerpNode, reason: &str) -> DialError {
    DialError::Lookup { host: node.host_name.clone(), reason: reason.to_owned() }
}

/// Where to connect: what the map says, and what the name gives for families about which it says nothing. IPv4 first.
async fn addresses(node: &DerpNode) -> Result<Vec<SocketAddr>, DialError> {
    let (v4, v6) = (node.v4(), node.v6());
    let mut found: Vec<IpAddr> = Vec::new();
    if let FamilyAddress::At(ip) = v4 {
        found.push(ip.into());
    }
    if let FamilyAddress::At(ip) = v6 {
        found.push(ip.into());
    }
    let (want_v4, want_v6) = (v4 == FamilyAddress::Lookup, v6 == FamilyAddress::Lookup);
    if want_v4 || want_v6 {
        let bare = node.host_name.trim_start_matches('[').trim_end_matches(']');
        match tokio::net::lookup_host((bare, node.relay_port())).await {
            Ok(looked_up) => {
                found.extend(looked_up.map(|a| a.ip()).filter(|ip| if ip.is_ipv4() { want_v4 } else { want_v6 }));
            }
            Err(error) if found.is_empty() => return Err(no_address(node, &error.to_string())),
            Err(_) => {}
        }
    }
    found.sort_by_key(IpAddr::is_ipv6);
    Ok(found.into_iter().map(|ip| SocketAddr::new(ip, node.relay_port())).collect())
}
