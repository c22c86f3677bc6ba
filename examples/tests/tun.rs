//! Two of our nodes on TUN devices, with kernel programs on top of them.
//!
//! Run as root: `cargo test -p mesh --test tun -- --ignored --test-threads=1 --nocapture`.
//!
//! ```text
//!   a 198.51.100.2 ────── hub 198.51.100.1, 192.0.2.1 ────── 192.0.2.2 b
//!   mesh0                 forwards; coordinator,                   mesh0
//!                         relay and STUN on 198.51.100.1
//! ```

mod lab;

use std::time::Duration;

use lab::{Host, Lab, Process, eventually};
use serde_json::Value;

const MESH: &str = env!("CARGO_BIN_EXE_mesh");
/// What our programs log; only seen when a test fails.
const LOG: &str = "info,mesh_derp=debug,mesh_node=debug";
const URL: &str = "http://198.51.100.1:8080";

/// The hub with two hosts, each running a node.
struct Net {
    // Dropped first to last: processes before the namespaces they live in.
    a: Node,
    b: Node,
    hub: Host,
    _coordinator: Process,
    _lab: Lab,
}

struct Node {
    _daemon: Process,
    host: Host,
}

impl Net {
    fn new(name: &str) -> Self {
        let mut lab = Lab::new(name);
        let hub = lab.router("hub");
        let (a, b) = (lab.host("a"), lab.host("b"));
        lab.link((&hub, "to-a", "198.51.100.1/24"), (&a, "eth0", "198.51.100.2/24"));
        lab.link((&hub, "to-b", "192.0.2.1/24"), (&b, "eth0", "192.0.2.2/24"));
        a.sh("ip route add default via 198.51.100.1");
        b.sh("ip route add default via 192.0.2.1");
        let mut command = hub.command(MESH);
        command.args(["coordinator", "--listen", "198.51.100.1:8080", "--url", URL, "--stun", "198.51.100.1:3478"]);
        command.arg("--state-dir").arg(hub.dir().join("state")).env("RUST_LOG", LOG);
        let mut coordinator = hub.spawn("coordinator", &mut command);
        coordinator.wait_line("ready", Duration::from_secs(10));
        admin(&hub, "users create alice");
        let [a, b] = [("a", a), ("b", b)].map(|(name, host)| Node::start(&hub, name, host));
        Self { a, b, hub, _coordinator: coordinator, _lab: lab }
    }
}

fn admin(hub: &Host, line: &str) -> Value {
    let text = hub.sh(&format!("{MESH} admin --state-dir {} {line} -o json", hub.dir().join("state").display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line}: {error}: {text}"))
}

impl Node {
    fn start(hub: &Host, name: &str, host: Host) -> Self {
        let answer = admin(hub, "keys create --user alice");
        let key = answer["key"].as_str().expect("a key");
        let mut command = host.command(MESH);
        command.args(["daemon", "--tun", "mesh0", "--state-dir"]).arg(host.dir().join("state"));
        command.arg("--socket").arg(host.dir().join("mesh.sock")).env("RUST_LOG", LOG);
        let mut daemon = host.spawn("daemon", &mut command);
        daemon.wait_line("ready", Duration::from_secs(10));
        let node = Self { _daemon: daemon, host };
        node.mesh(&format!("up --login-server {URL} --auth-key {key} --hostname {name} --timeout 30s"));
        node
    }

    fn mesh(&self, line: &str) -> String {
        self.host.sh(&format!("{MESH} --socket {} {line}", self.host.dir().join("mesh.sock").display()))
    }

    /// Our addresses, IPv4 first.
    fn addresses(&self) -> Vec<String> {
        self.mesh("ip").split_whitespace().map(str::to_owned).collect()
    }

    /// Asks `server` and returns the response code with the addresses, as one line of text.
    fn query(&self, server: &str, transport: &str, name: &str, kind: &str) -> Result<String, String> {
        let output = self.host.command("python3").args(["-c", QUERY, server, transport, name, kind]).output();
        let output = output.expect("python3 runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}

/// A resolver of few words: one question, and the response code and addresses of the answer.
const QUERY: &str = "
import ipaddress, socket, struct, sys
server, transport, name, kind = sys.argv[1:]
labels = b''.join(bytes([len(l)]) + l.encode() for l in name.split('.') if l)
query = struct.pack('>6H', 7, 0x100, 1, 0, 0, 0) + labels + b'\\0' + struct.pack('>2H', {'A': 1, 'AAAA': 28}[kind], 1)
if transport == 'udp':
    s = socket.socket(socket.AF_INET6 if ':' in server else socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(2); s.connect((server, 53)); s.send(query); answer = s.recv(4096)
else:
    s = socket.create_connection((server, 53), 2); s.sendall(struct.pack('>H', len(query)) + query)
    f = s.makefile('rb'); answer = f.read(struct.unpack('>H', f.read(2))[0])
number, flags, _, count, _, _ = struct.unpack('>6H', answer[:12])
assert number == 7 and flags & 0x8000
def skip(at):
    while answer[at] and answer[at] < 192: at += 1 + answer[at]
    return at + (2 if answer[at] else 1)
at, found = skip(12) + 4, []
for _ in range(count):
    at = skip(at)
    _, _, _, length = struct.unpack('>2HIH', answer[at:at + 10])
    found.append(str(ipaddress.ip_address(answer[at + 10:at + 10 + length]))); at += 10 + length
print({0: 'found', 3: 'no such name', 5: 'refused'}[flags & 15], *found)
";

#[test]
#[ignore = "needs root and network namespaces"]
fn a_node_with_a_tun_device_answers_for_the_names_of_its_peers() {
    let net = Net::new("dns");
    let peer = net.b.addresses();
    let ask = |server, transport, name, kind| net.a.query(server, transport, name, kind);
    let full = "b.tailnet.mesh.internal";
    eventually("the peer has a name", Duration::from_secs(15), || match ask("100.100.100.100", "udp", full, "A") {
        Ok(answer) if answer == format!("found {}", peer[0]) => Ok(()),
        other => Err(other),
    });
    for server in ["100.100.100.100", "fd7a:115c:a1e0::53"] {
        for transport in ["udp", "tcp"] {
            let answer = |name, kind| ask(server, transport, name, kind).expect("an answer");
            assert_eq!(answer(full, "A"), format!("found {}", peer[0]), "{server} {transport}");
            assert_eq!(answer(full, "AAAA"), format!("found {}", peer[1]), "{server} {transport}");
            assert_eq!(answer("b", "A"), format!("found {}", peer[0]), "{server} {transport}, bare name");
            assert_eq!(answer("nobody.tailnet.mesh.internal", "A"), "no such name", "{server} {transport}");
            assert_eq!(
                answer("elsewhere.example", "A"),
                "refused",
                "{server} {transport}: there is no resolver to ask"
            );
        }
    }
    // The kernel's own resolver, by the short name that people type.
    let conf = net.a.host.dir().join("resolv.conf");
    std::fs::write(&conf, "nameserver 100.100.100.100\nsearch tailnet.mesh.internal\n").expect("written");
    let found = net.a.host.sh(&format!(
        "mount --bind {} $(readlink -f /etc/resolv.conf) && getent -s dns ahostsv4 b | head -n 1",
        conf.display()
    ));
    assert_eq!(found.split_whitespace().next(), Some(peer[0].as_str()));
    // Names follow the netmap.
    admin(&net.hub, "nodes rename b c");
    eventually("the new name is known", Duration::from_secs(15), || {
        match ask("100.100.100.100", "udp", "c.tailnet.mesh.internal", "A") {
            Ok(answer) if answer == format!("found {}", peer[0]) => Ok(()),
            other => Err(other),
        }
    });
    assert_eq!(ask("100.100.100.100", "udp", full, "A").as_deref(), Ok("no such name"));
}

/// Fetches a file of `size` bytes that `b` serves, and returns how long curl took.
fn download(net: &Net, url: &str, size: u64) -> Duration {
    let line = format!("curl -sS --fail --max-time 120 -o /dev/null -w '%{{size_download}} %{{time_total}}' {url}");
    let said = net.a.host.sh(&line);
    let (got, seconds) = said.split_once(' ').expect("two figures");
    assert_eq!(got, size.to_string());
    Duration::from_secs_f64(seconds.parse().expect("seconds"))
}

#[test]
#[ignore = "needs root; prints figures, asserts nothing about speed"]
fn the_kernels_tcp_by_the_relay() {
    const SIZE: u64 = 50_000_000;
    let net = Net::new("rate");
    for node in [&net.a, &net.b] {
        node.mesh("set --path relay");
    }
    std::fs::write(net.b.host.dir().join("file"), vec![b'.'; 50_000_000]).expect("written");
    let mut command = net.b.host.command("python3");
    let _server = net.b.host.spawn("http", command.args(["-m", "http.server", "8000"]));
    let url = format!("http://{}:8000/file", net.b.addresses()[0]);
    eventually("the file can be had", Duration::from_secs(15), || {
        let outcome = net.a.host.try_sh(&format!("curl -sS --fail -I {url}"));
        if outcome.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&outcome.stderr).into_owned()) }
    });
    let relayed = || admin(&net.hub, "relay")["packets_out"].as_u64().expect("a count");
    let before = relayed();
    let mut took: Vec<Duration> = (0..5).map(|_| download(&net, &url, SIZE)).collect();
    let packets = relayed() - before;
    assert!(packets > 5 * SIZE / 1300, "only {packets} packets went by the relay");
    took.sort();
    let ms: Vec<_> = took.iter().map(Duration::as_millis).collect();
    let rate = SIZE as f64 / 1e6 / took[2].as_secs_f64();
    println!("50 MB by the relay in {ms:?} ms, median {rate:.1} MB/s");
    println!("relay: {}", admin(&net.hub, "relay"));
    for node in [&net.a, &net.b] {
        let status: Value = serde_json::from_str(&node.mesh("status --json")).expect("JSON");
        println!("dropped: {}", status["drops"]);
    }
    println!(
        "{}",
        net.b.host.sh("nstat -az TcpRetransSegs TcpExtTCPTimeouts TcpExtTCPLossProbes TcpExtTCPFastRetrans || true")
    );
}
