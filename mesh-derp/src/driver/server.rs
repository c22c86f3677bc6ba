//! The relay: what answers the requests that a [`listener`](super::listener) has read.
//!
//! | path | answer |
//! |---|---|
//! | `/derp` | becomes a relay connection (101, or silence with `Derp-Fast-Start: 1`); 426 without `Upgrade: DERP` |
//! | `/derp/probe`, `/derp/latency-check` | 200, empty, for any origin; 405 unless GET or HEAD |
//! | `/generate_204` | 204; echoes `X-Tailscale-Challenge` of 1 to 64 characters `A-Za-z0-9._:-` |
//! | `/robots.txt` | nothing is to be indexed |
//! | `/` | a line saying what this is |
//! | anything else | 404 |
//!
//! A connection that was answered may ask again; clients measure latency that way.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_noise::key::{NodePublic, RelayPrivate, RelayPublic};
use mesh_noise::random::SystemRng;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::stream::{Rewind, read_request_head};
use super::{make_room, now, random_fraction};
use crate::frame::{Frame, GoneReason};
use crate::queue::{Depth, Lane};
use crate::server::{Connection, ConnectionId, Input, Registry, ServerError};
use crate::upgrade::{self, Asked, RequestHead};

mod admission;
mod counters;
mod outlet;

pub use admission::{Admission, AllowAll, AllowList, Applicant};
use counters::Atomics;
pub use counters::Counters;
use outlet::Outlet;

/// A relay's settings. The defaults suit a public relay.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who may use it. Everybody, by default.
    pub admission: Arc<dyn Admission>,
    /// How much waits for each receiver.
    pub queue: Depth,
    /// How often something is sent, so that clients know the connection is alive; up to 5 s are added at random, once a
    /// connection. Official clients give up after 120 s without a frame. 60 s.
    pub keep_alive: Duration,
    /// How long a receiver may take no byte before it is let go. 10 s.
    pub write_stall: Duration,
    /// How long an answered HTTP connection may be silent. 30 s.
    pub idle_http: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            admission: Arc::new(AllowAll),
            queue: Depth::default(),
            keep_alive: Duration::from_secs(60),
            write_stall: Duration::from_secs(10),
            idle_http: Duration::from_secs(30),
        }
    }
}

/// How much is read from a connection at once.
const READ_CHUNK: usize = 16 * 1024;

/// Why a relay connection ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum Ended {
    #[error("client closed the connection")]
    Closed,
    #[error("closed by the relay")]
    Dismissed,
    #[error("client not admitted")]
    NotAdmitted,
    #[error("client takes no data")]
    Stalled,
    #[error(transparent)]
    Protocol(#[from] ServerError),
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
}

/// A relay. See the [module doc](self).
#[derive(Debug)]
pub struct RelayServer {
    key: RelayPrivate,
    public: RelayPublic,
    config: Config,
    registry: RwLock<Registry<Arc<Outlet>>>,
    counters: Atomics,
}

impl RelayServer {
    /// A relay with that identity and nobody connected.
    #[must_use]
    pub fn new(key: RelayPrivate, config: Config) -> Arc<Self> {
        let public = key.public();
        let (registry, counters) = (RwLock::new(Registry::new()), Atomics::default());
        Arc::new(Self { key, public, config, registry, counters })
    }

    /// Its public key.
    #[must_use]
    pub const fn public(&self) -> &RelayPublic {
        &self.public
    }

    /// Whether a request is the relay's to answer, for a port that serves other things as well.
    #[must_use]
    pub fn handles(head: &RequestHead) -> bool {
        matches!(head.path(), "/derp" | "/derp/probe" | "/derp/latency-check" | "/generate_204" | "/robots.txt")
    }

    /// What has been counted since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let registry = self.registry();
        self.counters.snapshot(registry.connections(), registry.nodes())
    }

    /// Whether a node is connected.
    #[must_use]
    pub fn is_connected(&self, node: &NodePublic) -> bool {
        self.registry().route(node).is_some()
    }

    /// Ends all relay connections, and with them their [`RelayServer::serve`] futures.
    pub fn close_all(&self) {
        for outlet in self.registry().handles() {
            outlet.close();
        }
    }

    /// Ends the connections of a node that may no longer use the relay.
    pub fn disconnect(&self, node: &NodePublic) {
        for outlet in self.registry().handles() {
            if outlet.node() == node {
                outlet.close();
            }
        }
    }

    /// Answers the request whose `head` was read from `stream`, and those that follow on the same connection, until it
    /// ends. Never fails: why a connection ended is a trace line and a counter.
    pub async fn serve<S>(self: Arc<Self>, stream: S, head: RequestHead, peer_addr: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let (mut stream, mut head) = (Rewind::new(Bytes::new(), stream), head);
        loop {
            if head.path() == "/derp" {
                match upgrade::asked(&head) {
                    Asked::Relay { fast_start, .. } => return self.relay(stream, fast_start, peer_addr).await,
                    Asked::WebSocket | Asked::NoUpgrade => {}
                }
            }
            let keep = head.keeps_alive()
                && head.header("transfer-encoding").is_none()
                && head.header("content-length").is_none_or(|length| length == "0");
            let answer = answer(&head, keep);
            let written = async {
                stream.write_all(&answer).await?;
                stream.flush().await
            };
            if !matches!(timeout(self.config.write_stall, written).await, Ok(Ok(()))) || !keep {
                let _ = timeout(self.config.write_stall, stream.shutdown()).await;
                return;
            }
            match timeout(self.config.idle_http, read_request_head(&mut stream)).await {
                Ok(Ok(Some((next, _, rest)))) => {
                    stream.unread(rest);
                    head = next;
                }
                Ok(Ok(None) | Err(_)) | Err(_) => return,
            }
        }
    }

    async fn relay<S>(&self, stream: Rewind<S>, fast_start: bool, peer: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        self.counters.accepts.add(1);
        let ended = self.relay_until_end(stream, fast_start, peer).await;
        let Err(reason) = ended;
        match &reason {
            Ended::Closed | Ended::Dismissed | Ended::Io(_) => {}
            Ended::NotAdmitted => self.counters.not_admitted.add(1),
            Ended::Stalled => self.counters.stalled.add(1),
            Ended::Protocol(_) => self.counters.protocol_errors.add(1),
        }
        tracing::debug!(%peer, %reason, "relay connection ended");
    }

    async fn relay_until_end<S>(
        &self,
        mut stream: Rewind<S>,
        fast_start: bool,
        peer: SocketAddr,
    ) -> Result<std::convert::Infallible, Ended>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let mut core = Connection::new(now(), self.key.clone(), &mut SystemRng);
        let mut greeting = BytesMut::new();
        if !fast_start {
            greeting.extend_from_slice(&upgrade::accepted(&self.public));
        }
        while let Some(bytes) = core.poll_transmit() {
            greeting.extend_from_slice(&bytes);
        }
        let node = {
            let login = self.log_in(&mut stream, &mut core, &greeting);
            let deadline = tokio::time::sleep(crate::server::LOGIN_TIMEOUT);
            tokio::select! {
                node = login => node?,
                () = deadline => return Err(ServerError::LoginTimeout.into()),
            }
        };
        if !self.config.admission.admit(Applicant { node, address: peer.ip() }).await {
            return Err(Ended::NotAdmitted);
        }
        core.admit();
        let outlet = Arc::new(Outlet::new(node, self.config.queue));
        let id = self.registry_mut().register(node, Arc::clone(&outlet));
        let registration = Registration { server: self, id, outlet: &outlet };
        tracing::debug!(%peer, node = %node.short(), "relay connection open");
        let mut first = BytesMut::new();
        while let Some(bytes) = core.poll_transmit() {
            first.extend_from_slice(&bytes);
        }
        let (reader, writer) = tokio::io::split(stream);
        let result = tokio::select! {
            ended = self.read(reader, core, node, &registration) => ended,
            ended = self.write(writer, first, &outlet) => ended,
            () = outlet.closed() => Err(Ended::Dismissed),
        };
        drop(registration);
        result
    }

    async fn log_in<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut Rewind<S>,
        core: &mut Connection,
        greeting: &[u8],
    ) -> Result<NodePublic, Ended> {
        stream.write_all(greeting).await?;
        stream.flush().await?;
        loop {
            if let Some(input) = core.poll_input()? {
                match input {
                    Input::Login { node, .. } => return Ok(node),
                    Input::Packet { .. } | Input::Ping(_) | Input::Preferred(_) | Input::Nothing => continue,
                }
            }
            let buffer = core.read_buffer();
            make_room(buffer, READ_CHUNK);
            if stream.read_buf(buffer).await? == 0 {
                return Err(Ended::Closed);
            }
        }
    }

    async fn read<R: AsyncRead + Unpin>(
        &self,
        mut reader: R,
        mut core: Connection,
        node: NodePublic,
        registration: &Registration<'_>,
    ) -> Result<std::convert::Infallible, Ended> {
        let Registration { id, outlet, .. } = *registration;
        let (mut given, mut skipped) = (HashSet::new(), 0);
        loop {
            while let Some(input) = core.poll_input()? {
                self.counters.frames_in.add(1);
                self.note_active(id);
                match input {
                    Input::Packet { destination, payload } => {
                        self.pass_on(&mut core, node, destination, payload, outlet, &mut given);
                    }
                    Input::Ping(data) => {
                        self.counters.pings.add(1);
                        outlet.pong(data);
                    }
                    Input::Preferred(home) => outlet.set_home(home, &self.counters),
                    Input::Login { .. } | Input::Nothing => {}
                }
            }
            self.counters.frames_unknown.add(core.skipped() - skipped);
            skipped = core.skipped();
            let buffer = core.read_buffer();
            make_room(buffer, READ_CHUNK);
            if reader.read_buf(buffer).await? == 0 {
                return Err(Ended::Closed);
            }
        }
    }

    fn pass_on(
        &self,
        core: &mut Connection,
        source: NodePublic,
        destination: NodePublic,
        payload: Bytes,
        own: &Outlet,
        given: &mut HashSet<ConnectionId>,
    ) {
        self.counters.packets_in.add(1);
        self.counters.bytes_in.add(payload.len() as u64);
        let found = self.registry().route(&destination).map(|(id, outlet)| (id, Arc::clone(outlet)));
        let Some((id, receiver)) = found else {
            self.counters.dropped_unknown.add(1);
            if Lane::of(&payload) == Lane::Disco && core.may_report_missing(now()) {
                self.counters.peer_gone.add(1);
                own.tell(Frame::PeerGone { peer: destination, reason: GoneReason::NotHere });
            }
            return;
        };
        if given.insert(id) {
            // Identifiers are never used twice, so a long-lived sender's list would grow with every reconnect.
            if given.len() > 16 * 1024 {
                given.clear();
            }
            self.registry_mut().note_heard(id, source);
        }
        let (lane, displaced) = receiver.push(source, payload);
        match lane {
            Lane::Disco => self.counters.dropped_queue_disco.add(displaced),
            Lane::Data => self.counters.dropped_queue_data.add(displaced),
        }
    }

    fn note_active(&self, id: ConnectionId) {
        let shadowed = self.registry().is_shadowed(id);
        if shadowed {
            self.registry_mut().touch(id);
        }
    }

    async fn write<W: AsyncWrite + Unpin>(
        &self,
        mut writer: W,
        mut out: BytesMut,
        outlet: &Outlet,
    ) -> Result<std::convert::Infallible, Ended> {
        let period = self.config.keep_alive + Duration::from_secs(5).mul_f64(random_fraction());
        let mut keep_alive = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
        keep_alive.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            outlet.fill(&mut out, &self.counters);
            if out.is_empty() {
                tokio::select! {
                    () = outlet.ready() => {}
                    _ = keep_alive.tick() => {
                        self.counters.frames_out.add(1);
                        Frame::KeepAlive.encode(&mut out);
                    }
                }
                continue;
            }
            while !out.is_empty() {
                let written = timeout(self.config.write_stall, writer.write_buf(&mut out)).await;
                if written.map_err(|_| Ended::Stalled)?? == 0 {
                    return Err(Ended::Closed);
                }
            }
            timeout(self.config.write_stall, writer.flush()).await.map_err(|_| Ended::Stalled)??;
        }
    }

    fn registry(&self) -> RwLockReadGuard<'_, Registry<Arc<Outlet>>> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn registry_mut(&self) -> RwLockWriteGuard<'_, Registry<Arc<Outlet>>> {
        self.registry.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place in the registry, given up when its future ends or is dropped.
struct Registration<'a> {
    server: &'a RelayServer,
    id: ConnectionId,
    outlet: &'a Arc<Outlet>,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        let departure = self.server.registry_mut().unregister(self.id);
        let counters = &self.server.counters;
        counters.dropped_gone.add(self.outlet.abandon(counters));
        if let Some(departure) = departure {
            for listener in departure.heard_by {
                counters.peer_gone.add(1);
                listener.tell(Frame::PeerGone { peer: departure.node, reason: GoneReason::Disconnected });
            }
        }
    }
}

fn answer(head: &RequestHead, keep: bool) -> Vec<u8> {
    let head_only = head.method == "HEAD";
    let reading = head_only || head.method == "GET";
    let connection = ("Connection", if keep { "keep-alive" } else { "close" });
    let text = ("Content-Type", "text/plain; charset=utf-8");
    match head.path() {
        "/derp" => {
            upgrade::response(426, "Upgrade Required", &[text, connection], "DERP requires an upgrade\n", head_only)
        }
        "/derp/probe" | "/derp/latency-check" if reading => {
            upgrade::response(200, "OK", &[("Access-Control-Allow-Origin", "*"), connection], "", head_only)
        }
        "/derp/probe" | "/derp/latency-check" => {
            upgrade::response(405, "Method Not Allowed", &[text, connection], "GET or HEAD only\n", head_only)
        }
        "/generate_204" => {
            let echo = head.header("x-tailscale-challenge").filter(|challenge| is_challenge(challenge));
            let echo = echo.map(|challenge| format!("response {challenge}"));
            let mut headers =
                vec![("Cache-Control", "no-cache, no-store, must-revalidate, no-transform, max-age=0"), connection];
            if let Some(echo) = &echo {
                headers.push(("X-Tailscale-Response", echo));
            }
            upgrade::response(204, "No Content", &headers, "", true)
        }
        "/robots.txt" => upgrade::response(200, "OK", &[text, connection], "User-agent: *\nDisallow: /\n", head_only),
        "/" => upgrade::response(200, "OK", &[text, connection], "This is a mesh relay (DERP).\n", head_only),
        _ => upgrade::response(404, "Not Found", &[text, connection], "not found\n", head_only),
    }
}

fn is_challenge(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-".contains(&b))
}

/// Takes the relay key kept in `state_dir`, or makes one and keeps it there (`relay.key`, readable by its owner only).
///
/// # Errors
/// If the directory cannot be used or what is kept in it is no key.
pub fn load_or_generate_key(state_dir: &Path) -> io::Result<RelayPrivate> {
    let path = state_dir.join("relay.key");
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|error| named(io::Error::new(io::ErrorKind::InvalidData, error))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = RelayPrivate::generate(&mut SystemRng);
            super::write_private_file(&path, key.to_secret_text().as_bytes()).map_err(named)?;
            Ok(key)
        }
        Err(error) => Err(named(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_kept_and_damage_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let made = load_or_generate_key(dir.path()).unwrap();
        assert_eq!(load_or_generate_key(dir.path()).unwrap().public(), made.public());
        std::fs::write(dir.path().join("relay.key"), "privkey:12").unwrap();
        let error = load_or_generate_key(dir.path()).unwrap_err().to_string();
        assert!(error.contains("relay.key: expected 64 hexadecimal digits"), "{error}");
    }

    #[test]
    fn challenges_are_filtered() {
        assert!(is_challenge("ts_relay.example:443-x".replace('_', "-").as_str()));
        assert!(!is_challenge("") && !is_challenge("a b") && !is_challenge(&"a".repeat(65)));
    }
}
