//! Which relay of a region a client finds its way to, and how soon.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mesh_derp::driver::client::{Carriage, Options, RelayClient, RelayEvent};
use mesh_derp::driver::server::{AllowList, Config};
use mesh_derp::map::{DerpNode, DerpRegion};
use mesh_derp::tls::ClientTls;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::harness::{TestRelay, client, connected, event, eventually, node_key, trusting};

/// The relay's region with another node in front of its own, which is the same but for what `describe` changes.
fn behind(relay: &TestRelay, describe: impl FnOnce(&mut DerpNode)) -> DerpRegion {
    let mut region = relay.region();
    let mut first = DerpNode { name: "900first".into(), ..region.nodes[0].clone() };
    describe(&mut first);
    region.nodes.insert(0, first);
    region
}

/// The node that the first event is about, and how long that took.
async fn reached(client: &mut RelayClient) -> (String, Duration) {
    let began = Instant::now();
    let event = event(client).await;
    let RelayEvent::Connected { node } = event else { panic!("{event:?}") };
    (node, began.elapsed())
}

/// A port of this host where nobody listens.
fn refusing() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A port that lets connection attempts wait: its queue is full.
struct BlackHole {
    socket: Socket,
    _waiting: Vec<Socket>,
}

impl BlackHole {
    fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap();
        let waiting = std::iter::repeat_with(|| {
            let waiting = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            waiting.set_nonblocking(true).unwrap();
            let _ = waiting.connect(&address);
            waiting
        });
        Self { _waiting: waiting.take(3).collect(), socket }
    }

    fn port(&self) -> u16 {
        self.socket.local_addr().unwrap().as_socket().unwrap().port()
    }
}

/// A server that closes every connection, and counts them.
async fn closing() -> (u16, Arc<AtomicUsize>) {
    let (listener, count) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::new(AtomicUsize::new(0)));
    let (port, counting) = (listener.local_addr().unwrap().port(), Arc::clone(&count));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
            counting.fetch_add(1, Ordering::Relaxed);
        }
    });
    (port, count)
}

#[tokio::test]
async fn a_first_node_that_refuses_costs_nothing() {
    let relay = TestRelay::start().await;
    let region = behind(&relay, |node| node.derp_port = refusing());
    let (node, took) = reached(&mut client(region, trusting(), 1)).await;
    eprintln!("first node refuses: connected after {took:?}");
    assert_eq!(node, "900a");
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn a_first_node_that_is_silent_costs_a_quarter_of_a_second() {
    let (relay, hole) = (TestRelay::start().await, BlackHole::new());
    let region = behind(&relay, |node| node.derp_port = hole.port());
    let (node, took) = reached(&mut client(region, trusting(), 1)).await;
    eprintln!("first node silent: connected after {took:?}");
    assert_eq!(node, "900a");
    assert!((250..1200).contains(&took.as_millis()), "{took:?}");
}

#[tokio::test]
async fn a_first_node_whose_tls_fails_is_passed_over() {
    let relay = TestRelay::start().await;
    let region = behind(&relay, |node| node.cert_name = format!("sha256-raw:{}", "00".repeat(32)));
    let (node, took) = reached(&mut client(region, trusting(), 1)).await;
    eprintln!("first node's certificate is wrong: connected after {took:?}");
    assert_eq!(node, "900a");
}

#[tokio::test]
async fn a_first_node_that_is_a_web_server_is_passed_over() {
    let relay = TestRelay::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let region = behind(&relay, |node| node.derp_port = listener.local_addr().unwrap().port());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        }
    });
    assert_eq!(reached(&mut client(region, ClientTls::plain(), 1)).await.0, "900a");
}

#[tokio::test]
async fn after_a_first_node_that_refuses_the_login_the_second_is_tried() {
    let closed = Config { admission: Arc::new(AllowList::new([])), ..Config::default() };
    let strict = TestRelay::start_with(closed, "127.0.0.1:0".parse().unwrap()).await;
    let relay = TestRelay::start().await;
    let region = behind(&relay, |node| {
        node.derp_port = strict.address.port();
        node.cert_name = strict.pin.clone();
    });
    let mut client = client(region, trusting(), 1);
    assert!(matches!(event(&mut client).await, RelayEvent::Disconnected { .. }));
    let (node, took) = reached(&mut client).await;
    eprintln!("first node refuses the login: on the second {took:?} later");
    assert_eq!((node.as_str(), strict.counters().not_admitted), ("900a", 1));
}

#[tokio::test]
async fn a_first_node_that_has_ipv6_only_is_reached_by_it() {
    let Ok(probe) = std::net::TcpListener::bind("[::1]:0") else {
        eprintln!("skipped: this host has no IPv6 loopback");
        return;
    };
    drop(probe);
    let relay = TestRelay::start().await;
    let over_v6 = TestRelay::start_with(Config::default(), "[::1]:0".parse().unwrap()).await;
    let region = behind(&relay, |node| {
        (node.ipv4, node.ipv6) = ("none".into(), "::1".into());
        node.derp_port = over_v6.address.port();
        node.cert_name = over_v6.pin.clone();
    });
    assert_eq!(reached(&mut client(region, trusting(), 1)).await.0, "900first");
}

#[tokio::test]
async fn every_node_that_failed_is_named_with_its_reason() {
    let relay = TestRelay::start().await;
    let mut region = behind(&relay, |node| node.derp_port = refusing());
    region.nodes[1].cert_name = "sha256-raw:xyz".into();
    let RelayEvent::Disconnected { reason } = event(&mut client(region, trusting(), 1)).await else { panic!() };
    assert!(reason.contains("onnection refused") && reason.contains("; ") && reason.contains("sha256-raw"), "{reason}");
}

#[tokio::test]
async fn who_comes_back_goes_to_the_node_that_worked() {
    let relay = TestRelay::start().await;
    let (port, asked) = closing().await;
    let region = behind(&relay, |node| node.derp_port = port);
    let mut client = client(region, trusting(), 1);
    assert_eq!(reached(&mut client).await.0, "900a");
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    // Only a connection that has lasted counts as one that worked.
    let lasting = tokio::time::timeout(Duration::from_millis(5200), client.next_event()).await;
    assert!(lasting.is_err(), "{lasting:?}");
    relay.server.close_all();
    assert!(matches!(event(&mut client).await, RelayEvent::Disconnected { .. }));
    assert_eq!(reached(&mut client).await.0, "900a");
    assert_eq!(asked.load(Ordering::Relaxed), 1, "the first node was not asked again");
}

/// Sends packets to itself through the first relay of `region`, has that one `die`, and says how long it took from then until
/// packets came through the other one.
async fn transfer_across(region: DerpRegion, die: impl FnOnce()) -> Duration {
    let mut a = client(region, trusting(), 1);
    assert_eq!(reached(&mut a).await.0, "900first");
    let (outbox, own) = (a.outbox(), node_key(1).public());
    let sending = tokio::spawn(async move {
        loop {
            for _ in 0..20 {
                outbox.try_send(own, Bytes::from(vec![9; 1400]));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    for _ in 0..200 {
        let event = event(&mut a).await;
        assert!(matches!(event, RelayEvent::Packet { .. }), "{event:?}");
    }
    die();
    let (died, mut node) = (Instant::now(), None);
    loop {
        let event = event(&mut a).await;
        if let RelayEvent::Connected { node: reached } = event {
            node = Some(reached);
        } else if node.is_some() && matches!(event, RelayEvent::Packet { .. }) {
            break;
        }
    }
    sending.abort();
    assert_eq!(node.unwrap(), "900a");
    died.elapsed()
}

#[tokio::test]
async fn a_relay_that_ends_within_a_transfer_is_replaced_in_well_under_a_second() {
    let (first, second) = (TestRelay::start().await, TestRelay::start().await);
    let region = behind(&second, |node| {
        node.derp_port = first.address.port();
        node.cert_name = first.pin.clone();
    });
    let took = transfer_across(region, || drop(first)).await;
    eprintln!("relay ends: packets pass through the other one {took:?} later");
    assert!(took < Duration::from_millis(900), "{took:?}");
}

const RELAY_PROCESS: &str = "MESH_DERP_TEST_RELAY_PROCESS";

/// No test, but the relay that the next one starts as a process: it writes its port and pin into the file that it is given.
#[tokio::test]
async fn relay_process() {
    let Some(file) = std::env::var_os(RELAY_PROCESS) else { return };
    let relay = TestRelay::start().await;
    let unfinished = std::path::Path::new(&file).with_extension("part");
    std::fs::write(&unfinished, format!("{} {}", relay.address.port(), relay.pin)).unwrap();
    std::fs::rename(unfinished, file).unwrap();
    // Nobody waits for it if the test ends early.
    tokio::time::sleep(Duration::from_secs(60)).await;
}

#[tokio::test]
async fn a_relay_that_is_killed_within_a_transfer_is_replaced_in_well_under_a_second() {
    let (second, dir) = (TestRelay::start().await, tempfile::tempdir().unwrap());
    let file = dir.path().join("relay");
    let mut first = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "dialling::relay_process", "--quiet"])
        .env(RELAY_PROCESS, &file)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let told = eventually("a relay", || std::fs::read_to_string(&file).ok()).await;
    let (port, pin) = told.split_once(' ').unwrap();
    let region = behind(&second, |node| {
        node.derp_port = port.parse().unwrap();
        node.cert_name = pin.to_owned();
    });
    let took = transfer_across(region, || first.kill().unwrap()).await;
    first.wait().unwrap();
    eprintln!("relay killed with SIGKILL: packets pass through the other one {took:?} later");
    assert!(took < Duration::from_millis(900), "{took:?}");
}

#[tokio::test]
async fn home_is_told_again_after_a_reconnect() {
    let relay = TestRelay::start().await;
    let mut a = client(relay.region(), trusting(), 1);
    a.set_home(true);
    connected(&mut a).await;
    eventually("home", || (relay.counters().homes == 1).then_some(())).await;
    relay.server.close_all();
    eventually("gone", || (relay.counters().homes == 0).then_some(())).await;
    connected(&mut a).await;
    eventually("home again", || (relay.counters().homes == 1).then_some(())).await;
}

/// A server in front of a relay that lets nothing through but WebSocket; counts what it has refused.
async fn only_websocket(relay: SocketAddr) -> (u16, Arc<AtomicUsize>, JoinHandle<()>) {
    let (listener, refused) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::new(AtomicUsize::new(0)));
    let (port, counting) = (listener.local_addr().unwrap().port(), Arc::clone(&refused));
    let task = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let counting = Arc::clone(&counting);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                if !String::from_utf8_lossy(&head).contains("Upgrade: websocket\r\n") {
                    counting.fetch_add(1, Ordering::Relaxed);
                    stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await.unwrap();
                    return;
                }
                let mut relay = TcpStream::connect(relay).await.unwrap();
                relay.write_all(&head).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut relay).await;
            });
        }
    });
    (port, refused, task)
}

async fn talks_to_itself(client: &mut RelayClient) {
    let payload: Bytes = (0..50_000u32).map(|n| n.to_le_bytes()[0]).collect::<Vec<_>>().into();
    client.outbox().try_send(node_key(1).public(), payload.clone());
    assert!(crate::harness::packet(client).await == (node_key(1).public(), payload));
}

#[tokio::test]
async fn where_only_websocket_gets_through_that_is_found_out_and_remembered() {
    let relay = TestRelay::start().await;
    let (port, refused, _task) = only_websocket(relay.address).await;
    let mut region = relay.region();
    region.nodes[0].derp_port = port;
    let mut a = client(region, ClientTls::plain(), 1);
    connected(&mut a).await;
    talks_to_itself(&mut a).await;
    assert_eq!(refused.load(Ordering::Relaxed), 1);
    let lasting = tokio::time::timeout(Duration::from_millis(5200), a.next_event()).await;
    assert!(lasting.is_err(), "{lasting:?}");
    relay.server.close_all();
    connected(&mut a).await;
    assert_eq!(refused.load(Ordering::Relaxed), 1, "the second time it asked for a websocket at once");
    talks_to_itself(&mut a).await;
}

#[tokio::test]
async fn websocket_may_be_demanded_and_runs_over_tls() {
    let relay = TestRelay::start().await;
    let mut options = Options::new(relay.region(), node_key(1), trusting());
    options.carriage = Carriage::WebSocket;
    let mut a = RelayClient::new(options);
    connected(&mut a).await;
    talks_to_itself(&mut a).await;
    drop(a);
    eventually("gone", || (relay.counters().connections == 0).then_some(())).await;
}
