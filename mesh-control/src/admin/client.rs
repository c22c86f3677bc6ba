//! The operator's end of the admin socket.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use mesh_derp::driver::server::Counters;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::SOCKET_NAME;
use super::model::{
    Approve, CodeInfo, CreateCode, CreateKey, CreateUser, KeyInfo, LoginInfo, NodeInfo, NodeRef, Reloaded, Rename,
    UserInfo,
};

/// Why an operation did not work. One line for the person who asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens at the socket.
    #[error("no coordinator answers at {path} ({error}): is it running with this --state-dir?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why it cannot be reached.
        error: io::Error,
    },
    /// The connection was closed without an answer.
    #[error("the coordinator closed the connection: only its own user and root may administer it")]
    Closed,
    /// The coordinator refuses, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The answer is not what it should be.
    #[error("the coordinator's answer cannot be read: {0}")]
    Answer(String),
}

/// Talks to a coordinator's admin socket. One connection for each operation.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Failure {
    error: String,
}

impl Client {
    /// A client of the coordinator that works on this state directory.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self { socket: state_dir.join(SOCKET_NAME) }
    }

    async fn ask<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &'static str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| ClientError::Connect { path: self.socket.clone(), error })?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|_| ClientError::Closed)?;
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| ClientError::Answer(error.to_string()))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "admin")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::Answer(error.to_string()))?;
        // Takes the sender along, so that the connection ends with the answer.
        let exchange = async move {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
        };
        let (answer, _) = tokio::join!(exchange, connection);
        let (status, bytes) = answer.map_err(|_| ClientError::Closed)?;
        if !status.is_success() {
            let text = || String::from_utf8_lossy(&bytes).trim().to_owned();
            let said = serde_json::from_slice::<Failure>(&bytes).map_or_else(|_| text(), |failure| failure.error);
            return Err(ClientError::Refused(said));
        }
        serde_json::from_slice(&bytes).map_err(|error| ClientError::Answer(error.to_string()))
    }

    async fn get<T: DeserializeOwned>(&self, path: &'static str) -> Result<T, ClientError> {
        self.ask(Method::GET, path, None::<&()>).await
    }

    async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &'static str, body: &B) -> Result<T, ClientError> {
        self.ask(Method::POST, path, Some(body)).await
    }

    /// All users.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn users(&self) -> Result<Vec<UserInfo>, ClientError> {
        self.get("/v1/users").await
    }

    /// Creates a user.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn create_user(&self, name: &str) -> Result<UserInfo, ClientError> {
        self.post("/v1/users", &CreateUser { name: name.to_owned() }).await
    }

    /// Creates an approval code, tied to a user or not.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn create_code(&self, user: Option<&str>) -> Result<CodeInfo, ClientError> {
        self.post("/v1/codes", &CreateCode { user: user.map(str::to_owned) }).await
    }

    /// All auth keys, without their secrets.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn keys(&self) -> Result<Vec<KeyInfo>, ClientError> {
        self.get("/v1/keys").await
    }

    /// Creates an auth key.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn create_key(&self, wanted: &CreateKey) -> Result<KeyInfo, ClientError> {
        self.post("/v1/keys", wanted).await
    }

    /// All nodes.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn nodes(&self) -> Result<Vec<NodeInfo>, ClientError> {
        self.get("/v1/nodes").await
    }

    /// Renames a node, given by name, number or address.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn rename_node(&self, node: &str, name: &str) -> Result<NodeInfo, ClientError> {
        self.post("/v1/nodes/rename", &Rename { node: node.to_owned(), name: name.to_owned() }).await
    }

    /// Makes a node's key expire now.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn expire_node(&self, node: &str) -> Result<NodeInfo, ClientError> {
        self.post("/v1/nodes/expire", &NodeRef { node: node.to_owned() }).await
    }

    /// Deletes a node.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn delete_node(&self, node: &str) -> Result<NodeInfo, ClientError> {
        self.post("/v1/nodes/delete", &NodeRef { node: node.to_owned() }).await
    }

    /// The machines that wait for approval.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn logins(&self) -> Result<Vec<LoginInfo>, ClientError> {
        self.get("/v1/logins").await
    }

    /// Lets a machine in, given by the URL that it prints or the URL's last part, as a node of this user.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn approve(&self, login: &str, user: &str) -> Result<LoginInfo, ClientError> {
        self.post("/v1/logins/approve", &Approve { login: login.to_owned(), user: user.to_owned() }).await
    }

    /// What the relay in the coordinator's process has moved and dropped.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn relay(&self) -> Result<Counters, ClientError> {
        self.get("/v1/relay").await
    }

    /// Has the coordinator read its relays again.
    ///
    /// # Errors
    /// A [`ClientError`].
    pub async fn reload_derp_map(&self) -> Result<Reloaded, ClientError> {
        self.post("/v1/derp-map/reload", &()).await
    }
}
