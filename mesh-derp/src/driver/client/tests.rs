use super::moving::LINGER;
use super::*;
use crate::driver::listener::Acceptor;
use crate::driver::server::{Config, RelayServer};
use crate::map::{DerpNode, RegionId};
use mesh_noise::key::RelayPrivate;

async fn relay(port: u16) -> (Arc<RelayServer>, u16) {
    let server = RelayServer::new(RelayPrivate::generate(&mut SystemRng), Config::default());
    let mut acceptor = Acceptor::bind(&[([127, 0, 0, 1], port).into()], None).await.unwrap();
    let (serving, port) = (Arc::clone(&server), acceptor.local_addrs().unwrap()[0].port());
    tokio::spawn(async move {
        loop {
            let incoming = acceptor.next().await;
            tokio::spawn(Arc::clone(&serving).serve(incoming));
        }
    });
    (server, port)
}

async fn connected(client: &mut RelayClient) -> String {
    let event = tokio::time::timeout(Duration::from_secs(10), client.next_event()).await.unwrap();
    let RelayEvent::Connected { node } = event else { panic!("{event:?}") };
    node
}

#[tokio::test]
async fn the_regions_first_relay_is_returned_to_without_a_gap_once_it_is_there() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (second, port) = relay(0).await;
    let id = RegionId::new(900).unwrap();
    let mut region = DerpRegion::new(id, "t", "T");
    for (name, derp_port) in [("a", free), ("b", port)] {
        let node = DerpNode { ipv4: "127.0.0.1".into(), derp_port, ..DerpNode::new(name, id, "localhost") };
        region.nodes.push(node);
    }
    let key = NodePrivate::generate(&mut SystemRng);
    let own = key.public();
    let mut client = RelayClient::new(Options { home: true, ..Options::new(region, key, ClientTls::plain()) });
    assert_eq!(connected(&mut client).await, "b");
    let wait = client.return_at.unwrap() - now();
    assert!((14..46).contains(&wait.as_secs()), "{wait:?}");
    // It is still gone: nothing happens, but for a longer wait.
    client.return_at = Some(now());
    let nothing = tokio::time::timeout(Duration::from_millis(300), client.next_event()).await;
    assert!(nothing.is_err() && client.return_at.unwrap() - now() > Duration::from_secs(29), "{nothing:?}");
    let (first, _) = relay(free).await;
    client.return_at = Some(now());
    assert_eq!(connected(&mut client).await, "a");
    assert!(client.return_at.is_none() && client.former.is_some() && client.is_connected());
    client.outbox().try_send(own, Bytes::from_static(b"here"));
    let event = client.next_event().await;
    assert!(matches!(&event, RelayEvent::Packet { payload, .. } if payload == "here"), "{event:?}");
    assert_eq!((first.counters().packets_in, second.counters().packets_in), (1, 0));
    let _ = tokio::time::timeout(LINGER * 2, client.next_event()).await;
    assert_eq!((first.counters().homes, second.counters().connections), (1, 0));
}

#[test]
fn waiting_grows_with_the_square_of_failures_up_to_five_seconds() {
    let millis: Vec<u128> = [0, 1, 2, 10, 22, 23, 1_000_000].map(|n| backoff(n).as_millis()).to_vec();
    assert_eq!(millis, [0, 10, 40, 1000, 4840, 5000, 5000]);
}

#[test]
fn a_client_can_be_made_before_there_is_a_runtime() {
    let region = DerpRegion::new(RegionId::new(900).unwrap(), "t", "T");
    let key = NodePrivate::generate(&mut SystemRng);
    let mut client = RelayClient::new(Options::new(region, key, ClientTls::plain()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let event = runtime.block_on(client.next_event());
    assert!(matches!(&event, RelayEvent::Disconnected { reason } if reason == "region has no relay"), "{event:?}");
}
