//! What a client does when a relay announces something. The relay here is played by hand.

use std::time::Duration;

use bytes::Bytes;
use mesh_derp::driver::client::{RelayClient, RelayEvent};
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
}

impl Played {
    async fn start(info: ServerInfo) -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap(), info }
    }

    fn node(&self, name: &str, like: &DerpNode) -> DerpNode {
        let derp_port = self.listener.local_addr().unwrap().port();
        DerpNode { name: name.into(), derp_port, ..like.clone() }
    }

    /// Lets the next client in.
    async fn accept(&self) -> Raw<TcpStream> {
        let mut raw = Raw::new(self.listener.accept().await.unwrap().0);
        raw.read_head().await;
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
