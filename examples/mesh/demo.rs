//! `mesh demo`: a whole mesh on this host, in one process, without root.
//!
//! Every step prints what really happened; the first that does not happen ends the demonstration with a failure.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use mesh_control::admin::{Client as Operator, CreateKey};
use mesh_node::coordinator::{self, Coordinator};
use mesh_node::prefs::PathMode;
use mesh_node::status::{PathKind, PathStatus, PeerStatus};
use mesh_node::{Node, local_api::LocalApi};
use tokio::net::TcpListener;

use crate::cli::Demo;
use crate::{node::now, output};

/// How long any one step may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where anna serves her page within the mesh.
const PAGE_PORT: u16 = 80;
/// Size of the page: enough to see on the counters.
const PAGE_LEN: usize = 1_000_000;

/// Runs the demonstration.
pub(crate) async fn run(options: &Demo) -> anyhow::Result<()> {
    let started = now();
    let dir = tempfile::Builder::new().prefix("mesh-demo-").tempdir()?;
    let state_dir = dir.path().join("coordinator");

    let coordinator = start_coordinator(&state_dir).await?;
    let url = coordinator.url().to_owned();
    output::print(&format!("coordinator  {url}, relay and STUN inside"))?;

    let operator = Operator::new(&state_dir);
    for user in ["anna", "bert"] {
        operator.create_user(user).await?;
    }
    let anna = start_node(&operator, &url, "anna", dir.path()).await?;
    let bert = start_node(&operator, &url, "bert", dir.path()).await?;
    for (name, node) in [("anna", &anna), ("bert", &bert)] {
        let addresses: Vec<String> = node.addresses().iter().map(ToString::to_string).collect();
        output::print(&format!("node {name}    {}", addresses.join(", ")))?;
    }
    let took = started.elapsed().as_secs_f64();
    output::print(&format!("\nup after {took:.1} s; now bert asks for a page on anna's port {PAGE_PORT}\n"))?;
    serve_page(&anna)?;

    let by_relay = leg(&anna, &bert, PathMode::Relay, PathKind::Relay).await.context("by the relay")?;
    output::print(&by_relay.to_string())?;
    let direct = leg(&anna, &bert, PathMode::Auto, PathKind::Direct).await.context("directly")?;
    output::print(&direct.to_string())?;

    output::print(&format!("{}\n", output::status(&bert.status().await?)))?;
    let key = operator
        .create_key(&CreateKey {
            user: "bert".to_owned(),
            reusable: true,
            expiry_seconds: Some(3600),
            ..CreateKey::default()
        })
        .await?;
    output::print("A third node joins like this, while `mesh demo --keep` runs:")?;
    output::print(
        "  mesh daemon --state-dir /tmp/third --socket /tmp/third.sock --tun userspace --socks5 127.0.0.1:1055",
    )?;
    output::print(&format!(
        "  mesh --socket /tmp/third.sock up --login-server {url} --hostname third --auth-key {}",
        key.key.as_deref().unwrap_or("(ask `mesh admin keys create`)")
    ))?;
    output::print("  curl --proxy socks5h://127.0.0.1:1055 http://anna/")?;

    if options.keep {
        let socket = dir.path().join("bert.sock");
        let _api = LocalApi::start(&socket, bert.clone()).await?;
        output::print(&format!("\nrunning until interrupted; `mesh --socket {} status` asks bert", socket.display()))?;
        tokio::signal::ctrl_c().await?;
    }
    bert.shutdown().await;
    anna.shutdown().await;
    coordinator.shutdown().await;
    Ok(())
}

async fn start_coordinator(state_dir: &Path) -> anyhow::Result<Coordinator> {
    // The port is taken first, so that the URL can name it.
    let port = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
    let listen = SocketAddr::from(([127, 0, 0, 1], port));
    let mut config = coordinator::Config::new(state_dir, vec![listen], format!("http://{listen}"));
    config.stun = vec![listen];
    Coordinator::start(config).await.context("the coordinator did not start")
}

async fn start_node(operator: &Operator, url: &str, name: &str, dir: &Path) -> anyhow::Result<Node> {
    let key = operator
        .create_key(&CreateKey { user: name.to_owned(), expiry_seconds: Some(3600), ..CreateKey::default() })
        .await?;
    let node = Node::builder()
        .control_url(url)
        .auth_key(key.key.context("the coordinator made no key")?)
        .hostname(name)
        .state_dir(dir.join(name))
        .loopback_endpoints(true)
        .port_mapping(false)
        .path_mode(PathMode::Relay)
        .start()
        .await?;
    node.wait_running(PATIENCE).await.with_context(|| format!("{name} did not come up"))?;
    Ok(node)
}

/// Serves one page on anna's address within the mesh.
fn serve_page(anna: &Node) -> anyhow::Result<()> {
    let listener = anna.listen(PAGE_PORT)?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let service = hyper::service::service_fn(|_| async {
                    Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(vec![b'.'; PAGE_LEN]))))
                });
                let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                if let Err(error) = served.await {
                    tracing::debug!(%error, "a visitor left early");
                }
            });
        }
    });
    Ok(())
}

/// Fetches the page over one kind of path and tells, from the counters, which way it took.
async fn leg(anna: &Node, bert: &Node, mode: PathMode, kind: PathKind) -> anyhow::Result<String> {
    for node in [anna, bert] {
        node.set_path_mode(mode).await?;
    }
    for (node, peer) in [(bert, "anna"), (anna, "bert")] {
        wait_for_path(node, peer, kind).await?;
    }
    // The first fetch brings up the session and moves both sides onto the path; the second is what is counted.
    fetch(bert).await?;
    let before = [peer(bert, "anna").await?, peer(anna, "bert").await?];
    let pong = bert.ping("anna", None, PATIENCE).await?;
    let started = now();
    let length = fetch(bert).await?;
    let took = started.elapsed();
    ensure!(length == PAGE_LEN, "the page has {length} bytes and should have {PAGE_LEN}");
    let after = [peer(bert, "anna").await?, peer(anna, "bert").await?];

    let mut text = format!(
        "{}: round trip {:.1} ms, {} in {:.0} ms\n",
        if kind == PathKind::Direct { "directly by UDP" } else { "by the relay" },
        pong.ms,
        output::bytes(length as u64),
        took.as_secs_f64() * 1e3
    );
    for (name, before, after) in [("bert", &before[0], &after[0]), ("anna", &before[1], &after[1])] {
        let socket = (after.direct.rx_bytes - before.direct.rx_bytes, after.direct.tx_bytes - before.direct.tx_bytes);
        let relay = (after.relay.rx_bytes - before.relay.rx_bytes, after.relay.tx_bytes - before.relay.tx_bytes);
        let (used, unused) = if kind == PathKind::Direct { (socket, relay) } else { (relay, socket) };
        ensure!(used.0 + used.1 >= PAGE_LEN as u64, "{name} moved only {used:?} bytes on this path");
        ensure!(unused.0 + unused.1 < PAGE_LEN as u64 / 10, "{name} moved {unused:?} bytes on the other path");
        text += &format!(
            "  {name}: socket {} in, {} out; relay {} in, {} out\n",
            output::bytes(socket.0),
            output::bytes(socket.1),
            output::bytes(relay.0),
            output::bytes(relay.1)
        );
    }
    Ok(text)
}

/// Pings until packets to the peer take this kind of path.
async fn wait_for_path(node: &Node, name: &str, kind: PathKind) -> anyhow::Result<()> {
    let deadline: Instant = now() + PATIENCE;
    loop {
        let path = match node.ping(name, None, Duration::from_secs(2)).await {
            Ok(_) => peer(node, name).await?.path,
            Err(_) => PathStatus::default(),
        };
        if path.kind == kind {
            return Ok(());
        }
        ensure!(now() < deadline, "the path to {name} is still {}", output::path(&path));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn peer(node: &Node, name: &str) -> anyhow::Result<PeerStatus> {
    let status = node.status().await?;
    let found = status.peers.into_iter().find(|peer| peer.name.split('.').next() == Some(name));
    found.with_context(|| format!("{name} is not among the peers"))
}

/// Fetches anna's page through bert; returns its length.
async fn fetch(bert: &Node) -> anyhow::Result<usize> {
    let stream = bert.dial("anna", PAGE_PORT).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get("/").header("host", "anna").body(Empty::<Bytes>::new())?;
    let answer = tokio::time::timeout(PATIENCE, sender.send_request(request)).await??;
    ensure!(answer.status().is_success(), "anna answered {}", answer.status());
    Ok(tokio::time::timeout(PATIENCE, answer.into_body().collect()).await??.to_bytes().len())
}
