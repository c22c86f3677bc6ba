//! The HTTPS requests of an order, on what the relay has anyway: one connection a request, since an order makes a dozen
//! of them once in two months.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};
use tokio::net::TcpStream;

use crate::driver::tls_stream::TlsStream;
use crate::tls::{ClientTls, server_name};

/// How long one request may take in all.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How much an answer may hold.
const MAX_ANSWER: usize = 1024 * 1024;

/// Speaks HTTP/1.1 over TLS.
pub(super) struct Web {
    tls: ClientTls,
}

impl Web {
    pub(super) const fn new(tls: ClientTls) -> Self {
        Self { tls }
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl HttpClient for Web {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let tls = self.tls.clone();
        Box::pin(async move {
            let uri = request.uri().clone();
            let outcome = match tokio::time::timeout(TIMEOUT, exchange(&tls, request)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(format!("no answer within {} s", TIMEOUT.as_secs()).into()),
            };
            let said = |error: BoxError| Error::Other(format!("{uri}: {error}").into());
            Ok(BytesResponse::from(outcome.map_err(said)?))
        })
    }
}

async fn exchange(
    tls: &ClientTls,
    mut request: Request<BodyWrapper<Bytes>>,
) -> Result<Response<Full<Bytes>>, BoxError> {
    let uri = request.uri().clone();
    let (Some("https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err("expected an https:// URL".into());
    };
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(443))).await?;
    let (stream, _) = TlsStream::connect(tls.https(&[b"http/1.1"])?, server_name(host)?, stream).await?;
    request.headers_mut().insert(HOST, HeaderValue::from_str(authority.as_str())?);
    *request.uri_mut() =
        uri.path_and_query().map_or_else(|| Ok(Uri::from_static("/")), |path| path.as_str().parse())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async move {
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await?.to_bytes();
        Ok::<_, BoxError>(Response::from_parts(parts, Full::new(body)))
    };
    // The connection ends when the exchange drops its sender; an answer that came before an early end still counts.
    let (answer, ended) = tokio::join!(exchange, connection);
    answer.map_err(|error| ended.err().map_or(error, |cause| io::Error::other(cause).into()))
}
