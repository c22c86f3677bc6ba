//! `mesh-wireguard` in network namespaces, with Debian's `wireguard-go` at the other end and `wg` in between.
//!
//! Run as root: `cargo test -p mesh --test netns -- --ignored --test-threads=1`.
//!
//! ```text
//!   ours 192.168.77.1 ────── veth ────── 192.168.77.2 theirs
//!   10.9.0.1, fd09::1  ═════ tunnel ═════  10.9.0.2, fd09::2
//!   mesh-wireguard                          wireguard-go
//! ```
//!
//! Control sockets live in `/var/run/wireguard`, which all namespaces share: every interface has a name of its own.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "the lab runs in real time, and what fails in it fails the test"
)]

mod lab;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lab::{Host, Lab, Process, eventually, output};

const MESH_WIREGUARD: &str = env!("CARGO_BIN_EXE_mesh-wireguard");

/// How soon our side replaces a session in these tests. Initiations keep 5 s apart all the same.
const REKEY_AFTER_MS: &str = "2000";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Ours,
    WireguardGo,
}

/// One end of the tunnel.
struct End {
    process: Process,
    host: Host,
    interface: String,
    public: String,
    port: u16,
}

impl End {
    fn start(host: &Host, program: Program, interface: String, port: u16) -> Self {
        let (name, mut command) = match program {
            Program::Ours => {
                let mut command = host.command(MESH_WIREGUARD);
                command.args([&interface, "--foreground"]).env("MESH_TEST_REKEY_AFTER_MS", REKEY_AFTER_MS);
                command.env("RUST_LOG", "debug");
                ("mesh-wireguard", command)
            }
            Program::WireguardGo => {
                let mut command = host.command("wireguard-go");
                command.args(["--foreground", &interface]).env("LOG_LEVEL", "verbose");
                ("wireguard-go", command)
            }
        };
        let mut process = host.spawn(name, &mut command);
        if program == Program::Ours {
            process.wait_line("ready", Duration::from_secs(10));
        }
        eventually("the control socket", Duration::from_secs(10), || {
            let shown = host.try_sh(&format!("wg show {interface}"));
            if shown.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&shown.stderr).into_owned()) }
        });
        host.sh("umask 077; wg genkey > private");
        let public = host.sh("wg pubkey < private").trim().to_owned();
        host.sh(&format!("wg set {interface} private-key private listen-port {port}"));
        Self { process, host: host.clone(), interface, public, port }
    }

    fn up(&self, number: u8) {
        let interface = &self.interface;
        self.host.sh(&format!(
            "ip addr add 10.9.0.{number}/24 dev {interface}; ip addr add fd09::{number}/64 dev {interface} nodad
             ip link set {interface} up"
        ));
    }

    /// Adds the other end as a peer, with an endpoint if this end is to be able to initiate.
    fn add_peer(&self, peer: &Self, number: u8, endpoint: bool) {
        let endpoint = if endpoint { format!("endpoint 192.168.77.{number}:{}", peer.port) } else { String::new() };
        self.host.sh(&format!(
            "wg set {} peer {} preshared-key ../psk allowed-ips 10.9.0.{number}/32,fd09::{number}/128 {endpoint}",
            self.interface, peer.public
        ));
    }

    fn remove_peer(&self, peer: &Self) {
        self.host.sh(&format!("wg set {} peer {} remove", self.interface, peer.public));
    }

    /// One column of `wg show` for the only peer.
    fn show(&self, what: &str) -> Vec<String> {
        let line = self.host.sh(&format!("wg show {} {what}", self.interface));
        line.split_whitespace().skip(1).map(str::to_owned).collect()
    }

    /// Bytes received and sent.
    fn transfer(&self) -> (u64, u64) {
        let columns = self.show("transfer");
        (columns[0].parse().unwrap(), columns[1].parse().unwrap())
    }

    fn last_handshake(&self) -> u64 {
        self.show("latest-handshakes")[0].parse().unwrap()
    }
}

impl Drop for End {
    /// Asked to end, not killed: a killed process leaves its control socket behind, which all namespaces share.
    fn drop(&mut self) {
        self.process.terminate();
    }
}

/// Two ends on one cable, configured but without peers.
struct Net {
    ours: End,
    theirs: End,
    _lab: Lab,
}

impl Net {
    fn new(name: &str, programs: [Program; 2]) -> Self {
        let mut lab = Lab::new(name);
        let (a, b) = (lab.host("a"), lab.host("b"));
        lab.link((&a, "eth0", "192.168.77.1/24"), (&b, "eth0", "192.168.77.2/24"));
        a.sh("umask 077; wg genpsk > ../psk");
        let interface = |end: &str| format!("mw{}{end}", std::process::id());
        let ours = End::start(&a, programs[0], interface("a"), 51820);
        let theirs = End::start(&b, programs[1], interface("b"), 51821);
        ours.up(1);
        theirs.up(2);
        Self { ours, theirs, _lab: lab }
    }
}

/// Sends pings and returns how many were answered.
fn ping(host: &Host, to: &str, count: u32, interval: &str) -> u32 {
    let outcome = host.try_sh(&format!("ping -n -q -c {count} -i {interval} -W 2 {to}"));
    let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    let received = text.split(", ").find_map(|part| part.strip_suffix(" received"));
    received.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("ping said:\n{text}"))
}

/// Moves bytes over one TCP stream and returns bits per second as the receiver saw them.
fn tcp(from: &Host, to: &Host, address: &str, how: &str) -> f64 {
    // A log of its own, so that the line waited for is this server's.
    static SERVERS: AtomicUsize = AtomicUsize::new(0);
    let name = format!("iperf3-{}", SERVERS.fetch_add(1, Ordering::Relaxed));
    let mut server = to.spawn(&name, to.command("iperf3").args(["-s", "-1", "--forceflush"]));
    server.wait_line("Server listening", Duration::from_secs(5));
    let report = from.sh(&format!("iperf3 -c {address} -J {how}"));
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap()
}

/// Watches both ends for `duration` while the ping runs, and returns the times of handshakes as `end` tells them.
fn handshakes_during(end: &End, duration: Duration) -> BTreeSet<u64> {
    let deadline = Instant::now() + duration;
    let mut seen = BTreeSet::new();
    while Instant::now() < deadline {
        seen.insert(end.last_handshake());
        std::thread::sleep(Duration::from_millis(200));
    }
    seen.remove(&0);
    seen
}

#[test]
#[ignore = "needs root"]
fn as_initiator_packets_pass_through_two_rekeys_without_a_loss() {
    let Net { ours, theirs, _lab } = &Net::new("init", [Program::Ours, Program::WireguardGo]);
    ours.add_peer(theirs, 2, true);
    theirs.add_peer(ours, 1, false);
    assert_eq!(ping(&ours.host, "10.9.0.2", 3, "0.2"), 3, "the first ping waits for the handshake");

    let pings = std::thread::scope(|scope| {
        let pings = scope.spawn(|| ping(&ours.host, "10.9.0.2", 150, "0.1"));
        let handshakes = handshakes_during(theirs, Duration::from_secs(15));
        assert!(handshakes.len() >= 3, "the first handshake and two rekeys: {handshakes:?}");
        pings.join().unwrap()
    });
    assert_eq!(pings, 150);
    assert_eq!(ping(&theirs.host, "fd09::1", 5, "0.2"), 5, "and IPv6, and the other way");

    let (before, there) = (ours.transfer(), 8 << 20);
    assert!(tcp(&ours.host, &theirs.host, "10.9.0.2", "-n 8M") > 0.0);
    assert!(tcp(&ours.host, &theirs.host, "10.9.0.2", "-n 8M -R") > 0.0);
    let after = ours.transfer();
    // iperf3's receiver does not wait for what still is in the sender's buffer when the test ends.
    assert!(
        after.0 - before.0 > there / 4 * 3 && after.1 - before.1 > there / 4 * 3,
        "counted {before:?}, then {after:?}"
    );
    let (received, sent) = theirs.transfer();
    assert!(received > there / 4 * 3 && sent > there / 4 * 3, "{:?} and {:?}", ours.transfer(), theirs.transfer());
}

#[test]
#[ignore = "needs root"]
fn as_responder_packets_pass_through_two_more_handshakes_of_the_peer() {
    let Net { ours, theirs, _lab } = &Net::new("resp", [Program::Ours, Program::WireguardGo]);
    ours.add_peer(theirs, 2, false);
    let mut handshakes = BTreeSet::new();
    for round in 0..3 {
        // The peer forgets its session, so it has to initiate; ours still has the old one.
        theirs.add_peer(ours, 1, true);
        assert_eq!(ping(&theirs.host, "10.9.0.1", 5, "0.2"), 5, "round {round}");
        assert_eq!(ping(&ours.host, "10.9.0.2", 5, "0.2"), 5, "round {round}, on the session of that round");
        assert!(tcp(&ours.host, &theirs.host, "10.9.0.2", "-n 1M") > 0.0);
        handshakes.insert(ours.last_handshake());
        theirs.remove_peer(ours);
        std::thread::sleep(Duration::from_millis(1100));
    }
    assert_eq!(handshakes.len(), 3, "{handshakes:?}");
}

#[test]
#[ignore = "needs root"]
fn peers_may_change_their_address_on_either_side() {
    let Net { ours, theirs, _lab } = &Net::new("roam", [Program::Ours, Program::WireguardGo]);
    ours.add_peer(theirs, 2, true);
    theirs.add_peer(ours, 1, true);
    assert_eq!(ping(&ours.host, "10.9.0.2", 3, "0.2"), 3);

    theirs.host.sh("ip addr del 192.168.77.2/24 dev eth0; ip addr add 192.168.77.3/24 dev eth0");
    // wireguard-go answers from the address that it was last sent to; a new port makes it forget that one.
    theirs.host.sh(&format!("wg set {} listen-port 51822", theirs.interface));
    eventually("the peer is heard again", Duration::from_secs(10), || match ping(&theirs.host, "10.9.0.1", 1, "0.2") {
        1 => Ok(()),
        lost => Err(lost),
    });
    assert_eq!(ours.show("endpoints"), ["192.168.77.3:51822"]);
    assert_eq!(ping(&ours.host, "10.9.0.2", 5, "0.2"), 5, "ours follows");

    ours.host.sh("ip addr del 192.168.77.1/24 dev eth0; ip addr add 192.168.77.4/24 dev eth0");
    assert_eq!(ping(&ours.host, "10.9.0.2", 5, "0.2"), 5, "the peer follows ours");
    assert_eq!(theirs.show("endpoints"), ["192.168.77.4:51820"]);
}

#[test]
#[ignore = "needs root"]
fn a_full_device_queue_slows_a_local_sender_and_loses_nothing() {
    let Net { ours, theirs, _lab } = &Net::new("queue", [Program::Ours, Program::Ours]);
    ours.add_peer(theirs, 2, true);
    theirs.add_peer(ours, 1, false);
    ours.host.sh(&format!("ip link set {} txqueuelen 4", ours.interface));
    let resent = || -> u64 {
        let counters = ours.host.sh("cat /proc/net/snmp");
        let rows: Vec<Vec<&str>> =
            counters.lines().filter(|line| line.starts_with("Tcp:")).map(|line| line.split(' ').collect()).collect();
        let column = rows[0].iter().position(|name| *name == "RetransSegs").unwrap();
        rows[1][column].parse().unwrap()
    };
    assert_eq!(ping(&ours.host, "10.9.0.2", 3, "0.2"), 3);
    let before = resent();
    let rate = tcp(&ours.host, &theirs.host, "10.9.0.2", "-t 3");
    // Behind a queueing discipline, four packets of room cost tens of thousands of segments in the same time.
    let lost = resent() - before;
    assert!(lost < 1000, "{lost} segments sent again at {rate:.0} Mbit/s");
}

#[test]
#[ignore = "needs root"]
fn wg_quick_brings_an_interface_up_and_down() {
    if Path::new("/sys/module/wireguard").exists() {
        println!("SKIPPED: this kernel has WireGuard, so wg-quick would not start a userspace implementation");
        return;
    }
    let Net { ours, theirs, _lab } = &Net::new("quick", [Program::Ours, Program::WireguardGo]);
    let interface = format!("mw{}q", std::process::id());
    // A second interface beside ours, on another port and with a key of its own, made by wg-quick.
    ours.host.sh(&format!(
        "umask 077; wg genkey > quick; cat > {interface}.conf <<X
[Interface]
PrivateKey = $(cat quick)
ListenPort = 51899
Address = 10.9.1.1/24
MTU = 1380

[Peer]
PublicKey = {}
PresharedKey = $(cat ../psk)
Endpoint = 192.168.77.2:51821
AllowedIPs = 10.9.0.2/32
X",
        theirs.public
    ));
    let key = ours.host.sh("wg pubkey < quick");
    theirs.host.sh(&format!(
        "wg set {0} peer {1} preshared-key ../psk allowed-ips 10.9.1.1/32; ip route add 10.9.1.1 dev {0}",
        theirs.interface,
        key.trim()
    ));
    let quick = |verb: &str| {
        let mut command = ours.host.command("wg-quick");
        command.args([verb, &format!("./{interface}.conf")]);
        output(command.env("WG_QUICK_USERSPACE_IMPLEMENTATION", MESH_WIREGUARD));
    };
    quick("up");
    assert_eq!(ours.host.sh(&format!("cat /sys/class/net/{interface}/mtu")).trim(), "1380");
    assert_eq!(ping(&ours.host, "-I 10.9.1.1 10.9.0.2", 3, "0.2"), 3);
    let second = ours.host.try_sh(&format!("{MESH_WIREGUARD} {interface}"));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("in use") && said.lines().count() == 1, "{said}");
    quick("down");
    let socket = format!("/var/run/wireguard/{interface}.sock");
    eventually("the process has gone", Duration::from_secs(5), || match Path::new(&socket).exists() {
        true => Err("its control socket is still there"),
        false => Ok(()),
    });
}

#[test]
#[ignore = "needs root; a first figure, asserts nothing about speed"]
fn one_tcp_stream_beside_wireguard_go() {
    let rounds = 3;
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for (rates, program) in rates.iter_mut().zip([Program::Ours, Program::WireguardGo]) {
            let name = format!("perf{}{round}", u8::from(program == Program::Ours));
            let Net { ours, theirs, _lab } = &Net::new(&name, [program, program]);
            ours.add_peer(theirs, 2, true);
            theirs.add_peer(ours, 1, true);
            assert_eq!(ping(&ours.host, "10.9.0.2", 2, "0.2"), 2);
            rates.push(tcp(&ours.host, &theirs.host, "10.9.0.2", "-t 4") / 1e6);
        }
    }
    let build = if cfg!(debug_assertions) { "a debug build, so no measure of anything" } else { "a release build" };
    let cpus = output(&mut Command::new("nproc"));
    println!("one TCP stream, Mbit/s, {rounds} rounds each, {} cores, mesh-wireguard as {build}:", cpus.trim());
    for (rates, name) in rates.iter_mut().zip(["mesh-wireguard", "wireguard-go"]) {
        rates.sort_by(f64::total_cmp);
        println!("{name:16} median {:7.0}  min {:7.0}  max {:7.0}", rates[rounds / 2], rates[0], rates[rounds - 1]);
    }
}
