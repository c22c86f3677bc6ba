//! What a client does when a relay announces something. The relay here is played by hand.

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use mesh_derp::client::Timing;
use mesh_derp::driver::client::{Options, RelayClient, RelayEvent};
use mesh_derp::frame::Frame;
use mesh_derp::login::ServerInfo;
use mesh_derp::map::{DerpNode, DerpRegion};
use mesh_derp::tls::ClientTls;
use mesh_derp::upgrade;
use mesh_noise::key::NodePublic;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use crate::harness::{Raw, TestRelay, client, event, node_key, relay_key};

struct Played {
    listener: TcpListener,
    info: ServerInfo,
    /// The heads of the requests that have come.
    heads: Mutex<Vec<String>>,
}

impl Played {
    async fn start(info: ServerInfo) -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap(), info, heads: Mutex::default() }
    }

    fn node(&self, name: &str, like: &DerpNode) -> DerpNode {
        let derp_port = self.listener.local_addr().unwrap().port();
        DerpNode { name: name.into(), derp_port, ..like.clone() }
    }

    /// Lets the next client in.
    async fn accept(&self) -> Raw<TcpStream> {
        let mut raw = Raw::new(self.listener.accept().await.unwrap().0);
        let head = raw.read_head().await;
        self.heads.lock().unwrap().push(head);
        let mut greeting = upgrade::accepted(&relay_key().public());
        greeting.extend_from_slice(&Frame::ServerKey(relay_key().public()).to_bytes());
        raw.write(&greeting).await;
        let Some(Frame::ClientInfo { node, .. }) = raw.frame().await else { panic!("no login") };
        let shared = relay_key().box_with_node(&node);
        raw.send(self.info.seal(&shared, &mut StdRng::seed_from_u64(3))).await;
        raw
    }

    /// Lets `client` in, and waits until it knows.
    async fn connect(&self, client: &mut RelayClient) -> Raw<TcpStream> {
        let (raw, event) = tokio::join!(self.accept(), event(client));
        assert!(matches!(event, RelayEvent::Connected { .. }), "{event:?}");
        raw
    }
}

/// A region of a played relay, and another one behind it if given.
fn region(first: &Played, second: Option<&TestRelay>, like: DerpRegion) -> DerpRegion {
    let mut region = like;
    region.nodes = std::iter::once(first.node("900first", &region.nodes[0]))
        .chain(second.into_iter().flat_map(|second| second.region().nodes))
        .collect();
    region
}

#[tokio::test]
async fn a_relay_that_will_restart_is_left_at_its_time_and_nothing_on_the_way_is_lost() {
    let (played, relay) = (Played::start(ServerInfo::default()).await, TestRelay::start().await);
    let region = region(&played, Some(&relay), relay.region());
    let mut client = client(region, ClientTls::plain(), 1);
    let mut old = played.connect(&mut client).await;
    let told = Instant::now();
    old.send(Frame::Restarting { reconnect_in: Duration::from_millis(300), try_for: Duration::from_secs(5) }).await;
    assert!(matches!(event(&mut client).await, RelayEvent::Restarting { .. }));
    let moved = event(&mut client).await;
    assert!(matches!(&moved, RelayEvent::Connected { node } if node == "900a"), "{moved:?}");
    assert!(told.elapsed() >= Duration::from_millis(300), "the time that it named spreads its clients out");
    let late = Frame::RecvPacket { source: node_key(2).public(), payload: Bytes::from_static(b"late") };
    old.send(late).await;
    let RelayEvent::Packet { payload, .. } = event(&mut client).await else { panic!("no packet") };
    assert_eq!(payload, "late");
    let done = tokio::select! {
        frame = old.frame() => frame,
        event = client.next_event() => panic!("{event:?}"),
    };
    assert_eq!(done, None, "nothing more is said on the old connection, and it is closed");
}

#[tokio::test]
async fn the_only_relay_is_given_its_time_to_restart() {
    let (played, like) = (Played::start(ServerInfo::default()).await, TestRelay::start().await.region());
    let mut client = client(region(&played, None, like), ClientTls::plain(), 1);
    let mut raw = played.connect(&mut client).await;
    let told = Instant::now();
    raw.send(Frame::Restarting { reconnect_in: Duration::from_millis(400), try_for: Duration::from_secs(5) }).await;
    assert!(matches!(event(&mut client).await, RelayEvent::Restarting { .. }));
    drop(raw);
    assert!(matches!(event(&mut client).await, RelayEvent::Disconnected { .. }));
    let _second = played.connect(&mut client).await;
    let took = told.elapsed();
    assert!(took >= Duration::from_millis(400) && took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn a_health_report_is_kept_and_ends_with_the_connection() {
    let (played, like) = (Played::start(ServerInfo::default()).await, TestRelay::start().await.region());
    let mut client = client(region(&played, None, like), ClientTls::plain(), 1);
    let mut raw = played.connect(&mut client).await;
    raw.send(Frame::Health("overloaded".into())).await;
    assert!(matches!(event(&mut client).await, RelayEvent::Health(text) if text == "overloaded"));
    assert_eq!(client.health(), Some("overloaded"));
    drop(raw);
    assert!(matches!(event(&mut client).await, RelayEvent::Health(text) if text.is_empty()));
    assert!(matches!(event(&mut client).await, RelayEvent::Disconnected { .. }));
    assert_eq!(client.health(), None);
}

#[tokio::test]
async fn a_limit_that_the_relay_names_is_kept_to_and_the_rest_waits_in_the_outbox() {
    let played = Played::start(ServerInfo { bytes_per_second: 50_000, burst: 65_568, ..ServerInfo::default() }).await;
    let like = TestRelay::start().await.region();
    let mut client = client(region(&played, None, like), ClientTls::plain(), 1);
    let mut raw = played.connect(&mut client).await;
    let outbox = client.outbox();
    let taken = outbox.try_send_all((0..400).map(|_| (NodePublic::ZERO, Bytes::from(vec![7; 963]))));
    assert_eq!(taken, 400);
    let mut bytes = 0;
    let count = async {
        loop {
            match raw.frame().await {
                Some(Frame::SendPacket { payload, .. }) => bytes += 37 + payload.len(),
                Some(Frame::Ping(data)) => raw.send(Frame::Pong(data)).await,
                other => panic!("{other:?}"),
            }
        }
    };
    let second = Duration::from_secs(1);
    tokio::select! {
        event = client.next_event() => panic!("{event:?}"),
        never = timeout(second, count) => assert!(never.is_err()),
    }
    // 65,568 at once and 50,000 in the second, and one packet on credit; slower than that only where the machine is.
    assert!((70_000..=117_600).contains(&bytes), "{bytes} bytes in a second");
    assert!(outbox.counters().sent < 120, "{:?}", outbox.counters());
}

#[tokio::test]
async fn only_another_relay_than_the_first_hears_which_one_would_be_better() {
    let played = Played::start(ServerInfo::default()).await;
    let mut region = region(&played, None, TestRelay::start().await.region());
    drop(played.connect(&mut client(region.clone(), ClientTls::plain(), 1)).await);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    region.nodes.insert(0, DerpNode { name: "900gone".into(), derp_port: gone, ..region.nodes[0].clone() });
    region.nodes.insert(0, DerpNode { name: "900stun".into(), stun_only: true, ..region.nodes[0].clone() });
    drop(played.connect(&mut client(region, ClientTls::plain(), 1)).await);
    let heads = played.heads.lock().unwrap();
    assert!(!heads[0].contains("Ideal-Node"), "{}", heads[0]);
    assert!(heads[1].contains("Ideal-Node: 900gone\r\n"), "{}", heads[1]);
}

#[tokio::test]
async fn a_relay_that_falls_silent_within_a_transfer_is_left_after_its_ping() {
    let (played, relay) = (Played::start(ServerInfo::default()).await, TestRelay::start().await);
    let mut options = Options::new(region(&played, Some(&relay), relay.region()), node_key(1), ClientTls::plain());
    options.timing =
        Timing { ping_after: Duration::from_millis(400), pong_within: Duration::from_millis(300), ..Timing::default() };
    let mut client = RelayClient::new(options);
    let _silent = played.connect(&mut client).await;
    client.outbox().try_send(node_key(1).public(), Bytes::from_static(b"lost"));
    let sent = Instant::now();
    let RelayEvent::Disconnected { reason } = event(&mut client).await else { panic!() };
    assert!(reason.starts_with("relay silent for "), "{reason}");
    let silent = sent.elapsed();
    assert!(silent >= Duration::from_millis(700) && silent < Duration::from_secs(2), "{silent:?}");
    // It still accepts TCP, as does a machine whose relay is stuck, and would hold the client up.
    let moved = event(&mut client).await;
    let took = sent.elapsed() - silent;
    eprintln!("relay silent: given up after {silent:?}, on the other one {took:?} later");
    assert!(matches!(&moved, RelayEvent::Connected { node } if node == "900a"), "{moved:?}");
    assert!(took < Duration::from_millis(900), "{took:?}");
}
