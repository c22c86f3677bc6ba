//! `POST /machine/map`: reports from nodes, and the stream of maps to them (control.md §5).

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use mesh_noise::key::NodePublic;
use rand_core::Rng;
use tokio::sync::mpsc;

use super::http::{Answer, body, empty, text};
use super::machine::{Peer, too_old};
use super::{CommandError, Coordinator, now};
use crate::server::mapper::{self, MapStream, Next, NoMap, Notice};
use crate::server::presence::PollId;
use crate::server::state::Update;
use crate::server::{Actor, NodeId};
use crate::wire::frame::{Compression, pack};
use crate::wire::{self, MapRequest, MapResponse, Timestamp};
use mesh_noise::random::SystemRng;

pub(super) async fn answer(coordinator: &Arc<Coordinator>, peer: &Peer, request: MapRequest) -> Answer {
    if let Some(refusal) = too_old(request.version) {
        return refusal;
    }
    // A stranger learns no more about a key than that it is not its own.
    let node = coordinator.read(|view| view.state.node_by_key(&request.node_key).cloned());
    let Some(node) = node.filter(|node| node.machine == peer.machine) else {
        return text(StatusCode::NOT_FOUND, "this machine has no node with this key; log in again\n");
    };
    if !request.read_only
        && let Err(error) = report(coordinator, peer, node.id, node.endpoints.is_empty(), &request).await
    {
        return text(StatusCode::SERVICE_UNAVAILABLE, &format!("{error}\n"));
    }
    let compression = Compression::asked(&request.compress);
    match (request.stream, request.omit_peers, request.read_only) {
        (true, _, _) => stream(coordinator, node.id, request.node_key, compression),
        (false, true, false) => empty(StatusCode::OK),
        (false, true, true) => once(coordinator.read(|view| mapper::only_self(view, node.id)), compression),
        (false, false, _) => once(coordinator.read(|view| mapper::full(view, node.id)), compression),
    }
}

/// Takes over what the request says about its node.
///
/// A map poll says little: endpoints and host information come in requests of their own, which may arrive before it.
async fn report(
    coordinator: &Arc<Coordinator>,
    peer: &Peer,
    id: NodeId,
    endpoints_unknown: bool,
    request: &MapRequest,
) -> Result<(), CommandError> {
    let polls = request.stream;
    let update = Update {
        version: Some(request.version.0),
        disco_key: Some(request.disco_key),
        endpoints: (!polls || (endpoints_unknown && !request.endpoints.is_empty())).then(|| request.endpoints.clone()),
        hostinfo: request.hostinfo.as_deref().filter(|_| !polls).cloned(),
    };
    let outcome =
        coordinator.execute(Actor::Machine(peer.machine), |state, context, _| state.update(context, id, update)).await;
    match outcome {
        // Deleted a moment ago: the answer will say so.
        Err(CommandError::Refused(_)) => Ok(()),
        other => other,
    }
}

/// One message, then the end.
fn once(map: Result<MapResponse, NoMap>, compression: Compression) -> Answer {
    match map.ok().and_then(|map| pack(&wire::encode(&map), compression).ok()) {
        Some(frame) => body(StatusCode::OK, frame.into()),
        None => text(StatusCode::NOT_FOUND, "this node does not exist any more\n"),
    }
}

/// Starts a map poll. Its messages are made by a task of their own, one at a time, as fast as the client takes them.
fn stream(coordinator: &Arc<Coordinator>, node: NodeId, key: NodePublic, compression: Compression) -> Answer {
    let poll = {
        let mut core = coordinator.core();
        let opened = core.presence.open(node);
        if opened.came_online {
            core.log.push(Notice::Presence(node));
        }
        opened.poll
    };
    // Peers learn that it is online, an older poll of the same node learns that it is replaced.
    coordinator.announce();
    let (frames, queue) = mpsc::channel(1);
    let guard = Polling { coordinator: Arc::clone(coordinator), node, poll };
    tokio::spawn(run(guard, MapStream::new(node, key), Packer::new(compression), frames));
    Response::new(Frames(queue).boxed_unsync())
}

async fn run(polling: Polling, mut stream: MapStream, packer: Packer, frames: mpsc::Sender<Bytes>) {
    let coordinator = &polling.coordinator;
    let mut news = coordinator.news.subscribe();
    let stopped = coordinator.stopped();
    tokio::pin!(stopped);
    loop {
        news.mark_unchanged();
        let next = {
            let core = coordinator.core();
            if core.presence.is_current(polling.node, polling.poll) {
                stream.next(&core.view(), &core.log)
            } else if core.visible.node(polling.node).is_none() {
                // Deleted: the stream says goodbye.
                stream.next(&core.view(), &core.log)
            } else {
                Next::End(None)
            }
        };
        let (message, ends) = match next {
            Next::Send(message) => (Some(message), false),
            Next::Idle => (None, false),
            Next::End(message) => (message, true),
        };
        if let Some(message) = message {
            let Some(frame) = packer.pack(*message) else { return };
            if frames.send(frame).await.is_err() {
                return;
            }
        }
        if ends {
            return;
        }
        let jitter = coordinator.keep_alive.mul_f64(f64::from(SystemRng.next_u32() % 1000) / 5000.0);
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(coordinator.keep_alive + jitter) => {
                if frames.send(packer.keep_alive.clone()).await.is_err() {
                    return;
                }
            }
            () = frames.closed() => return,
            () = &mut stopped => return,
        }
    }
}

/// A running map poll. When it ends, for whatever reason, the node's time until it counts as offline begins.
struct Polling {
    coordinator: Arc<Coordinator>,
    node: NodeId,
    poll: PollId,
}

impl Drop for Polling {
    fn drop(&mut self) {
        self.coordinator.core().presence.close(now().0, self.node, self.poll);
        self.coordinator.timer.notify_one();
    }
}

/// Makes frames of messages.
struct Packer {
    compression: Compression,
    keep_alive: Bytes,
}

impl Packer {
    fn new(compression: Compression) -> Self {
        let keep_alive = pack(&wire::encode(&MapResponse::keep_alive()), compression).unwrap_or_default();
        Self { compression, keep_alive: keep_alive.into() }
    }

    /// Official clients compare a frame with a remembered keep-alive whose bytes they may have overwritten, so that any
    /// frame of the same length can be swallowed (control.md §5.4). Another length avoids it.
    fn pack(&self, mut message: MapResponse) -> Option<Bytes> {
        let frame = pack(&wire::encode(&message), self.compression).ok()?;
        if frame.len() != self.keep_alive.len() {
            return Some(frame.into());
        }
        message.control_time = Timestamp::from(std::time::SystemTime::from(now().1));
        pack(&wire::encode(&message), self.compression).ok().map(Into::into)
    }
}

/// A response body that is fed by a channel.
struct Frames(mpsc::Receiver<Bytes>);

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}
