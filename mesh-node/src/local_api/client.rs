//! The command line's end of the socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{Addresses, Done, Failure, PingRequest, Pong, SetRequest, UpRequest, UpResponse, Version, WaitRequest};
use crate::netcheck::NetcheckReport;
use crate::status::Status;

/// Why a request to the daemon failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers at {}: {source}; start one with `mesh daemon`", path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The daemon refused; the text is its reason.
    #[error("{reason}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The daemon's reason.
        reason: String,
    },
    /// The connection broke, or the answer could not be understood.
    #[error("the daemon's answer cannot be understood: {0}")]
    Answer(String),
}

/// A client of a daemon's socket. Each call opens its own connection.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the daemon that listens on `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Brings the node up; returns as soon as it runs or waits for approval.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason, also when the time is over.
    pub async fn up(&self, request: &UpRequest) -> Result<UpResponse, ClientError> {
        self.post("/v1/up", request).await
    }

    /// Waits until the node runs, after [`up`](Self::up) has returned a URL.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason, also when the time is over.
    pub async fn wait(&self, timeout: Duration) -> Result<UpResponse, ClientError> {
        let timeout_ms = u64::try_from(timeout.as_millis()).ok();
        self.post("/v1/wait", &WaitRequest { timeout_ms }).await
    }

    /// Signs in again with a new node key.
    ///
    /// # Errors
    /// As [`up`](Self::up).
    pub async fn login(&self, request: &UpRequest) -> Result<UpResponse, ClientError> {
        self.post("/v1/login", request).await
    }

    /// Disconnects; the registration stays.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason.
    pub async fn down(&self) -> Result<(), ClientError> {
        self.post::<_, Done>("/v1/down", &Done {}).await.map(drop)
    }

    /// Signs out: the node key is given up.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason.
    pub async fn logout(&self) -> Result<(), ClientError> {
        self.post::<_, Done>("/v1/logout", &Done {}).await.map(drop)
    }

    /// The node and its peers.
    ///
    /// # Errors
    /// [`ClientError::NoDaemon`] if nobody listens.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status").await
    }

    /// The node's addresses within the mesh.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it has none yet.
    pub async fn ip(&self) -> Result<Addresses, ClientError> {
        self.get("/v1/ip").await
    }

    /// Probes a peer once.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the peer is unknown or does not answer.
    pub async fn ping(&self, request: &PingRequest) -> Result<Pong, ClientError> {
        self.post("/v1/ping", request).await
    }

    /// Measures the network.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason.
    pub async fn netcheck(&self) -> Result<NetcheckReport, ClientError> {
        self.get("/v1/netcheck").await
    }

    /// Changes preferences.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason.
    pub async fn set(&self, request: &SetRequest) -> Result<(), ClientError> {
        self.post::<_, Done>("/v1/set", request).await.map(drop)
    }

    /// The daemon's version.
    ///
    /// # Errors
    /// [`ClientError::NoDaemon`] if nobody listens.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("/v1/version").await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Answer(error.to_string()))?;
        self.request(Method::POST, path, body.into()).await
    }

    async fn request<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let broken = |error: hyper::Error| ClientError::Answer(error.to_string());
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| ClientError::NoDaemon { path: self.path.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "mesh")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| ClientError::Answer(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(broken)?.to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| ClientError::Answer(error.to_string()));
        }
        let reason = match serde_json::from_slice::<Failure>(&body) {
            Ok(failure) => failure.error,
            Err(_) => String::from_utf8_lossy(&body).into_owned(),
        };
        Err(ClientError::Refused { status: status.as_u16(), reason })
    }
}
