//! Requests inside the channel.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, RETRY_AFTER, USER_AGENT};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use mesh_noise::key::NodePublic;
use tokio::sync::mpsc;

use super::USER_AGENT_TEXT;
use super::dial::{Sender, Server, reason};
use crate::client::{Problem, RequestId};
use crate::wire::frame::{Compression, FrameReader};
use crate::wire::{self, MapRequest, MapResponse, RegisterRequest, RegisterResponse};

const REGISTER_PATH: &str = "/machine/register";
const MAP_PATH: &str = "/machine/map";
/// A hint for load balancers: the node key that a request is about.
const LOAD_BALANCER_HEADER: &str = "ts-lb";
const MAX_ANSWER: usize = 1 << 20;
const MAX_ERROR_TEXT: usize = 200;
const LONGEST_RETRY_AFTER: u64 = 3600;
/// For everything but the map stream and the wait for a person.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// The HTTP/2 connection, for one request after the other. Cheap to clone.
#[derive(Clone)]
pub(super) struct Exchange {
    pub(super) sender: Sender,
    pub(super) server: Server,
}

impl Exchange {
    pub(super) async fn register(mut self, request: RegisterRequest) -> Result<RegisterResponse, Problem> {
        let keys = [request.old_node_key, request.node_key];
        let patient = !request.followup.is_empty();
        let exchange = async {
            let response = self.post(REGISTER_PATH, wire::encode(&request), &keys).await?;
            let body = self.body(response.into_body()).await?;
            Ok(wire::decode(&body)?)
        };
        if patient { exchange.await } else { limited(REGISTER_PATH, exchange).await }
    }

    pub(super) async fn update(mut self, request: MapRequest) -> Result<(), Problem> {
        limited(MAP_PATH, async {
            let response = self.post(MAP_PATH, wire::encode(&request), &[request.node_key]).await?;
            self.body(response.into_body()).await?;
            Ok(())
        })
        .await
    }

    /// Reads a map stream into `messages` until it ends, which is the last message.
    pub(super) async fn map(
        mut self,
        id: RequestId,
        request: MapRequest,
        messages: mpsc::Sender<(RequestId, Result<Box<MapResponse>, Problem>)>,
    ) {
        let problem = match self.map_messages(id, &request, &messages).await {
            Ok(()) => Problem::MapEnded,
            Err(problem) => problem,
        };
        // Nobody listens only when the client is gone.
        let _ = messages.send((id, Err(problem))).await;
    }

    async fn map_messages(
        &mut self,
        id: RequestId,
        request: &MapRequest,
        messages: &mpsc::Sender<(RequestId, Result<Box<MapResponse>, Problem>)>,
    ) -> Result<(), Problem> {
        let response = self.post(MAP_PATH, wire::encode(request), &[request.node_key]).await?;
        let mut body = response.into_body();
        let mut reader = FrameReader::new(Compression::asked(&request.compress));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.server.unreachable(reason(&error)))?;
            let Ok(data) = frame.into_data() else { continue };
            reader.push(&data);
            while let Some(message) = reader.next_message()? {
                if messages.send((id, Ok(Box::new(message)))).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Answers a ping; how that goes is nobody's concern but the server's.
    pub(super) async fn answer(mut self, method: Method, path: String, body: Vec<u8>) {
        let outcome = limited(&path, async {
            let response = self.send(method, &path, body, &[]).await?;
            self.body(response.into_body()).await
        })
        .await;
        if let Err(problem) = outcome {
            tracing::debug!(%problem, "the coordinator did not take an answer to its ping");
        }
    }

    async fn post(&mut self, path: &str, body: Vec<u8>, keys: &[NodePublic]) -> Result<Response<Incoming>, Problem> {
        let response = self.send(Method::POST, path, body, keys).await?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        let retry_after =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let retry_after = retry_after.filter(|seconds| (1..=LONGEST_RETRY_AFTER).contains(seconds));
        let text = self.body(response.into_body()).await.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        Err(Problem::Status {
            path: path.to_owned(),
            status: status.as_u16(),
            text: text.chars().filter(|c| !c.is_control()).take(MAX_ERROR_TEXT).collect(),
            retry_after: retry_after.map(Duration::from_secs),
        })
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        keys: &[NodePublic],
    ) -> Result<Response<Incoming>, Problem> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("https://{}{path}", self.server.authority))
            .header(USER_AGENT, USER_AGENT_TEXT)
            .header(CONTENT_LENGTH, body.len());
        for key in keys.iter().filter(|key| !key.is_zero()) {
            request = request.header(LOAD_BALANCER_HEADER, key.to_string());
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|_| self.server.unreachable(format!("{path} is no path that can be asked for")))?;
        self.sender.ready().await.map_err(|error| self.server.unreachable(reason(&error)))?;
        self.sender.send_request(request).await.map_err(|error| self.server.unreachable(reason(&error)))
    }

    async fn body(&self, body: Incoming) -> Result<Bytes, Problem> {
        let collected = Limited::new(body, MAX_ANSWER).collect().await;
        Ok(collected.map_err(|error| self.server.unreachable(error.to_string()))?.to_bytes())
    }
}

async fn limited<T>(path: &str, exchange: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    tokio::time::timeout(REQUEST_TIMEOUT, exchange).await.unwrap_or_else(|_| {
        tracing::debug!(path, "no answer in time");
        Err(Problem::Stalled(REQUEST_TIMEOUT))
    })
}
