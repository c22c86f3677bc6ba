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

use lab::pair::Pair;
use lab::traffic::{download, serve};
use lab::{Host, eventually};

/// Asks `server` for a name and returns the response code with the addresses, as one line of text.
fn query(host: &Host, server: &str, transport: &str, name: &str, kind: &str) -> Result<String, String> {
    let output = host.command("python3").args(["-c", QUERY, server, transport, name, kind]).output();
    let output = output.expect("python3 runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
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
    let net = Pair::new("dns", |_, _, _| {});
    let peer = net.b.addresses();
    let ask = |server, transport, name, kind| query(&net.a.host, server, transport, name, kind);
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
    net.coordinator.admin("nodes rename b c");
    eventually("the new name is known", Duration::from_secs(15), || {
        match ask("100.100.100.100", "udp", "c.tailnet.mesh.internal", "A") {
            Ok(answer) if answer == format!("found {}", peer[0]) => Ok(()),
            other => Err(other),
        }
    });
    assert_eq!(ask("100.100.100.100", "udp", full, "A").as_deref(), Ok("no such name"));
}

#[test]
#[ignore = "needs root; prints figures, asserts nothing about speed"]
fn the_kernels_tcp_by_the_relay() {
    const SIZE: usize = 50_000_000;
    let net = Pair::new("rate", |_, _, _| {});
    for node in [&net.a, &net.b] {
        node.mesh("set --path relay");
    }
    let _server = serve(&net.b.host, "file", &vec![b'.'; SIZE]);
    let to = net.b.ip();
    net.a.wait_path(&to, "relay");
    let before = net.coordinator.relayed_packets();
    let url = format!("http://{to}:8000/file");
    let mut took: Vec<Duration> = (0..5).map(|_| download(&net.a.host, &url, SIZE, 120)).collect();
    let packets = net.coordinator.relayed_packets() - before;
    assert!(packets > 5 * SIZE as u64 / 1300, "only {packets} packets went by the relay");
    took.sort();
    let ms: Vec<_> = took.iter().map(Duration::as_millis).collect();
    let rate = SIZE as f64 / 1e6 / took[2].as_secs_f64();
    println!("50 MB by the relay in {ms:?} ms, median {rate:.1} MB/s");
    println!("relay: {}", net.coordinator.admin("relay"));
    for node in [&net.a, &net.b] {
        println!("dropped: {}", node.status()["drops"]);
    }
    println!(
        "{}",
        net.b.host.sh("nstat -az TcpRetransSegs TcpExtTCPTimeouts TcpExtTCPLossProbes TcpExtTCPFastRetrans || true")
    );
}
