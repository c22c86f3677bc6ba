//! A relay on its own, with a STUN responder beside it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_derp::driver::server::{self as server, RelayServer, Sibling, Unreachable};
use mesh_derp::login::MeshKey;
use mesh_derp::map::{DerpNode, RegionId};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::activation::Sockets;
use crate::certificate::{Certificate, Server};
use crate::error::Error;
use crate::front::{self, Front};
use crate::listen::{self, Place, Stun};
use crate::state::StateDir;

mod access;

use access::Access;

/// The region of a relay that was not told one.
pub const DEFAULT_REGION: RegionId = match RegionId::new(901) {
    Some(region) => region,
    None => panic!("901 is not zero"),
};

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
    /// The certificate. Default [`Certificate::Generated`].
    pub certificate: Certificate,
    /// A URL that says who may use the relay, such as a coordinator's `/verify`. Default: everybody may.
    pub verify_url: Option<String>,
    /// What becomes of clients while that URL cannot be reached. Default: they are turned away.
    pub verify_unreachable: Unreachable,
    /// A file of the nodes that may use the relay (see
    /// [`AllowListFile`](mesh_derp::driver::server::AllowListFile)). Default: everybody may. With a URL as well, both have to
    /// agree.
    pub allow_list: Option<PathBuf>,
    /// The other relays of the region; this one may be among them. Default none.
    pub mesh_with: Vec<Sibling>,
    /// The file with the secret that all relays of the region share: 64 hexadecimal digits. Made if missing; the other
    /// relays need a copy. Default none: other relays are clients like any other.
    pub mesh_key_file: Option<PathBuf>,
    /// A file of certificates (PEM) to trust, beside the system's, in the verify URL and the other relays.
    pub ca_file: Option<PathBuf>,
    /// How long [`Relay::shutdown`] may take to send clients away one after another. Default 5 s.
    pub grace: Duration,
    /// Its front: numbers, proxies, limits.
    pub front: Front,
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
            certificate: Certificate::Generated,
            verify_url: None,
            verify_unreachable: Unreachable::default(),
            allow_list: None,
            mesh_with: Vec::new(),
            mesh_key_file: None,
            ca_file: None,
            grace: Duration::from_secs(5),
            front: Front::default(),
        }
    }

    fn first(&self) -> Result<SocketAddr, Error> {
        self.listen.first().copied().ok_or_else(|| Error::Setting("a relay needs an address to listen on".to_owned()))
    }

    fn server<'a>(&'a self, host: &'a str) -> Server<'a> {
        Server { state_dir: &self.state_dir, host, listen: &self.listen }
    }
}

/// The relay's node as it belongs into a DERP map, pin included. Makes the certificate if there is none yet. With a
/// certificate from a public authority the node has its name, and no pin.
///
/// # Errors
/// If state directory or certificate cannot be used.
pub fn describe(config: &Config) -> Result<DerpNode, Error> {
    let first = config.first()?;
    let name = config.certificate.acme_name();
    if name.is_none() && first.ip().is_unspecified() {
        let problem =
            format!("no node can connect to {}: list an address of this host first, to be published", first.ip());
        return Err(Error::Setting(problem));
    }
    listen::state_dir(&config.state_dir)?;
    let pin = config.certificate.pin(config.server(&first.ip().to_string()))?;
    let host = name.unwrap_or_else(|| first.ip().to_string());
    let place =
        Place { region: config.region_id, host, port: first.port(), listen: &config.listen, stun: &config.stun };
    Ok(place.nodes(pin).swap_remove(0))
}

/// Reads the secret that all relays of a region share from a file of 64 hexadecimal digits, or makes the file.
///
/// # Errors
/// If the file cannot be read or made, or holds something else.
pub fn mesh_key(file: &Path) -> Result<MeshKey, Error> {
    let (key, made) =
        server::load_or_generate_mesh_key(file).map_err(|source| Error::System { what: "the mesh key", source })?;
    if made {
        let file = file.display();
        tracing::info!("made a mesh key: the other relays of the region need a copy of {file}");
    }
    Ok(key)
}

/// A running relay. Ends with [`shutdown`](Self::shutdown), or when dropped.
#[derive(Debug)]
pub struct Relay {
    server: Arc<RelayServer>,
    accepting: JoinSet<()>,
    connections: TaskTracker,
    /// What the certificate's keeper waits for.
    look: Arc<Notify>,
    access: Access,
    /// Links to other relays, and what follows files.
    kept: JoinSet<()>,
    grace: Duration,
    _state: StateDir,
}

impl Relay {
    /// Starts the relay; returns when connections are accepted.
    ///
    /// # Errors
    /// One line that says what to do.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let sockets = Sockets::bind(&config.listen, &config.stun)?;
        Self::start_on(sockets, config).await
    }

    /// The same on sockets that are bound already, for the addresses that the configuration names.
    ///
    /// # Errors
    /// As for [`Relay::start`].
    #[expect(clippy::unused_async, reason = "tells the caller that a runtime is needed")]
    pub async fn start_on(sockets: Sockets, config: Config) -> Result<Self, Error> {
        let state = StateDir::open(&config.state_dir)?;
        let certificate = config.certificate.open(config.server(&config.first()?.ip().to_string()))?;
        let key = server::load_or_generate_key(&config.state_dir)
            .map_err(|source| Error::System { what: "the relay's key", source })?;
        let mut settings = server::Config { public: config.front.public(), ..server::Config::default() };
        let access = Access::prepare(&config, &mut settings)?;
        let server = RelayServer::new(key, settings);
        let mut accepting = JoinSet::new();
        let (acceptor, look) = certificate.show(listen::tcp(sockets.tcp)?, Some(server.public()), &mut accepting)?;
        let mut acceptor = acceptor.with_settings(config.front.listener());
        let stun = Stun::on(sockets.udp)?;
        server.show(acceptor.watch());
        server.show(stun.watch());
        stun.serve(&mut accepting);
        front::refresh(&server, &mut accepting);
        let connections = TaskTracker::new();
        let (relay, tracker) = (Arc::clone(&server), connections.clone());
        accepting.spawn(async move {
            loop {
                let incoming = acceptor.next().await;
                tracker.spawn(Arc::clone(&relay).serve(incoming));
            }
        });
        let (mut kept, grace) = (JoinSet::new(), config.grace);
        access.run(config, &server, &mut kept);
        Ok(Self { server, accepting, connections, look, access, kept, grace, _state: state })
    }

    /// The relay itself, with its counters.
    #[must_use]
    pub fn server(&self) -> &Arc<RelayServer> {
        &self.server
    }

    /// Reads the allow-list again at once; it is looked at every 2 s anyway. Looks after the certificate as well: its files
    /// are read again, or an authority that has failed is asked again. What comes of it is in the log.
    pub fn reload(&self) {
        self.access.reload(&self.server);
        self.look.notify_one();
    }

    /// Releases the addresses, sends all clients away one after another ([`Config::grace`]), and returns when they are gone.
    pub async fn shutdown(mut self) {
        self.accepting.shutdown().await;
        self.server.shutdown(self.grace).await;
        self.kept.shutdown().await;
        self.connections.close();
        if tokio::time::timeout(Duration::from_secs(5), self.connections.wait()).await.is_err() {
            tracing::warn!("connections are still open after five seconds");
        }
    }
}
