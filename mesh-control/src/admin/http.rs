//! The admin socket: HTTP/1.1 and JSON for whoever the kernel says may come in.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::{Arc, Weak};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};

use super::model::{Approve, CreateCode, CreateKey, CreateUser, NodeRef, Rename};
use super::service::{Admin, AdminError};
use crate::driver::server::{CommandError, Coordinator};
use crate::server::Actor;

/// Binds the socket, readable by its owner only, and serves it until the coordinator stops.
pub(crate) fn spawn(coordinator: &Arc<Coordinator>) -> io::Result<()> {
    let path = coordinator.admin_socket();
    // The state directory is locked, so what lies here was left by a process that is gone.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) | Ok(()) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let owner = std::fs::metadata(path)?.uid();
    tokio::spawn(accept(Arc::downgrade(coordinator), listener, owner, coordinator.stopped()));
    Ok(())
}

async fn accept(
    coordinator: Weak<Coordinator>,
    listener: UnixListener,
    owner: u32,
    stopped: impl Future<Output = ()> + Send,
) {
    tokio::pin!(stopped);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "admin socket");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = &mut stopped => return,
        };
        let Some(coordinator) = coordinator.upgrade() else { return };
        let uid = stream.peer_cred().map(|peer| peer.uid()).ok();
        match uid.filter(|uid| *uid == owner || *uid == 0) {
            Some(uid) => drop(tokio::spawn(serve(coordinator, stream, uid))),
            None => tracing::warn!(?uid, "refused at the admin socket"),
        }
    }
}

async fn serve(coordinator: Arc<Coordinator>, stream: UnixStream, uid: u32) {
    let stopped = coordinator.stopped();
    let service = TowerToHyperService::new(router(Admin::new(coordinator, Actor::Operator { uid })));
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            tracing::debug!(%error, "admin connection ended");
        },
        () = stopped => {}
    }
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/v1/users", get(async |State(a): State<Admin>| answer(a.users())))
        .route(
            "/v1/users",
            post(async |State(a): State<Admin>, Json(b): Json<CreateUser>| answer(a.create_user(b).await)),
        )
        .route(
            "/v1/codes",
            post(async |State(a): State<Admin>, Json(b): Json<CreateCode>| answer(a.create_code(b).await)),
        )
        .route("/v1/keys", get(async |State(a): State<Admin>| answer(a.keys())))
        .route("/v1/keys", post(async |State(a): State<Admin>, Json(b): Json<CreateKey>| answer(a.create_key(b).await)))
        .route("/v1/nodes", get(async |State(a): State<Admin>| answer(a.nodes())))
        .route(
            "/v1/nodes/rename",
            post(async |State(a): State<Admin>, Json(b): Json<Rename>| answer(a.rename(b).await)),
        )
        .route(
            "/v1/nodes/expire",
            post(async |State(a): State<Admin>, Json(b): Json<NodeRef>| answer(a.expire(b).await)),
        )
        .route(
            "/v1/nodes/delete",
            post(async |State(a): State<Admin>, Json(b): Json<NodeRef>| answer(a.delete(b).await)),
        )
        .route("/v1/logins", get(async |State(a): State<Admin>| answer(a.logins())))
        .route(
            "/v1/logins/approve",
            post(async |State(a): State<Admin>, Json(b): Json<Approve>| answer(a.approve(b).await)),
        )
        .route("/v1/relay", get(async |State(a): State<Admin>| answer(a.relay())))
        .route("/v1/derp-map/reload", post(async |State(a): State<Admin>| answer(a.reload_derp_map())))
        .with_state(admin)
}

/// The body of a failure.
#[derive(Debug, Serialize)]
struct Failure {
    error: String,
}

fn answer<T: Serialize>(outcome: Result<T, AdminError>) -> Response {
    match outcome {
        Ok(value) => Json(value).into_response(),
        Err(error) => {
            let status = match &error {
                AdminError::Forbidden => StatusCode::FORBIDDEN,
                AdminError::Invalid(_) | AdminError::Command(CommandError::Refused(_)) => StatusCode::BAD_REQUEST,
                AdminError::Command(CommandError::StoreFailed) => StatusCode::SERVICE_UNAVAILABLE,
            };
            (status, Json(Failure { error: error.to_string() })).into_response()
        }
    }
}
