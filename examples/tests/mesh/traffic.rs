//! Traffic between nodes: names, proxies, paths.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::http::{fetch_by_socks, fetch_through, serve_page};
use crate::net::{MESH, Net, Running, eventually, free_port};

#[test]
fn two_nodes_reach_each_other_by_name_and_address_through_both_proxies() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    let port = serve_page("hello from bert");
    let address = b.ip();
    let full_name = a.peer("bert")["name"].as_str().expect("a name").to_owned();
    eventually("a page by short name", || fetch_through(a.http, "bert", port));
    assert_eq!(fetch_through(a.http, &full_name, port).as_deref(), Ok("hello from bert"));
    assert_eq!(fetch_through(a.http, &address, port).as_deref(), Ok("hello from bert"));
    assert_eq!(fetch_by_socks(a.socks5, "bert", port).as_deref(), Ok("hello from bert"));
    assert_eq!(fetch_by_socks(a.socks5, &full_name, port).as_deref(), Ok("hello from bert"));
    assert!(fetch_by_socks(a.socks5, "nobody", port).is_err());
    assert!(fetch_through(a.http, "bert", free_port()).is_err(), "nothing listens there");

    let pong: Value =
        serde_json::from_str(a.ok("ping bert --until-direct --timeout 20s --json").lines().last().unwrap()).unwrap();
    assert_eq!(pong["via"], "direct");
    let peer = a.peer("bert");
    assert_eq!(peer["path"]["kind"], "direct");
    assert!(peer["rx_bytes"].as_u64() > Some(0) && peer["tx_bytes"].as_u64() > Some(0), "{peer}");
    assert!(peer["last_handshake"].is_u64(), "{peer}");
    assert!(a.status()["version"].is_u64());
    assert!(a.ok("status").contains("bert"));
}

#[test]
fn the_path_can_be_held_to_the_relay_and_let_go_again() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    let port = serve_page("by relay");
    for node in [&a, &b] {
        node.ok("set --path relay");
    }
    eventually("a page over the relay", || fetch_through(a.http, "bert", port));
    let pong: Value = serde_json::from_str(&a.ok("ping bert --json")).unwrap();
    assert_eq!(pong["via"], "relay");
    let before = a.peer("bert")["direct"]["tx_bytes"].as_u64();
    assert_eq!(fetch_through(a.http, "bert", port).as_deref(), Ok("by relay"));
    assert_eq!(a.peer("bert")["direct"]["tx_bytes"].as_u64(), before, "data left by UDP");
    for node in [&a, &b] {
        node.ok("set --path auto");
    }
    a.ok("ping bert --until-direct --timeout 20s");
}

#[test]
fn everything_works_over_ipv6_alone() {
    let net = Net::started(|net| net.address = SocketAddr::new("::1".parse().unwrap(), free_port()));
    let (a, b) = (net.node("anna"), net.node("bert"));
    assert!(a.socks5.is_ipv6() && a.http.is_ipv6());
    let port = serve_page("six");
    let address = b.ips().into_iter().find(IpAddr::is_ipv6).expect("an IPv6 address");
    eventually("a page by IPv6 address", || fetch_through(a.http, &format!("[{address}]"), port));
    assert_eq!(fetch_by_socks(a.socks5, "bert", port).as_deref(), Ok("six"));
    let pongs = a.pongs(&format!("{address} --until-direct --timeout 20s"));
    assert_eq!(pongs.last().expect("an answer")["via"], "direct");
}

#[test]
fn ping_counts_pads_and_fails_when_nobody_answers() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    let pongs = a.pongs("bert -c 3");
    assert_eq!(pongs.len(), 3);
    for pong in &pongs {
        assert!(pong["ms"].as_f64() > Some(0.0), "{pong}");
        match pong["via"].as_str() {
            Some("direct") => assert!(pong["endpoint"].as_str().is_some_and(|at| at.parse::<SocketAddr>().is_ok())),
            Some("relay") => assert_eq!(pong["region"], 900),
            other => panic!("via {other:?}"),
        }
    }
    assert_eq!(a.pongs("bert --until-direct --timeout 20s").last().expect("an answer")["via"], "direct");
    assert_eq!(a.pongs("bert --size 1300").len(), 1);
    assert!(a.ok("ping bert").contains("bert"));
    assert_eq!(a.ok("ip bert"), b.ok("ip"));

    assert!(a.refusal("ping nobody --timeout 1s").contains("nobody"));
    assert!(a.refusal("ip nobody").contains("nobody"));
    assert!(a.refusal("ping anna").contains("this node itself"));
    assert_eq!(a.ok("ip ANNA"), a.ok("ip"));
    b.running.stop();
    let line = a.refusal("ping bert --timeout 2s");
    assert!(line.contains("bert did not answer within 2s"), "{line}");
    assert!(!a.run("ping bert --until-direct --timeout 1s").status.success());
}

#[tokio::test]
async fn datagrams_from_peers_reach_the_same_port_of_loopback_and_answers_return() {
    let net = Net::start();
    let b = net.node("bert");
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            buffer[..length].reverse();
            server.send_to(&buffer[..length], from).ok();
        }
    });
    let node = mesh_node::Node::builder()
        .control_url(net.url())
        .auth_key(net.key(""))
        .hostname("sender")
        .port_mapping(false)
        .ephemeral()
        .start()
        .await
        .unwrap();
    node.wait_running(Duration::from_secs(30)).await.unwrap();
    let socket = node.netstack().expect("a userspace node").bind_udp(0).unwrap();
    let long = [7; 1200];
    for address in b.ips() {
        for payload in [&b"ping"[..], &long] {
            let mut buffer = [0; 2048];
            let answer = async {
                loop {
                    socket.send_to(payload, SocketAddr::new(address, port)).unwrap();
                    let wait = Duration::from_millis(500);
                    match tokio::time::timeout(wait, socket.recv_from(&mut buffer)).await {
                        Ok(received) => break received.unwrap(),
                        Err(_) => println!("{address}: once more"),
                    }
                }
            };
            let (length, from) = tokio::time::timeout(Duration::from_secs(20), answer).await.expect("an answer");
            assert_eq!(from, SocketAddr::new(address, port));
            assert!(buffer[..length].iter().eq(payload.iter().rev()), "{address}");
        }
    }
    node.shutdown().await;
}

#[test]
#[ignore = "needs faketime (Debian package of that name)"]
fn a_clock_that_is_off_by_a_year_is_named_and_traffic_flows_all_the_same() {
    for (offset, said) in [("+400d", "days behind"), ("-400d", "days ahead")] {
        let mut net = Net::start();
        net.coordinator.take().expect("a coordinator").stop();
        std::fs::remove_dir_all(net.path("coordinator")).unwrap();
        let mut command = Command::new("faketime");
        command.args(["-f", offset, MESH, "coordinator", "--state-dir"]).arg(net.path("coordinator"));
        let listen = net.address.to_string();
        command.args(["--listen", &listen, "--stun", &listen, "--url", &net.url()]);
        net.coordinator = Some(Running::start_command(net.path("late.log"), command));
        net.admin("users create alice");
        let (a, b) = (net.node("anna"), net.node("bert"));
        eventually("the warning", || {
            let health = a.health();
            if health.iter().any(|line| line.contains(said)) { Ok(()) } else { Err(health) }
        });
        for node in [&a, &b] {
            node.ok("set --path relay");
        }
        let port = serve_page("in time");
        eventually("a page", || fetch_through(a.http, "bert", port));
        assert_eq!(a.status()["state"], "running", "the node's key counts as expired");
    }
}
