//! The private side: what a machine may ask once Noise has proven which machine it is.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Method, Request, StatusCode};
use hyper::body::Incoming as RequestBody;
use mesh_noise::key::MachinePublic;

use super::http::{Answer, empty, json, read_json, text};
use super::{CommandError, Coordinator, map};
use crate::server::mapper;
use crate::server::state::{Registered, Registration};
use crate::server::{Actor, LoginId, LoginStatus, Moment, NodeId};
use crate::version::CapabilityVersion;
use crate::wire::{self, RegisterRequest, RegisterResponse};

/// Who is at the other end of a control channel.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// Its proven machine key.
    pub(super) machine: MachinePublic,
    /// Its address.
    pub(super) from: SocketAddr,
}

pub(super) async fn answer(coordinator: &Arc<Coordinator>, peer: &Peer, request: Request<RequestBody>) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::POST, "/machine/register") => match read_json(request).await {
            Ok(body) => register(coordinator, peer, body).await,
            Err(refusal) => *refusal,
        },
        (&Method::POST, "/machine/map") => match read_json(request).await {
            Ok(body) => map::answer(coordinator, peer, body).await,
            Err(refusal) => *refusal,
        },
        // Reports that some clients send and nobody reads yet.
        (&Method::POST, "/machine/update-health" | "/machine/audit-log") => empty(StatusCode::OK),
        (_, "/machine/set-dns" | "/machine/id-token" | "/machine/feature/query" | "/machine/set-device-attr") => {
            text(StatusCode::NOT_IMPLEMENTED, "not implemented\n")
        }
        (_, path) if path.starts_with("/machine/tka/") || path.starts_with("/machine/ssh/") => {
            text(StatusCode::NOT_IMPLEMENTED, "not implemented\n")
        }
        _ => text(StatusCode::NOT_FOUND, "not found\n"),
    }
}

/// Refuses clients that are too old to be understood, by status, so that the text reaches their log.
pub(super) fn too_old(version: CapabilityVersion) -> Option<Answer> {
    (version < CapabilityVersion::MINIMUM).then(|| {
        let (least, found) = (CapabilityVersion::MINIMUM, version);
        text(
            StatusCode::BAD_REQUEST,
            &format!("this client is too old: it speaks {found}, at least {least} is needed\n"),
        )
    })
}

async fn register(coordinator: &Arc<Coordinator>, peer: &Peer, request: RegisterRequest) -> Answer {
    if let Some(refusal) = too_old(request.version) {
        return refusal;
    }
    let registration = Registration {
        machine: peer.machine,
        node_key: request.node_key,
        old_node_key: request.old_node_key,
        auth_key: request.auth.map(|auth| auth.auth_key).filter(|key| !key.is_empty()),
        expiry: (!request.expiry.is_zero()).then(|| request.expiry.to_system().map_or(Moment::default(), Moment::from)),
        followup: LoginId::from_url(&request.followup),
        hostinfo: request.hostinfo.map(|info| *info).unwrap_or_default(),
        ephemeral: request.ephemeral,
        version: request.version.0,
        from: Some(peer.from.ip()),
    };
    let deadline = tokio::time::Instant::now() + coordinator.followup_hold;
    loop {
        let by = Actor::Machine(peer.machine);
        let outcome = coordinator.execute(by, |state, context, rng| state.register(context, rng, &registration)).await;
        let response = match outcome {
            Ok(Registered::Login { id, wait: true }) if tokio::time::Instant::now() < deadline => {
                // Resolves early when somebody decides; either way the machine asks again.
                let _ = tokio::time::timeout_at(deadline, decided(coordinator, &id)).await;
                continue;
            }
            Ok(outcome) => response(coordinator, outcome),
            Err(CommandError::Refused(refusal)) => {
                tracing::info!(machine = %peer.machine.short(), %refusal, "registration refused");
                RegisterResponse { error: refusal.to_string(), ..RegisterResponse::default() }
            }
            Err(error @ CommandError::StoreFailed) => {
                return text(StatusCode::SERVICE_UNAVAILABLE, &format!("{error}\n"));
            }
        };
        return json(StatusCode::OK, &response);
    }
}

/// Waits until a pending login is approved or gone.
async fn decided(coordinator: &Arc<Coordinator>, id: &LoginId) {
    let mut news = coordinator.news.subscribe();
    let stopped = coordinator.stopped();
    let waiting = || {
        coordinator
            .read(|view| view.state.login(id, view.now).is_some_and(|login| login.status == LoginStatus::Waiting))
    };
    let decided = async {
        while waiting() {
            if news.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = decided => {}
        () = stopped => {}
    }
}

fn response(coordinator: &Coordinator, outcome: Registered) -> RegisterResponse {
    match outcome {
        Registered::Accepted(id) => accepted(coordinator, id),
        Registered::LoggedOut | Registered::KeyExpired => {
            RegisterResponse { node_key_expired: true, ..RegisterResponse::default() }
        }
        Registered::Login { id, .. } => {
            RegisterResponse { auth_url: format!("{}/register/{id}", coordinator.url()), ..RegisterResponse::default() }
        }
    }
}

fn accepted(coordinator: &Coordinator, id: NodeId) -> RegisterResponse {
    coordinator.read(|view| {
        let owner = view.state.node(id).map(|node| node.owner.user_id());
        let profile = owner.and_then(|owner| mapper::profile(view.state, owner)).unwrap_or_default();
        let user = wire::User { id: profile.id, display_name: profile.display_name.clone(), ..wire::User::default() };
        let login = wire::Login {
            id: wire::LoginId(profile.id.0),
            provider: "mesh".to_owned(),
            login_name: profile.login_name,
            display_name: profile.display_name,
            ..wire::Login::default()
        };
        RegisterResponse { user, login, machine_authorized: true, ..RegisterResponse::default() }
    })
}
