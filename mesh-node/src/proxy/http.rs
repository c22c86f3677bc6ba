//! The HTTP proxy (RFC 9110 §3.7, §9.3.6): CONNECT for anything, and plain `http://` requests.

use std::convert::Infallible;
use std::io;

use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use super::{DialError, Dialer, REQUEST_TIME, accept_loop};
use crate::forward::copy_both;

type Body = BoxBody<Bytes, hyper::Error>;

/// Fields that mean one hop only (RFC 9110 §7.6.1); those that `Connection` names go, too.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Serves clients of `listener`, which should be bound to a loopback address, until the future is dropped.
pub async fn serve(listener: TcpListener, dialer: Dialer) {
    accept_loop(listener, move |stream| {
        let dialer = dialer.clone();
        async move {
            if let Err(error) = serve_client(stream, dialer).await {
                tracing::debug!(%error, "an HTTP proxy client broke the protocol or left");
            }
        }
    })
    .await;
}

async fn serve_client(stream: TcpStream, dialer: Dialer) -> hyper::Result<()> {
    let service = service_fn(move |request| {
        let dialer = dialer.clone();
        async move { Ok::<_, Infallible>(answer(request, &dialer).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIME)
        .preserve_header_case(true)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
}

async fn answer(request: Request<Incoming>, dialer: &Dialer) -> Response<Body> {
    let answered = if request.method() == Method::CONNECT {
        connect(request, dialer).await
    } else {
        forward(request, dialer).await
    };
    answered.unwrap_or_else(|problem| problem.into_response())
}

/// Why a request gets no answer from its target.
enum Problem {
    BadRequest(&'static str),
    Dial(DialError),
    Origin(hyper::Error),
}

impl Problem {
    fn into_response(self) -> Response<Body> {
        let (status, text) = match self {
            Self::BadRequest(what) => (StatusCode::BAD_REQUEST, what.to_owned()),
            Self::Dial(error) => {
                let status = match &error {
                    DialError::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
                    DialError::Failed(_, cause) if cause.kind() == io::ErrorKind::ResourceBusy => {
                        StatusCode::SERVICE_UNAVAILABLE
                    }
                    DialError::UnknownName(_)
                    | DialError::NotInMesh(_)
                    | DialError::Refused(_)
                    | DialError::Failed(..) => StatusCode::BAD_GATEWAY,
                };
                (status, error.to_string())
            }
            Self::Origin(error) => (StatusCode::BAD_GATEWAY, format!("the peer's answer is unusable: {error}")),
        };
        let mut response = Response::new(whole(format!("{text}\n")));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    }
}

fn whole(text: String) -> Body {
    Full::new(Bytes::from(text)).map_err(|never: Infallible| match never {}).boxed()
}

async fn connect(request: Request<Incoming>, dialer: &Dialer) -> Result<Response<Body>, Problem> {
    let authority = request.uri().authority().ok_or(Problem::BadRequest("CONNECT needs host:port"))?;
    let port = authority.port_u16().ok_or(Problem::BadRequest("CONNECT needs a port"))?;
    let mut remote = dialer.dial(authority.host(), port).await.map_err(Problem::Dial)?;
    tokio::spawn(async move {
        // The client's stream comes free when the answer below has been written.
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => {
                if let Err(error) = copy_both(&mut TokioIo::new(upgraded), &mut remote).await {
                    tracing::debug!(peer = %remote.peer_addr(), %error, "a tunnel broke");
                    remote.reset();
                }
            }
            Err(error) => tracing::debug!(%error, "an HTTP proxy client left before its tunnel stood"),
        }
    });
    Ok(Response::new(whole(String::new())))
}

async fn forward(mut request: Request<Incoming>, dialer: &Dialer) -> Result<Response<Body>, Problem> {
    const WANT: &str = "this is a proxy: it wants an http:// target, or CONNECT";
    if request.uri().scheme_str() != Some("http") {
        return Err(Problem::BadRequest(WANT));
    }
    let authority = request.uri().authority().cloned().ok_or(Problem::BadRequest(WANT))?;
    let port = authority.port_u16().unwrap_or(80);
    // The target decides what the origin is told, whatever Host said (RFC 9112 §3.2.2).
    let without_user = authority.as_str().rsplit('@').next().unwrap_or_default();
    let host = HeaderValue::from_str(without_user).map_err(|_| Problem::BadRequest(WANT))?;
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let origin_form: Uri = path.parse().map_err(|_| Problem::BadRequest(WANT))?;
    *request.uri_mut() = origin_form;
    *request.version_mut() = Version::HTTP_11;
    strip_hop_by_hop(request.headers_mut());
    request.headers_mut().insert(header::HOST, host);

    let remote = dialer.dial(authority.host(), port).await.map_err(Problem::Dial)?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(remote))
        .await
        .map_err(Problem::Origin)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a proxied connection broke");
        }
    });
    let mut response = sender.send_request(request).await.map_err(Problem::Origin)?;
    strip_hop_by_hop(response.headers_mut());
    Ok(response.map(BodyExt::boxed))
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}
