//! Whole meshes on the loopback interface: a real coordinator, a real relay, nodes with the userspace stack.

#![expect(clippy::unwrap_used, reason = "a lab that cannot be built is a failed test")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_control::admin::{self, CreateKey};
use mesh_derp::map::DerpRegion;
use mesh_node::coordinator::{self, Coordinator};
use mesh_node::events::Change;
use mesh_node::local_api::{Client, LocalApi, PingRequest, SetRequest, UpRequest, Via};
use mesh_node::relay::{self, Relay};
use mesh_node::status::PathKind;
use mesh_node::{Error, Node, NodeState, PathMode, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_talk_by_the_relay_and_then_directly() {
    let lab = Lab::start().await;
    let (one, two) = lab.pair(PathMode::Relay).await;
    serve_page(&one, "over the mesh");

    assert_eq!(fetch(&two, "one").await.unwrap(), "over the mesh");
    let status = two.status().await.unwrap();
    let peer = status.peers.iter().find(|peer| peer.name.starts_with("one.")).unwrap();
    assert_eq!(peer.path.kind, PathKind::Relay, "{peer:?}");
    assert!(peer.relay.rx_packets > 0 && peer.relay.tx_packets > 0, "{peer:?}");
    assert_eq!((peer.direct.rx_packets, peer.direct.tx_packets), (0, 0), "{peer:?}");
    assert!(peer.last_handshake.is_some());
    assert!(lab.relay_frames() > 0);

    let mut events = two.events();
    for node in [&one, &two] {
        node.set_path_mode(PathMode::Auto).await.unwrap();
    }
    until_direct(&two, "one").await;
    let event = tokio::time::timeout(PATIENCE, async {
        loop {
            let event = events.next().await.expect("the node lives");
            if matches!(event.change, Change::Path { .. }) {
                return event;
            }
        }
    });
    let event = event.await.unwrap();
    let Change::Path { peer: who, from, to, rtt, why, .. } = event.change else { unreachable!() };
    assert_eq!((who, from.kind, to.kind), (peer.key, PathKind::Relay, PathKind::Direct));
    assert!(rtt.is_some_and(|rtt| rtt < Duration::from_secs(1)) && to.endpoint.is_some(), "{event:?}");
    assert_eq!(to.because(&why), "it answers there");
    until_direct(&one, "two").await;
    let before = peer_status(&two, "one").await;
    assert_eq!(fetch(&two, "one").await.unwrap(), "over the mesh");
    let after = peer_status(&two, "one").await;
    assert_eq!(after.path.kind, PathKind::Direct);
    assert!(after.direct.rx_packets > before.direct.rx_packets, "{after:?}");
    assert_eq!(after.relay.rx_packets, before.relay.rx_packets, "{after:?}");

    // By full name and by address, too.
    let full = after.name.clone();
    assert_eq!(fetch(&two, &full).await.unwrap(), "over the mesh");
    assert_eq!(fetch(&two, &after.addresses[0].to_string()).await.unwrap(), "over the mesh");
    assert!(matches!(two.dial("nobody", 80).await, Err(Error::UnknownPeer(_))));
    one.shutdown().await;
    two.shutdown().await;
    let rest = async { while events.next().await.is_some() {} };
    tokio::time::timeout(PATIENCE, rest).await.expect("the end of the node ends its events");
    assert_eq!(events.lost(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_resumes_after_the_relay_has_died() {
    let mut lab = Lab::start().await;
    let (one, two) = lab.pair(PathMode::Relay).await;
    serve_page(&one, "still here");
    assert_eq!(fetch(&two, "one").await.unwrap(), "still here");
    lab.stop_relay().await;
    wait_until(|| async { !two.status().await.unwrap().this.relay_connected }).await;
    lab.start_relay().await;
    wait_until(|| async { fetch(&two, "one").await.is_ok_and(|page| page == "still here") }).await;
    assert!(two.status().await.unwrap().this.relay_connected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_outlive_the_coordinator_and_it_is_found_again() {
    let mut lab = Lab::start().await;
    let (one, two) = lab.pair(PathMode::Auto).await;
    serve_page(&one, "without it");
    assert_eq!(fetch(&two, "one").await.unwrap(), "without it");
    let addresses = two.addresses();
    lab.stop_coordinator().await;
    wait_until(|| async { !two.status().await.unwrap().control_connected }).await;
    assert_eq!(fetch(&two, "one").await.unwrap(), "without it");
    assert_eq!(*two.state().borrow(), NodeState::Running);
    lab.start_coordinator().await;
    wait_until(|| async {
        let connected = |status: Status| status.control_connected;
        connected(one.status().await.unwrap()) && connected(two.status().await.unwrap())
    })
    .await;
    assert_eq!(two.addresses(), addresses);
    let three = lab.node("three", PathMode::Auto).await;
    wait_until(|| async { fetch(&three, "one").await.is_ok_and(|page| page == "without it") }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_auth_key_and_an_absent_coordinator_are_said_in_one_line() {
    let lab = Lab::start().await;
    let node = lab.builder("one").auth_key("mesh-auth-nonsense").start().await.unwrap();
    let line = node.wait_running(PATIENCE).await.unwrap_err().to_string();
    assert!(line.contains("refuses") && !line.contains('\n'), "{line}");

    let nowhere = Node::builder().control_url("http://127.0.0.1:9").port_mapping(false).start().await.unwrap();
    let line = nowhere.wait_running(Duration::from_secs(2)).await.unwrap_err().to_string();
    assert!(line.contains("127.0.0.1:9") && !line.contains('\n'), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_keeps_its_identity_over_a_restart_and_gives_it_up_by_logging_out() {
    let lab = Lab::start().await;
    let state = tempfile::tempdir().unwrap();
    let node = lab.builder("one").auth_key(lab.key.clone()).state_dir(state.path()).start().await.unwrap();
    node.wait_running(PATIENCE).await.unwrap();
    let (addresses, key) = (node.addresses(), node.status().await.unwrap().this.key);
    let line = lab.builder("one").state_dir(state.path()).start().await.unwrap_err().to_string();
    assert!(line.contains("in use by process"), "{line}");
    node.shutdown().await;
    drop(node);

    let node = Node::builder().state_dir(state.path()).port_mapping(false).start().await.unwrap();
    node.wait_running(PATIENCE).await.unwrap();
    assert_eq!((node.addresses(), node.status().await.unwrap().this.key), (addresses.clone(), key));
    node.down().await.unwrap();
    assert_eq!(*node.state().borrow(), NodeState::Stopped { error: None });
    assert!(node.addresses().is_empty());
    node.up(mesh_node::UpOptions::default()).await.unwrap();
    node.wait_running(PATIENCE).await.unwrap();
    node.logout().await.unwrap();
    let again = mesh_node::UpOptions { auth_key: Some(lab.key.clone()), ..Default::default() };
    node.up(again).await.unwrap();
    node.wait_running(PATIENCE).await.unwrap();
    assert_ne!(node.status().await.unwrap().this.key, key, "a logout gives the node key up");
    assert_eq!(node.addresses(), addresses, "the machine keeps its addresses");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_node_signs_in_again_under_a_new_key_and_keeps_its_addresses() {
    let lab = Lab::start().await;
    let one = lab.node("one", PathMode::Auto).await;
    serve_page(&one, "who am I");
    // A key that is spent when the node needs one again.
    let once = CreateKey { user: "alice".into(), ..CreateKey::default() };
    let key = lab.admin().create_key(&once).await.unwrap().key.unwrap();
    let two = lab.builder("two").auth_key(key).start().await.unwrap();
    two.wait_running(PATIENCE).await.unwrap();
    wait_until(|| async { fetch(&two, "one").await.is_ok_and(|page| page == "who am I") }).await;
    let (key, addresses) = (two.status().await.unwrap().this.key, two.addresses());
    lab.admin().expire_node("two").await.unwrap();
    let mut states = two.state();
    let waiting = states.wait_for(|state| matches!(state, NodeState::NeedsLogin { .. }));
    let NodeState::NeedsLogin { url } = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap().clone() else {
        unreachable!("it was waited for")
    };
    lab.admin().approve(&url, "alice").await.unwrap();
    two.wait_for(PATIENCE, |_| false).await.unwrap();
    assert_ne!(two.status().await.unwrap().this.key, key);
    assert_eq!(two.addresses(), addresses);
    wait_until(|| async { fetch(&two, "one").await.is_ok_and(|page| page == "who am I") }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_the_command_line_needs_goes_through_the_socket() {
    let lab = Lab::start().await;
    let one = lab.node("one", PathMode::Auto).await;
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("mesh.sock");
    let two = lab.builder("unnamed").start().await.unwrap();
    two.down().await.unwrap();
    let api = LocalApi::start(&socket, two.clone()).await.unwrap();
    let client = Client::new(&socket);
    assert_eq!(client.status().await.unwrap().state, NodeState::Stopped { error: None });
    assert!(client.ip().await.unwrap_err().to_string().contains("mesh up"));
    let line = LocalApi::start(&socket, two.clone()).await.unwrap_err().to_string();
    assert!(line.contains("another daemon"), "{line}");

    // Without a key, somebody has to approve; with the administrator's word, the node runs.
    let request =
        UpRequest { control_url: Some(lab.url.clone()), hostname: Some("two".into()), ..UpRequest::default() };
    let pending = client.up(&request).await.unwrap();
    let url = pending.auth_url.unwrap();
    assert!(url.starts_with(&lab.url), "{url}");
    lab.admin().approve(&url, "alice").await.unwrap();
    let running = client.wait(PATIENCE).await.unwrap();
    assert_eq!(running.state, NodeState::Running);
    assert_eq!(client.ip().await.unwrap().addresses, running.addresses);

    wait_until(|| async { one.directory().find("two").is_some() && two.directory().find("one").is_some() }).await;
    let ping = PingRequest { peer: "one".into(), size: Some(600), timeout_ms: Some(5000) };
    let pong = client.ping(&ping).await.unwrap();
    assert!(pong.ms > 0.0 && pong.peer.starts_with("one."), "{pong:?}");
    let refused = client.ping(&PingRequest { peer: "nobody".into(), ..ping }).await.unwrap_err();
    assert!(refused.to_string().contains("nobody"), "{refused}");
    assert!(client.netcheck().await.unwrap().udp);
    client.set(&SetRequest { path: Some(PathMode::Relay), hostname: None }).await.unwrap();
    let status = client.status().await.unwrap();
    assert_eq!(status.this.path_mode, PathMode::Relay);
    assert_eq!(status.peers[0].path.kind, PathKind::Relay);
    assert!(status.this.home_region.is_some() && !status.this.endpoints.is_empty());
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["state"], "running");
    assert!(json["self"]["endpoints"].is_array() && json["peers"][0]["path"]["region"].is_number(), "{json}");
    assert_eq!(client.version().await.unwrap(), mesh_node::version());
    client.down().await.unwrap();
    assert_eq!(client.status().await.unwrap().state, NodeState::Stopped { error: None });
    drop(api);
    assert!(client.version().await.unwrap_err().to_string().contains("mesh daemon"));
}

// --- the lab ---------------------------------------------------------------------------------------------------------

/// A coordinator and a relay that can be stopped and started again, each on its own port.
struct Lab {
    directory: tempfile::TempDir,
    coordinator_config: coordinator::Config,
    relay_config: relay::Config,
    url: String,
    key: String,
    coordinator: Option<Coordinator>,
    relay: Option<Relay>,
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

impl Lab {
    async fn start() -> Self {
        let logs = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env());
        // Another test of this process may have been first.
        logs.with_test_writer().try_init().ok();
        let directory = tempfile::tempdir().unwrap();
        let address = free_address();
        let url = format!("http://{address}");
        let mut coordinator_config =
            coordinator::Config::new(directory.path().join("coordinator"), vec![address], &url);
        let mut relay_config = relay::Config::new(directory.path().join("relay"), vec![free_address()]);
        relay_config.stun = vec![free_address()];
        let node = relay::describe(&relay_config).unwrap();
        let mut region = DerpRegion::new(node.region_id, "lab", "The lab");
        region.nodes.push(node);
        coordinator_config.relay = false;
        coordinator_config.derp_map.regions.insert(region.id, region);
        let (key, coordinator, relay) = (String::new(), None, None);
        let mut lab = Self { directory, coordinator_config, relay_config, url, key, coordinator, relay };
        lab.start_relay().await;
        lab.start_coordinator().await;
        let admin = lab.admin();
        admin.create_user("alice").await.unwrap();
        let wanted = CreateKey { user: "alice".into(), reusable: true, ..CreateKey::default() };
        lab.key = admin.create_key(&wanted).await.unwrap().key.unwrap();
        lab
    }

    fn admin(&self) -> admin::Client {
        admin::Client::new(&self.directory.path().join("coordinator"))
    }

    async fn start_relay(&mut self) {
        self.relay = Some(Relay::start(self.relay_config.clone()).await.unwrap());
    }

    async fn stop_relay(&mut self) {
        self.relay.take().unwrap().shutdown().await;
    }

    fn relay_frames(&self) -> u64 {
        self.relay.as_ref().unwrap().server().counters().packets_out
    }

    async fn start_coordinator(&mut self) {
        self.coordinator = Some(Coordinator::start(self.coordinator_config.clone()).await.unwrap());
    }

    async fn stop_coordinator(&mut self) {
        self.coordinator.take().unwrap().shutdown().await;
    }

    fn builder(&self, hostname: &str) -> mesh_node::Builder {
        Node::builder().control_url(&self.url).hostname(hostname).loopback_endpoints(true).port_mapping(false)
    }

    async fn node(&self, hostname: &str, mode: PathMode) -> Node {
        let node = self.builder(hostname).auth_key(&self.key).path_mode(mode).start().await.unwrap();
        node.wait_running(PATIENCE).await.unwrap();
        node
    }

    /// Two nodes that know each other.
    async fn pair(&self, mode: PathMode) -> (Node, Node) {
        let (one, two) = (self.node("one", mode).await, self.node("two", mode).await);
        wait_until(|| async {
            let ready = |node: &Node, other: &str| node.directory().find(other).is_some();
            let home = |status: Status| status.this.relay_connected && status.peers[0].home_region.is_some();
            ready(&one, "two")
                && ready(&two, "one")
                && home(one.status().await.unwrap())
                && home(two.status().await.unwrap())
        })
        .await;
        (one, two)
    }
}

fn serve_page(node: &Node, page: &'static str) {
    let listener = node.listen(80).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 1024];
                let read = stream.read(&mut request).await.unwrap_or_default();
                if request[..read].starts_with(b"GET / ") {
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len());
                    stream.write_all(answer.as_bytes()).await.ok();
                    stream.shutdown().await.ok();
                }
            });
        }
    });
}

async fn fetch(node: &Node, from: &str) -> Result<String, Error> {
    let exchange = async {
        let mut stream = node.dial(from, 80).await?;
        let mut answer = String::new();
        let io = async {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n").await?;
            stream.read_to_string(&mut answer).await
        };
        io.await.map_err(|source| Error::System { what: "cannot fetch", source })?;
        Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
    };
    let limit = Duration::from_secs(10);
    tokio::time::timeout(limit, exchange).await.unwrap_or(Err(Error::Timeout(limit)))
}

async fn peer_status(node: &Node, name: &str) -> mesh_node::status::PeerStatus {
    let status = node.status().await.unwrap();
    status.peers.into_iter().find(|peer| peer.name.starts_with(&format!("{name}."))).unwrap()
}

async fn until_direct(node: &Node, peer: &str) {
    wait_until(|| async {
        let pong = node.ping(peer, None, Duration::from_secs(5)).await;
        pong.is_ok_and(|pong| matches!(pong.via, Via::Direct { .. }))
            && peer_status(node, peer).await.path.kind == PathKind::Direct
    })
    .await;
}

#[expect(clippy::disallowed_methods, reason = "these tests run in real time")]
async fn wait_until<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < PATIENCE, "nothing of the kind happened within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
