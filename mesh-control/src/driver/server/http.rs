//! The public side: what anybody may ask before any key is proven.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Incoming as RequestBody};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_noise::key::{ChallengePublic, DiscoPrivate, MachinePublic};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Coordinator, machine, page};
use crate::channel;
use crate::driver::stream::NoiseStream;
use crate::wire::{self, EarlyNoise, KeyResponse, RelayAdmission, RelayAdmissionRequest};
use mesh_noise::random::SystemRng;

/// Any answer's body.
pub(super) type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Longest request body that is read. Real ones have a few KiB.
const MAX_BODY: usize = 1 << 20;

impl Coordinator {
    /// Serves one connection until it ends. `stream` begins with the bytes of an HTTP/1.x request, TLS already removed.
    pub async fn serve_stream<S>(self: Arc<Self>, stream: S, from: SocketAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let this = Arc::clone(&self);
        let service = service_fn(move |request| {
            let this = Arc::clone(&this);
            async move { Ok::<_, Infallible>(answer(&this, request, from).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(30))
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                tracing::debug!(%from, %error, "connection ended");
            },
            () = self.stopped() => {}
        }
    }
}

async fn answer(coordinator: &Arc<Coordinator>, request: Request<RequestBody>, from: SocketAddr) -> Answer {
    let path = request.uri().path().to_owned();
    let login = path.strip_prefix("/register/").map(str::to_owned);
    match (request.method(), path.as_str(), login) {
        (&Method::GET, "/key", _) => {
            let keys = KeyResponse { legacy_public_key: MachinePublic::ZERO, public_key: coordinator.public_key() };
            json(StatusCode::OK, &keys)
        }
        (&Method::POST, channel::UPGRADE_PATH, _) => upgrade(coordinator, request, from),
        (&Method::GET | &Method::HEAD, "/health", _) => json(StatusCode::OK, &serde_json::json!({ "status": "pass" })),
        (&Method::GET | &Method::HEAD, "/generate_204", _) => empty(StatusCode::NO_CONTENT),
        (&Method::POST, "/verify", _) => verify(coordinator, request).await,
        (&Method::GET | &Method::HEAD, _, Some(id)) => page::show(coordinator, &id),
        (&Method::POST, _, Some(id)) => page::submit(coordinator, &id, request, from).await,
        (&Method::GET | &Method::HEAD, "/", _) => {
            text(StatusCode::OK, "This is a mesh coordinator. Join with: mesh up --login-server URL\n")
        }
        _ => text(StatusCode::NOT_FOUND, "not found\n"),
    }
}

/// `POST /ts2021`: leaves HTTP/1.1 and opens the Noise channel (control.md §3).
fn upgrade(coordinator: &Arc<Coordinator>, mut request: Request<RequestBody>, from: SocketAddr) -> Answer {
    let asked = request.headers().get(header::UPGRADE).map(|value| value.as_bytes().to_ascii_lowercase());
    if asked.as_deref() != Some(channel::UPGRADE_PROTOCOL.as_bytes()) {
        return text(StatusCode::BAD_REQUEST, "expected: Upgrade: tailscale-control-protocol\n");
    }
    let initiation = request.headers().get(channel::HANDSHAKE_HEADER).map(|value| value.as_bytes());
    let Some(Ok(initiation)) = initiation.map(channel::initiation_from_header) else {
        return text(StatusCode::BAD_REQUEST, "expected X-Tailscale-Handshake with 101 bytes in base64\n");
    };
    let upgraded = hyper::upgrade::on(&mut request);
    let this = Arc::clone(coordinator);
    tokio::spawn(async move {
        let stopped = this.stopped();
        tokio::select! {
            ended = speak(this, upgraded, initiation.to_vec(), from) => if let Err(error) = ended {
                tracing::debug!(%from, %error, "control channel ended");
            },
            () = stopped => {}
        }
    });
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, header::HeaderValue::from_static(channel::UPGRADE_PROTOCOL));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
    response
}

/// Everything after the 101: Noise, the early payload, HTTP/2.
async fn speak(
    coordinator: Arc<Coordinator>,
    upgraded: hyper::upgrade::OnUpgrade,
    initiation: Vec<u8>,
    from: SocketAddr,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let inner = TokioIo::new(upgraded.await?);
    let challenge = DiscoPrivate::generate(&mut SystemRng).public();
    let early = EarlyNoise { node_key_challenge: ChallengePublic::from_bytes(*challenge.as_bytes()) };
    let accepted = NoiseStream::accept(inner, &coordinator.key, &initiation, Some(&early), &mut SystemRng).await?;
    let peer = machine::Peer { machine: accepted.machine, from };
    let service = service_fn(move |request| {
        let (coordinator, peer) = (Arc::clone(&coordinator), peer.clone());
        async move { Ok::<_, Infallible>(machine::answer(&coordinator, &peer, request).await) }
    });
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(250)
        // Finds out about clients that vanished without a word sooner than the next map message would.
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(15))
        .serve_connection(TokioIo::new(accepted.stream), service)
        .await?;
    Ok(())
}

/// `POST /verify`: a relay asks whether to admit a client (control.md §9).
async fn verify(coordinator: &Arc<Coordinator>, request: Request<RequestBody>) -> Answer {
    match read_json::<_, RelayAdmissionRequest>(request).await {
        Ok(question) => json(StatusCode::OK, &RelayAdmission { allow: coordinator.admits(&question.node_public) }),
        Err(refusal) => *refusal,
    }
}

/// Reads a whole body of bounded size.
pub(super) async fn read_body<B: Body>(request: Request<B>) -> Result<Bytes, Box<Answer>>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let read = tokio::time::timeout(Duration::from_secs(30), Limited::new(request.into_body(), MAX_BODY).collect());
    match read.await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(_)) => Err(Box::new(text(StatusCode::BAD_REQUEST, "the body broke off or is over 1 MiB\n"))),
        Err(_) => Err(Box::new(text(StatusCode::REQUEST_TIMEOUT, "the body did not come\n"))),
    }
}

/// Reads a message, or answers 400 with the reason.
pub(super) async fn read_json<B: Body, T: serde::de::DeserializeOwned>(request: Request<B>) -> Result<T, Box<Answer>>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = read_body(request).await?;
    wire::decode(&body).map_err(|error| Box::new(text(StatusCode::BAD_REQUEST, &format!("{error}\n"))))
}

pub(super) fn empty(status: StatusCode) -> Answer {
    body(status, Bytes::new())
}

pub(super) fn text(status: StatusCode, message: &str) -> Answer {
    with_type(body(status, Bytes::copy_from_slice(message.as_bytes())), "text/plain; charset=utf-8")
}

pub(super) fn json<T: serde::Serialize>(status: StatusCode, message: &T) -> Answer {
    with_type(body(status, wire::encode(message).into()), "application/json")
}

pub(super) fn body(status: StatusCode, bytes: Bytes) -> Answer {
    let mut response = Response::new(Full::new(bytes).boxed_unsync());
    *response.status_mut() = status;
    response
}

pub(super) fn with_type(mut response: Answer, kind: &'static str) -> Answer {
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
