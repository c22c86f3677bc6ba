//! One relay connection, from its login to its end.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_noise::key::NodePublic;
use mesh_noise::random::SystemRng;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::outlet::Outlet;
use super::{Applicant, RelayServer};
use crate::driver::stream::Rewind;
use crate::driver::{make_room, now, random_fraction};
use crate::frame::{Frame, GoneReason};
use crate::queue::Lane;
use crate::server::{Connection, ConnectionId, Input, ServerError};
use crate::upgrade;

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

impl RelayServer {
    pub(super) async fn relay<S>(&self, stream: Rewind<S>, fast_start: bool, peer: SocketAddr)
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
            Ended::Protocol(error) => self.count_error(error),
        }
        tracing::debug!(%peer, %reason, "relay connection ended");
    }

    fn count_error(&self, error: &ServerError) {
        let counter = match error {
            ServerError::Login(_) => &self.counters.logins_refused,
            ServerError::LoginTimeout => &self.counters.logins_late,
            ServerError::Frame(_)
            | ServerError::BeforeLogin(_)
            | ServerError::SecondLogin
            | ServerError::NotARelay(_)
            | ServerError::WrongDirection(_) => &self.counters.protocol_errors,
        };
        counter.add(1);
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
                    Input::Packet { .. }
                    | Input::Ping(_)
                    | Input::Preferred(_)
                    | Input::Regional(_)
                    | Input::Nothing => continue,
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
                    Input::Login { .. } | Input::Regional(_) | Input::Nothing => {}
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
        let pushed = receiver.push(source, payload);
        match pushed.lane {
            Lane::Disco => self.counters.dropped_queue_disco.add(pushed.displaced),
            Lane::Data => self.counters.dropped_queue_data.add(pushed.displaced),
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
