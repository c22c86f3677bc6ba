//! A whole control plane in one process: coordination server, relay and STUN responder behind one set of listeners.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use mesh_control::driver::server as control;
use mesh_derp::driver::listener::{Acceptor, Incoming};
use mesh_derp::driver::server::{self as relay, Admission, Applicant, RelayServer};
use mesh_derp::map::{DerpMap, DerpNode, DerpRegion, RegionId};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::activation::Sockets;
use crate::certificate::{Certificate, Server};
use crate::error::Error;
use crate::front::{self, Front};
use crate::listen::{self, Place, Stun};

/// The embedded relay's region when none is named.
pub const DEFAULT_REGION: RegionId = match RegionId::new(900) {
    Some(region) => region,
    None => panic!("900 is not zero"),
};

/// How to run a coordinator. [`Config::new`] gives the defaults.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Where database, keys and certificate live. Created if missing.
    pub state_dir: PathBuf,
    /// Addresses to accept on; each answers TLS and plain HTTP.
    pub listen: Vec<SocketAddr>,
    /// The URL that nodes use. Its host and port are also the embedded relay's.
    pub url: String,
    /// Addresses of the STUN responder. Default none. The next port answers too, unless several are named, it is taken, or
    /// the address is loopback. A further port is published as a STUN-only node: with two ports of one server, clients
    /// tell a NAT that gives every destination another port from one that does not.
    pub stun: Vec<SocketAddr>,
    /// The embedded relay's region. Default [`DEFAULT_REGION`].
    pub region_id: RegionId,
    /// Whether to run the embedded relay. Default yes.
    pub relay: bool,
    /// Further relays. Default none.
    pub derp_map: DerpMap,
    /// The certificate. Default [`Certificate::Generated`]. One from a public authority has to be for the URL's host.
    pub certificate: Certificate,
    /// Publish the relay a second time, and first, without certificate check, for test clients that cannot pin. Default
    /// no.
    pub insecure_relay_for_tests: bool,
    /// What stands in front: numbers, proxies, limits.
    pub front: Front,
}

impl Config {
    /// A coordinator on `state_dir` that accepts on `listen` and is known as `url`.
    #[must_use]
    pub fn new(state_dir: impl Into<PathBuf>, listen: Vec<SocketAddr>, url: impl Into<String>) -> Self {
        Self {
            state_dir: state_dir.into(),
            listen,
            url: url.into(),
            stun: Vec::new(),
            region_id: DEFAULT_REGION,
            relay: true,
            derp_map: DerpMap::default(),
            certificate: Certificate::Generated,
            insecure_relay_for_tests: false,
            front: Front::default(),
        }
    }
}

/// A running control plane. Ends with [`shutdown`](Self::shutdown), or when dropped.
#[derive(Debug)]
pub struct Coordinator {
    control: Arc<control::Coordinator>,
    relay: Option<Arc<RelayServer>>,
    own_region: Option<DerpRegion>,
    accepting: JoinSet<()>,
    connections: TaskTracker,
    /// What the certificate's keeper waits for.
    look: Arc<Notify>,
}

impl Coordinator {
    /// Starts everything; returns when connections are accepted.
    ///
    /// # Errors
    /// One line that says what to do: an address in use, a state directory in use or damaged, a bad certificate.
    #[expect(clippy::unused_async, reason = "tells the caller that a runtime is needed")]
    pub async fn start(config: Config) -> Result<Self, Error> {
        listen::state_dir(&config.state_dir)?;
        let (host, port) = host_and_port(&config.url)?;
        // First, because it locks the state directory: another coordinator's certificate must not be replaced.
        let wanted = control::Config::new(&config.state_dir, &config.url);
        let control = control::Coordinator::start(wanted).map_err(|error| Error::Setting(error.to_string()))?;
        config.certificate.names_host(&host)?;
        let server = Server { state_dir: &config.state_dir, host: &host, listen: &config.listen };
        let certificate = config.certificate.open(server)?;

        // Before the map says where they are: a second STUN port may not be had.
        let listeners = listen::tcp(Sockets::bind(&config.listen, &[])?.tcp)?;
        let stun = Stun::bind_pairs(&config.stun)?;
        let place = Place { region: config.region_id, host, port, listen: &config.listen, stun: stun.addresses() };
        let own_region = config.relay.then(|| own_region(&place, certificate.pin(), config.insecure_relay_for_tests));
        control.set_derp_map(with_own(config.derp_map, own_region.as_ref()));

        let relay = if config.relay {
            let key = relay::load_or_generate_key(&config.state_dir)
                .map_err(|source| Error::System { what: "the relay's key", source })?;
            let admission = Arc::new(Members(Arc::downgrade(&control)));
            let server = RelayServer::new(
                key,
                relay::Config { admission, public: config.front.public(), ..relay::Config::default() },
            );
            control.embed_relay(Arc::clone(&server));
            Some(server)
        } else {
            None
        };

        let mut accepting = JoinSet::new();
        let public = relay.as_deref().map(RelayServer::public);
        let (acceptor, look) = certificate.show(listeners, public, &mut accepting)?;
        let acceptor = acceptor.with_settings(config.front.listener());
        if let Some(relay) = &relay {
            relay.show(acceptor.watch());
            relay.show(stun.watch());
            front::refresh(relay, &mut accepting);
        }
        stun.serve(&mut accepting);
        let connections = TaskTracker::new();
        accepting.spawn(accept(acceptor, Arc::clone(&control), relay.clone(), connections.clone()));
        Ok(Self { control, relay, own_region, accepting, connections, look })
    }

    /// The URL that nodes use.
    #[must_use]
    pub fn url(&self) -> &str {
        self.control.url()
    }

    /// The coordination server itself.
    #[must_use]
    pub fn control(&self) -> &Arc<control::Coordinator> {
        &self.control
    }

    /// The embedded relay, if there is one.
    #[must_use]
    pub fn relay(&self) -> Option<&Arc<RelayServer>> {
        self.relay.as_ref()
    }

    /// Replaces the further relays and tells every connected node; the embedded one stays.
    pub fn set_derp_map(&self, further: DerpMap) {
        self.control.set_derp_map(with_own(further, self.own_region.as_ref()));
    }

    /// Looks after the certificate at once: reads its files again, or asks an authority again that has failed. What comes
    /// of it is in the log.
    pub fn reload_certificate(&self) {
        self.look.notify_one();
    }

    /// Ends all connections and releases addresses and state directory.
    pub async fn shutdown(mut self) {
        self.accepting.shutdown().await;
        if let Some(relay) = self.relay.take() {
            relay.shutdown(SEND_AWAY).await;
        }
        self.control.shutdown();
        self.connections.close();
        if tokio::time::timeout(Duration::from_secs(5), self.connections.wait()).await.is_err() {
            tracing::warn!("connections are still open after five seconds");
        }
        self.control.stop().await;
    }
}

async fn accept(
    mut acceptor: Acceptor,
    control: Arc<control::Coordinator>,
    relay: Option<Arc<RelayServer>>,
    connections: TaskTracker,
) {
    loop {
        let incoming = acceptor.next().await;
        let (control, relay) = (Arc::clone(&control), relay.clone());
        connections.spawn(serve(incoming, control, relay));
    }
}

async fn serve(incoming: Incoming, control: Arc<control::Coordinator>, relay: Option<Arc<RelayServer>>) {
    match relay {
        Some(relay) if RelayServer::handles(&incoming.head) => relay.serve(incoming).await,
        _ => {
            let from = incoming.peer_addr;
            control.serve_stream(incoming.into_replay(), from).await;
        }
    }
}

/// How long clients of the relay may be sent away one after another when the coordinator ends.
const SEND_AWAY: Duration = Duration::from_secs(5);

/// The coordinator's nodes may use its relay, and nobody else.
#[derive(Debug)]
struct Members(Weak<control::Coordinator>);

impl Admission for Members {
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        let admitted = self.0.upgrade().is_some_and(|control| control.admits(&applicant.node));
        Box::pin(std::future::ready(admitted))
    }
}

fn own_region(place: &Place<'_>, pin: Option<String>, insecure_for_tests: bool) -> DerpRegion {
    let mut region = DerpRegion::new(place.region, "own", "This coordinator");
    region.nodes = place.nodes(pin);
    if insecure_for_tests {
        let relay = &region.nodes[0];
        let unchecked = DerpNode {
            name: format!("{}-insecure", place.region),
            cert_name: String::new(),
            insecure_for_tests: true,
            ..relay.clone()
        };
        // First, because the clients that need it dial the first relay that answers and take no other: tailscale 0.6.1
        // reads a pin as a host name and then fails for good.
        region.nodes.insert(0, unchecked);
    }
    region
}

fn with_own(mut map: DerpMap, own: Option<&DerpRegion>) -> DerpMap {
    if let Some(own) = own {
        map.regions.insert(own.id, own.clone());
    }
    map
}

/// Host and port of an `http://` or `https://` URL.
fn host_and_port(url: &str) -> Result<(String, u16), Error> {
    let wrong = |why: &str| Error::Setting(format!("--url {url:?}: {why}; expected http://HOST:PORT or https://HOST"));
    let parsed: hyper::Uri = url.parse().map_err(|_| wrong("not a URL"))?;
    let default = match parsed.scheme_str() {
        Some("http") => 80,
        Some("https") => 443,
        _ => return Err(wrong("neither http nor https")),
    };
    let host = parsed.host().filter(|host| !host.is_empty()).ok_or_else(|| wrong("no host"))?;
    Ok((host.trim_matches(['[', ']']).to_owned(), parsed.port_u16().unwrap_or(default)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_host_and_a_port() {
        assert_eq!(host_and_port("http://203.0.113.2:8080").unwrap(), ("203.0.113.2".to_owned(), 8080));
        assert_eq!(host_and_port("https://mesh.example.org").unwrap(), ("mesh.example.org".to_owned(), 443));
        assert_eq!(host_and_port("http://[2001:db8::1]").unwrap(), ("2001:db8::1".to_owned(), 80));
        for bad in ["", "mesh.example.org", "ftp://x", "http://"] {
            assert!(host_and_port(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_reloaded_map_cannot_displace_the_embedded_relay() {
        let own = DerpRegion::new(DEFAULT_REGION, "own", "Own");
        let mut further = DerpMap::default();
        further.regions.insert(DEFAULT_REGION, DerpRegion::new(DEFAULT_REGION, "other", "Other"));
        let map = with_own(further, Some(&own));
        assert_eq!(map.regions[&DEFAULT_REGION].code, "own");
    }
}
