//! The steps of one attempt: name, TCP or a proxy's tunnel, TLS, HTTP.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_noise::key::RelayPublic;
use mesh_noise::random::SystemRng;
use rand_core::Rng as _;
use rustls::ProtocolVersion;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{Carriage, DialError, Reach};
use crate::client::dialling::{Attempt, History, Target, Via, ideal};
use crate::driver::stream::{Rewind, Transport};
use crate::driver::tls_stream::{Peer, TlsStream};
use crate::driver::websocket::WebSocket;
use crate::driver::{CLIENT_PATIENCE, now, tune};
use crate::map::DerpNode;
use crate::proxy::Proxy;
use crate::tls::{ClientTls, server_name};
use crate::upgrade::{self, HttpError, ResponseHead};
use crate::websocket::{self, Role};
use crate::x509;

/// A stream on which frames begin.
pub(crate) struct Link {
    /// The node's place in the region.
    pub(crate) node: usize,
    pub(crate) via: Via,
    pub(crate) stream: Rewind<Transport>,
    /// The relay's key, where TLS has told it.
    pub(crate) relay: Option<RelayPublic>,
    /// What has to be sent before the first frame.
    pub(crate) first: Vec<u8>,
}

/// What a node's name gives.
pub(super) async fn look_up(node: &DerpNode) -> Result<Vec<IpAddr>, DialError> {
    let bare = node.host_name.trim_start_matches('[').trim_end_matches(']');
    let found = tokio::net::lookup_host((bare, node.relay_port())).await;
    let failed = |reason: String| DialError::Lookup { host: node.host_name.clone(), reason };
    let found: Vec<IpAddr> = found.map_err(|error| failed(error.to_string()))?.map(|address| address.ip()).collect();
    if found.is_empty() { Err(failed("the name has none".to_owned())) } else { Ok(found) }
}

/// A connection to the relay, or to where a proxy lets it out.
pub(super) async fn connect(reach: &Reach, attempt: Attempt) -> Result<Transport, DialError> {
    let node = &reach.region.nodes[attempt.node];
    match (attempt.target, reach.proxies.for_node(node)) {
        (Target::Address(address), _) => {
            let tcp = TcpStream::connect(address).await.map_err(|source| DialError::Tcp { address, source })?;
            tune(&tcp, CLIENT_PATIENCE);
            Ok(Transport::Plain(tcp))
        }
        (Target::Proxy, Some(proxy)) => tunnel(proxy, node, &reach.tls).await,
        (Target::Proxy, None) => Err(DialError::NoRelay),
    }
}

/// Has a proxy connect to the relay, by its name: the proxy may know others than we do.
async fn tunnel(proxy: &Proxy, node: &DerpNode, tls: &ClientTls) -> Result<Transport, DialError> {
    let label = || format!("proxy {proxy}");
    let tcp = TcpStream::connect((proxy.host(), proxy.port())).await;
    let tcp = tcp.map_err(|source| DialError::Io { host: label(), source })?;
    tune(&tcp, CLIENT_PATIENCE);
    let mut transport = if proxy.is_tls() {
        let secured = TlsStream::connect(tls.https(&[])?, server_name(proxy.host())?, tcp).await;
        let (secured, _) = secured.map_err(|source| DialError::Tls { host: label(), source })?;
        Transport::Tls(Box::new(secured))
    } else {
        Transport::Plain(tcp)
    };
    let request = proxy.request(&node.host_name, node.relay_port());
    let (head, rest) = ask(&mut transport, &request).await.map_err(|error| error.at(label()))?;
    let proxy_name = proxy.to_string();
    match head.status {
        200 if rest.is_empty() => Ok(transport),
        200 => Ok(Transport::Other(Box::new(Rewind::new(rest, transport)))),
        407 if proxy.has_login() => Err(DialError::ProxyRefusesLogin { proxy: proxy_name }),
        407 => Err(DialError::ProxyWantsLogin { proxy: proxy_name }),
        status => Err(DialError::ProxyRefused { proxy: proxy_name, status, host: node.host_name.clone() }),
    }
}

/// TLS, unless plain. The key is the relay's, if a meta-certificate told it under TLS 1.3.
async fn secure(
    transport: Transport,
    node: &DerpNode,
    tls: &ClientTls,
) -> Result<(Transport, Option<RelayPublic>), DialError> {
    if tls.is_plain() {
        return Ok((transport, None));
    }
    let (config, name) = (tls.for_node(node)?, server_name(&node.host_name)?);
    let failed = |source| DialError::Tls { host: node.host_name.clone(), source };
    if let Transport::Plain(tcp) = transport {
        let (secured, peer) = TlsStream::connect(config, name, tcp).await.map_err(failed)?;
        return Ok((Transport::Tls(Box::new(secured)), relay_key(&peer)));
    }
    let (secured, peer) = TlsStream::connect(config, name, transport).await.map_err(failed)?;
    Ok((Transport::Other(Box::new(secured)), relay_key(&peer)))
}

fn relay_key(peer: &Peer) -> Option<RelayPublic> {
    let private = peer.version == ProtocolVersion::TLSv1_3;
    let relay = peer.certificates.iter().find_map(|certificate| x509::meta(certificate));
    relay.filter(|(_, version)| private && *version != 0).map(|(key, _)| key)
}

/// Asks for a relay connection, and for one inside WebSocket messages if that alone is wanted or gets through.
pub(super) async fn open(
    reach: Arc<Reach>,
    history: Arc<History>,
    attempt: Attempt,
    transport: Transport,
) -> Result<Link, DialError> {
    let node = &reach.region.nodes[attempt.node];
    let better = ideal(&reach.region).filter(|ideal| *ideal != attempt.node).map(|ideal| &reach.region.nodes[ideal]);
    let ideal_node = better.map(|node| node.name.as_str());
    let (mut transport, relay) = secure(transport, node, &reach.tls).await?;
    let mut via = Via { v6: None, websocket: false };
    if let Target::Address(address) = attempt.target {
        via.v6 = Some(address.is_ipv6());
    }
    if reach.carriage == Carriage::WebSocket || history.prefers_websocket(&node.name) {
        return open_websocket(&reach, attempt, transport, via, ideal_node).await;
    }
    let request = upgrade::request(&host_header(node, &reach.tls), relay.is_some(), ideal_node);
    if relay.is_some() {
        let stream = Rewind::new(Bytes::new(), transport);
        return Ok(Link { node: attempt.node, via, stream, relay, first: request });
    }
    let (head, rest) = ask(&mut transport, &request).await.map_err(|error| error.at(node.host_name.clone()))?;
    if head.status == 101 {
        let stream = Rewind::new(rest, transport);
        return Ok(Link { node: attempt.node, via, stream, relay: None, first: Vec::new() });
    }
    // Something in between speaks HTTP, and may know WebSocket better than DERP.
    let again = async {
        let transport = connect(&reach, attempt).await?;
        let (transport, _) = secure(transport, node, &reach.tls).await?;
        open_websocket(&reach, attempt, transport, via, ideal_node).await
    };
    again.await.map_err(|error| {
        tracing::debug!(node = %node.name, %error, "nor does a websocket get through");
        DialError::Refused { host: node.host_name.clone(), status: head.status, expected: 101 }
    })
}

async fn open_websocket(
    reach: &Reach,
    attempt: Attempt,
    mut transport: Transport,
    via: Via,
    ideal_node: Option<&str>,
) -> Result<Link, DialError> {
    let node = &reach.region.nodes[attempt.node];
    let mut nonce = [0; 16];
    SystemRng.fill_bytes(&mut nonce);
    let request = websocket::request(&host_header(node, &reach.tls), nonce, ideal_node);
    let (head, rest) = ask(&mut transport, &request).await.map_err(|error| error.at(node.host_name.clone()))?;
    if head.status != 101 {
        return Err(DialError::Refused { host: node.host_name.clone(), status: head.status, expected: 101 });
    }
    let opened = websocket::check_response(&head, nonce);
    opened.map_err(|source| DialError::WebSocket { host: node.host_name.clone(), source })?;
    let carried = WebSocket::new(Rewind::new(rest, transport), Role::Client);
    let stream = Rewind::new(Bytes::new(), Transport::Other(Box::new(carried)));
    Ok(Link { node: attempt.node, via: Via { websocket: true, ..via }, stream, relay: None, first: Vec::new() })
}

/// The time that a small request takes.
pub(super) async fn measure(reach: Arc<Reach>, attempt: Attempt, transport: Transport) -> Result<Duration, DialError> {
    let node = &reach.region.nodes[attempt.node];
    let (mut transport, _) = secure(transport, node, &reach.tls).await?;
    let host = host_header(node, &reach.tls);
    let request = format!("GET /derp/latency-check HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let before = now();
    let answer = ask(&mut transport, request.as_bytes()).await;
    let latency = now().duration_since(before);
    let (head, _) = answer.map_err(|error| error.at(node.host_name.clone()))?;
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

enum AskError {
    Io(std::io::Error),
    Http(HttpError),
}

impl AskError {
    fn at(self, host: String) -> DialError {
        match self {
            Self::Io(source) => DialError::Io { host, source },
            Self::Http(source) => DialError::Http { host, source },
        }
    }
}

/// Sends a request and reads the head of the answer; what follows it comes along.
async fn ask(transport: &mut Transport, request: &[u8]) -> Result<(ResponseHead, Bytes), AskError> {
    transport.write_all(request).await.map_err(AskError::Io)?;
    transport.flush().await.map_err(AskError::Io)?;
    let mut bytes = BytesMut::new();
    loop {
        if let Some((head, len)) = upgrade::parse_response(&bytes).map_err(AskError::Http)? {
            return Ok((head, bytes.split_off(len).freeze()));
        }
        if transport.read_buf(&mut bytes).await.map_err(AskError::Io)? == 0 {
            return Err(AskError::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
}
