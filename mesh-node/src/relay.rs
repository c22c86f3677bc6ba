//! A relay on its own, with a STUN responder beside it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use mesh_control::wire::{RelayAdmission, RelayAdmissionRequest};
use mesh_derp::driver::listener::Acceptor;
use mesh_derp::driver::server::{self as server, Admission, Applicant, RelayServer};
use mesh_derp::map::{DerpNode, RegionId};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::error::Error;
use crate::listen::{self, CertificateFiles, Place, Stun};
use crate::state::StateDir;

/// The region of a relay that was not told one.
pub const DEFAULT_REGION: RegionId = match RegionId::new(901) {
    Some(region) => region,
    None => panic!("901 is not zero"),
};

/// How long the answer of a verifying URL may take (derp.md §10).
const VERIFY_TIMEOUT: Duration = Duration::from_secs(5);

/// How to run a relay. [`Config::new`] gives the defaults.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Where key and certificate live. Created if missing.
    pub state_dir: PathBuf,
    /// Addresses to accept on; each answers TLS and plain HTTP. The first one is the one that is published.
    pub listen: Vec<SocketAddr>,
    /// Addresses of the STUN responder. Default none. Two ports of one address answer for each other on request; a map
    /// names the second as a node of its own that is STUN-only.
    pub stun: Vec<SocketAddr>,
    /// The relay's region. Default [`DEFAULT_REGION`].
    pub region_id: RegionId,
    /// The certificate. Default: one that is made and kept in the state directory.
    pub certificate: Option<CertificateFiles>,
    /// An `http://` URL that says who may use the relay, such as a coordinator's `/verify`. Default: everybody may.
    pub verify_url: Option<String>,
}

impl Config {
    /// A relay on `state_dir` that accepts on `listen`.
    #[must_use]
    pub fn new(state_dir: impl Into<PathBuf>, listen: Vec<SocketAddr>) -> Self {
        Self {
            state_dir: state_dir.into(),
            listen,
            stun: Vec::new(),
            region_id: DEFAULT_REGION,
            certificate: None,
            verify_url: None,
        }
    }

    fn first(&self) -> Result<SocketAddr, Error> {
        self.listen.first().copied().ok_or_else(|| Error::Setting("a relay needs an address to listen on".to_owned()))
    }
}

/// The relay's node as it belongs into a DERP map, pin included. Makes the certificate if there is none yet.
///
/// # Errors
/// If state directory or certificate cannot be used.
pub fn describe(config: &Config) -> Result<DerpNode, Error> {
    let first = config.first()?;
    if first.ip().is_unspecified() {
        let problem =
            format!("no node can connect to {}: list an address of this host first, to be published", first.ip());
        return Err(Error::Setting(problem));
    }
    listen::state_dir(&config.state_dir)?;
    let host = first.ip().to_string();
    let (_, pin) = listen::certificate(config.certificate.as_ref(), &config.state_dir, &host, &config.listen)
        .map_err(|error| Error::Tls(error.to_string()))?;
    let place =
        Place { region: config.region_id, host, port: first.port(), listen: &config.listen, stun: &config.stun };
    Ok(place.nodes(pin).swap_remove(0))
}

/// A running relay. Ends with [`shutdown`](Self::shutdown), or when dropped.
#[derive(Debug)]
pub struct Relay {
    server: Arc<RelayServer>,
    accepting: JoinSet<()>,
    connections: TaskTracker,
    _state: StateDir,
}

impl Relay {
    /// Starts the relay; returns when connections are accepted.
    ///
    /// # Errors
    /// One line that says what to do.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let state = StateDir::open(&config.state_dir)?;
        let host = config.first()?.ip().to_string();
        let (tls, _) = listen::certificate(config.certificate.as_ref(), &config.state_dir, &host, &config.listen)
            .map_err(|error| Error::Tls(error.to_string()))?;
        let key = server::load_or_generate_key(&config.state_dir)
            .map_err(|source| Error::System { what: "the relay's key", source })?;
        let mut settings = server::Config::default();
        if let Some(url) = &config.verify_url {
            settings.admission = Arc::new(Verify::new(url)?);
        }
        let server = RelayServer::new(key, settings);
        let tls = tls.config(Some(server.public())).map_err(|error| Error::Tls(error.to_string()))?;
        let mut acceptor = Acceptor::from_listeners(listen::tcp(&config.listen).await?, Some(tls));
        let mut accepting = JoinSet::new();
        Stun::bind(&config.stun).await?.serve(&mut accepting);
        let connections = TaskTracker::new();
        let (relay, tracker) = (Arc::clone(&server), connections.clone());
        accepting.spawn(async move {
            loop {
                let incoming = acceptor.next().await;
                tracker.spawn(Arc::clone(&relay).serve(incoming.stream, incoming.head, incoming.peer_addr));
            }
        });
        Ok(Self { server, accepting, connections, _state: state })
    }

    /// The relay itself, with its counters.
    #[must_use]
    pub fn server(&self) -> &Arc<RelayServer> {
        &self.server
    }

    /// Ends all connections and releases the addresses.
    pub async fn shutdown(mut self) {
        self.accepting.shutdown().await;
        self.server.close_all();
        self.connections.close();
        if tokio::time::timeout(Duration::from_secs(5), self.connections.wait()).await.is_err() {
            tracing::warn!("connections are still open after five seconds");
        }
    }
}

/// Asks a URL whether a client may use the relay. No answer in time means no.
#[derive(Debug)]
struct Verify {
    authority: String,
    path: String,
}

impl Verify {
    fn new(url: &str) -> Result<Self, Error> {
        let wrong = || Error::Setting(format!("--verify-url {url:?}: expected http://HOST:PORT/PATH"));
        let parsed: hyper::Uri = url.parse().map_err(|_| wrong())?;
        let authority = parsed.authority().filter(|_| parsed.scheme_str() == Some("http")).ok_or_else(wrong)?;
        let authority = if authority.port().is_some() { authority.to_string() } else { format!("{authority}:80") };
        let path = parsed.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
        Ok(Self { authority, path })
    }

    async fn ask(&self, applicant: Applicant) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        let question = RelayAdmissionRequest { node_public: applicant.node, source: applicant.address.to_string() };
        let stream = TcpStream::connect(&self.authority).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::post(&self.path)
            .header(hyper::header::HOST, &self.authority)
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(serde_json::to_vec(&question)?)))?;
        // The connection ends when the exchange drops its sender; an answer that came before an early end still counts.
        let exchange = async move {
            let answer = sender.send_request(request).await?;
            let body = Limited::new(answer.into_body(), 64 * 1024).collect().await?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(body.to_bytes())
        };
        let (body, _) = tokio::join!(exchange, connection);
        Ok(mesh_derp::json::from_slice::<RelayAdmission>(&body?)?.allow)
    }
}

impl Admission for Verify {
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(async move {
            match tokio::time::timeout(VERIFY_TIMEOUT, self.ask(applicant)).await {
                Ok(Ok(allow)) => allow,
                Ok(Err(error)) => {
                    tracing::warn!(authority = %self.authority, %error, "nobody can be let in: the verifying URL fails");
                    false
                }
                Err(_) => {
                    tracing::warn!(authority = %self.authority, "nobody can be let in: the verifying URL is silent");
                    false
                }
            }
        })
    }
}
