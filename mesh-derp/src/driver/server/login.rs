//! The beginning of a relay connection: from the upgrade to the moment the client is let in.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use mesh_noise::key::NodePublic;
use mesh_noise::random::SystemRng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::session::{self, Running};
use super::{Applicant, RelayServer, Verdict};
use crate::driver::listener::Place;
use crate::driver::stream::{Rewind, Transport};
use crate::driver::{make_room, now};
use crate::login::ClientInfo;
use crate::server::{Connection, Input, LOGIN_TIMEOUT, ServerError};
use crate::upgrade::{self, Asked};

/// How much is read at once: a login is short.
const READ_CHUNK: usize = 4 * 1024;

/// Why a relay connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("client closed the connection")]
    Closed,
    #[error("closed by the relay")]
    Dismissed,
    #[error("its place is needed for another that may log in sooner")]
    ShownOut,
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
    /// Logs a client in and starts its connection on a shard. It gives up its `place` among those that have not logged in
    /// when it has.
    pub(super) async fn log_in(
        self: &Arc<Self>,
        stream: Rewind<Transport>,
        asked: Asked,
        peer: SocketAddr,
        place: Option<Place>,
    ) -> Option<Running> {
        self.counters.accepts.add(1);
        match self.admit(stream, asked, peer, place).await {
            Ok(running) => Some(running),
            Err(reason) => {
                self.note_end(peer, &reason);
                None
            }
        }
    }

    pub(super) fn note_end(&self, peer: SocketAddr, reason: &Ended) {
        match reason {
            Ended::Closed | Ended::Dismissed | Ended::ShownOut | Ended::Io(_) => {}
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

    fn count_verdict(&self, verdict: Verdict) {
        let counters = &self.counters;
        let counter = match verdict {
            Verdict::Admit => &counters.admitted,
            Verdict::Refuse => &counters.refused,
            Verdict::AdmitUnasked => &counters.admitted_unasked,
            Verdict::RefuseUnasked => &counters.refused_unasked,
            Verdict::RefuseMalformed => &counters.refused_malformed,
        };
        counter.add(1);
    }

    async fn admit(
        self: &Arc<Self>,
        mut stream: Rewind<Transport>,
        asked: Asked,
        peer: SocketAddr,
        mut place: Option<Place>,
    ) -> Result<Running, Ended> {
        let mut core = Connection::new(now(), self.key.clone(), &mut SystemRng);
        let mut greeting = BytesMut::new();
        if let Asked::Relay { fast_start: false, .. } = asked {
            greeting.extend_from_slice(&upgrade::accepted(&self.public));
        }
        while let Some(bytes) = core.poll_transmit() {
            greeting.extend_from_slice(&bytes);
        }
        let login = greet(&mut stream, &mut core, &greeting);
        let login = tokio::select! {
            login = tokio::time::timeout(LOGIN_TIMEOUT, login) => login,
            () = Place::needed(&mut place) => return Err(Ended::ShownOut),
        };
        let (node, info) = login.map_err(|_| ServerError::LoginTimeout)??;
        if self.is_ending() {
            return Err(Ended::Dismissed);
        }
        if let Some(place) = &place {
            place.awaits_admission();
        }
        let guest = self.guest(node, peer, &info, asked);
        if guest.is_relay() {
            core.admit_relay();
        } else {
            let verdict = self.config.admission.decide(Applicant { node, address: peer.ip() }).await;
            self.count_verdict(verdict);
            if !verdict.admits() {
                return Err(Ended::NotAdmitted);
            }
            core.admit();
        }
        tracing::debug!(%peer, node = %node.short(), "relay connection open");
        Ok(session::start(Arc::clone(self), stream, core, guest)?)
    }
}

async fn greet(
    stream: &mut Rewind<Transport>,
    core: &mut Connection,
    greeting: &[u8],
) -> Result<(NodePublic, ClientInfo), Ended> {
    stream.write_all(greeting).await?;
    stream.flush().await?;
    loop {
        if let Some(input) = core.poll_input()? {
            match input {
                Input::Login { node, info } => return Ok((node, info)),
                Input::Packet { .. } | Input::Ping(_) | Input::Preferred(_) | Input::Regional(_) | Input::Nothing => {
                    continue;
                }
            }
        }
        let buffer = core.read_buffer();
        make_room(buffer, READ_CHUNK);
        if stream.read_buf(buffer).await? == 0 {
            return Err(Ended::Closed);
        }
    }
}
