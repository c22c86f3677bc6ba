//! The daemon's end of the socket.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use super::{Addresses, Done, Failure, PingRequest, Pong, SetRequest, UpRequest, UpResponse, Version, WaitRequest};
use crate::error::Error;
use crate::netcheck::NetcheckReport;
use crate::node::{Node, UpOptions};
use crate::status::{NodeState, Status};

const DEFAULT_UP_TIMEOUT: Duration = Duration::from_secs(30);
const DEFAULT_PING_TIMEOUT: Duration = Duration::from_secs(5);

/// The local API of one node, listening on a Unix socket. Dropping it removes the socket.
#[derive(Debug)]
pub struct LocalApi {
    path: PathBuf,
    stop: CancellationToken,
}

impl LocalApi {
    /// Listens on `path` and serves `node` there. A socket left over by a daemon that is gone is replaced.
    ///
    /// # Errors
    /// [`Error::Socket`] if the path cannot be used, or if another daemon answers there.
    pub async fn start(path: impl Into<PathBuf>, node: Node) -> Result<Self, Error> {
        let path = path.into();
        let listener = bind(&path).await.map_err(|source| Error::Socket { path: path.clone(), source })?;
        let stop = CancellationToken::new();
        let service = router(node).into_make_service_with_connect_info::<Caller>();
        let ended = stop.clone();
        tokio::spawn(async move {
            let served = axum::serve(listener, service).with_graceful_shutdown(ended.cancelled_owned()).await;
            if let Err(error) = served {
                tracing::error!(%error, "the local socket has failed");
            }
        });
        Ok(Self { path, stop })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LocalApi {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, "the local socket was already gone");
        }
    }
}

async fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if tokio::net::UnixStream::connect(path).await.is_ok() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another daemon answers there; stop it first"));
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    // Everybody may connect; the caller's credentials decide what they may do.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Who is at the other end, as the system says.
#[derive(Debug, Clone, Copy)]
struct Caller {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self { uid: stream.io().peer_cred().ok().map(|credentials| credentials.uid()) }
    }
}

impl Caller {
    fn may_change(self) -> bool {
        self.uid.is_some_and(|uid| uid == 0 || uid == rustix::process::geteuid().as_raw())
    }
}

async fn authorise(ConnectInfo(caller): ConnectInfo<Caller>, request: Request, next: Next) -> Response {
    if request.method() == Method::GET || caller.may_change() {
        return next.run(request).await;
    }
    let error = "permission denied: only root and the user that runs the daemon may do this".to_owned();
    (StatusCode::FORBIDDEN, Json(Failure { error })).into_response()
}

fn router(node: Node) -> Router {
    Router::new()
        .route("/v1/up", post(up))
        .route("/v1/wait", post(wait))
        .route("/v1/login", post(login))
        .route("/v1/down", post(down))
        .route("/v1/logout", post(logout))
        .route("/v1/status", get(status))
        .route("/v1/ip", get(addresses))
        .route("/v1/ping", post(ping))
        .route("/v1/netcheck", get(netcheck))
        .route("/v1/set", post(set))
        .route("/v1/version", get(version))
        .fallback(unknown)
        .layer(middleware::from_fn(authorise))
        .with_state(node)
}

struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            Error::Setting(_) => StatusCode::BAD_REQUEST,
            Error::UnknownPeer(_) => StatusCode::NOT_FOUND,
            Error::Refused(_) => StatusCode::FORBIDDEN,
            Error::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Error::NotRunning(_) | Error::NotUserspace | Error::ShutDown => StatusCode::CONFLICT,
            Error::State(_)
            | Error::Listen { .. }
            | Error::Socket { .. }
            | Error::Tun(_)
            | Error::System { .. }
            | Error::Tls(_)
            | Error::Dial { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(Failure { error: self.0.to_string() })).into_response()
    }
}

type Answer<T> = Result<Json<T>, Refusal>;

async fn up(State(node): State<Node>, Json(request): Json<UpRequest>) -> Answer<UpResponse> {
    bring_up(&node, request, false).await
}

async fn login(State(node): State<Node>, Json(request): Json<UpRequest>) -> Answer<UpResponse> {
    bring_up(&node, request, true).await
}

async fn bring_up(node: &Node, request: UpRequest, fresh_key: bool) -> Answer<UpResponse> {
    let timeout = request.timeout_ms.map_or(DEFAULT_UP_TIMEOUT, Duration::from_millis);
    let options = UpOptions {
        control_url: request.control_url,
        auth_key: request.auth_key,
        hostname: request.hostname,
        fresh_key,
    };
    node.up(options).await?;
    let state = node.wait_for(timeout, |state| matches!(state, NodeState::NeedsLogin { .. })).await?;
    Ok(Json(reached(node, state)))
}

async fn wait(State(node): State<Node>, Json(request): Json<WaitRequest>) -> Answer<UpResponse> {
    let timeout = request.timeout_ms.map_or(DEFAULT_UP_TIMEOUT, Duration::from_millis);
    let state = node.wait_for(timeout, |_| false).await?;
    Ok(Json(reached(&node, state)))
}

fn reached(node: &Node, state: NodeState) -> UpResponse {
    let auth_url = match &state {
        NodeState::NeedsLogin { url } => Some(url.clone()),
        NodeState::Stopped { .. } | NodeState::Starting { .. } | NodeState::Running => None,
    };
    UpResponse { state, auth_url, addresses: node.addresses() }
}

async fn down(State(node): State<Node>) -> Answer<Done> {
    node.down().await?;
    Ok(Json(Done {}))
}

async fn logout(State(node): State<Node>) -> Answer<Done> {
    node.logout().await?;
    Ok(Json(Done {}))
}

async fn status(State(node): State<Node>) -> Answer<Status> {
    Ok(Json(node.status().await?))
}

async fn addresses(State(node): State<Node>) -> Answer<Addresses> {
    let addresses = node.addresses();
    if addresses.is_empty() {
        return Err(Error::NotRunning("it has no address yet; run `mesh up`".to_owned()).into());
    }
    Ok(Json(Addresses { addresses }))
}

async fn ping(State(node): State<Node>, Json(request): Json<PingRequest>) -> Answer<Pong> {
    let timeout = request.timeout_ms.map_or(DEFAULT_PING_TIMEOUT, Duration::from_millis);
    Ok(Json(node.ping(&request.peer, request.size, timeout).await?))
}

async fn netcheck(State(node): State<Node>) -> Answer<NetcheckReport> {
    Ok(Json(node.netcheck().await?))
}

async fn set(State(node): State<Node>, Json(request): Json<SetRequest>) -> Answer<Done> {
    if let Some(mode) = request.path {
        node.set_path_mode(mode).await?;
    }
    if let Some(hostname) = request.hostname {
        node.set_hostname(hostname).await?;
    }
    Ok(Json(Done {}))
}

async fn version() -> Json<Version> {
    Json(crate::version())
}

async fn unknown() -> Response {
    let error = "this daemon does not know that request; its version may differ from the command's".to_owned();
    (StatusCode::NOT_FOUND, Json(Failure { error })).into_response()
}
