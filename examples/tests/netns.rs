//! `mesh-wireguard` in network namespaces, with Debian's `wireguard-go` at the other end and `wg` in between.
//!
//! Run as root: `cargo test -p mesh --test netns -- --ignored --test-threads=1`.
//!
//! ```text
//!   ours 192.168.77.1 ────── veth ────── 192.168.77.2 theirs
//!   10.9.0.1, fd09::1  ═════ tunnel ═════  10.9.0.2, fd09::2
//!   mesh-wireguard                          wireguard-go
//! ```

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
use std::time::{Duration, Instant};

use lab::traffic::{iperf3, ping};
use lab::wireguard::{End, MESH_WIREGUARD};
use lab::{Host, Lab, eventually, output};

/// How soon our side replaces a session in these tests. Initiations keep 5 s apart all the same.
const REKEY_AFTER_MS: &str = "2000";

/// What [`End::add_peer`] is told: the key that both share, and where to initiate to, if anywhere.
const KEY: &str = "preshared-key ../psk";
const KEY_AND_OURS: &str = "preshared-key ../psk endpoint 192.168.77.1:51820";
const KEY_AND_THEIRS: &str = "preshared-key ../psk endpoint 192.168.77.2:51820";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Ours,
    WireguardGo,
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
        let start = |host: &Host, number, program| match program {
            Program::Ours => {
                End::ours(host, number, &[("MESH_TEST_REKEY_AFTER_MS", REKEY_AFTER_MS), ("RUST_LOG", "debug")])
            }
            Program::WireguardGo => End::wireguard_go(host, number),
        };
        let (ours, theirs) = (start(&a, 1, programs[0]), start(&b, 2, programs[1]));
        Self { ours, theirs, _lab: lab }
    }
}

/// Moves bytes over one TCP stream and returns bits per second as the receiver saw them.
fn tcp(from: &Host, to: &Host, address: &str, how: &str) -> f64 {
    iperf3(from, to, address, how)["sum_received"]["bits_per_second"].as_f64().unwrap()
}

/// Watches both ends for `duration` while the ping runs, and returns the times of handshakes as `end` tells them.
fn handshakes_during(end: &End, peer: &End, duration: Duration) -> BTreeSet<u64> {
    let deadline = Instant::now() + duration;
    let mut seen = BTreeSet::new();
    while Instant::now() < deadline {
        seen.insert(end.last_handshake(peer));
        std::thread::sleep(Duration::from_millis(200));
    }
    seen.remove(&0);
    seen
}

#[test]
#[ignore = "needs root"]
fn as_initiator_packets_pass_through_two_rekeys_without_a_loss() {
    let Net { ours, theirs, _lab } = &Net::new("init", [Program::Ours, Program::WireguardGo]);
    ours.add_peer(theirs, KEY_AND_THEIRS);
    theirs.add_peer(ours, KEY);
    assert_eq!(ping(&ours.host, "10.9.0.2", 3, "0.2"), 3, "the first ping waits for the handshake");

    let pings = std::thread::scope(|scope| {
        let pings = scope.spawn(|| ping(&ours.host, "10.9.0.2", 150, "0.1"));
        let handshakes = handshakes_during(theirs, ours, Duration::from_secs(15));
        assert!(handshakes.len() >= 3, "the first handshake and two rekeys: {handshakes:?}");
        pings.join().unwrap()
    });
    assert_eq!(pings, 150);
    assert_eq!(ping(&theirs.host, "fd09::1", 5, "0.2"), 5, "and IPv6, and the other way");

    let (before, there) = (ours.transfer(theirs), 8 << 20);
    assert!(tcp(&ours.host, &theirs.host, "10.9.0.2", "-n 8M") > 0.0);
    assert!(tcp(&ours.host, &theirs.host, "10.9.0.2", "-n 8M -R") > 0.0);
    let after = ours.transfer(theirs);
    // iperf3's receiver does not wait for what still is in the sender's buffer when the test ends.
    assert!(
        after.0 - before.0 > there / 4 * 3 && after.1 - before.1 > there / 4 * 3,
        "counted {before:?}, then {after:?}"
    );
    let (received, sent) = theirs.transfer(ours);
    assert!(
        received > there / 4 * 3 && sent > there / 4 * 3,
        "{:?} and {:?}",
        ours.transfer(theirs),
        theirs.transfer(ours)
    );
}

#[test]
#[ignore = "needs root"]
fn as_responder_packets_pass_through_two_more_handshakes_of_the_peer() {
    let Net { ours, theirs, _lab } = &Net::new("resp", [Program::Ours, Program::WireguardGo]);
    ours.add_peer(theirs, KEY);
    let mut handshakes = BTreeSet::new();
    for round in 0..3 {
        // The peer forgets its session, so it has to initiate; ours still has the old one.
        theirs.add_peer(ours, KEY_AND_OURS);
        assert_eq!(ping(&theirs.host, "10.9.0.1", 5, "0.2"), 5, "round {round}");
        assert_eq!(ping(&ours.host, "10.9.0.2", 5, "0.2"), 5, "round {round}, on the session of that round");
        assert!(tcp(&ours.host, &theirs.host, "10.9.0.2", "-n 1M") > 0.0);
        handshakes.insert(ours.last_handshake(theirs));
        theirs.remove_peer(ours);
        std::thread::sleep(Duration::from_millis(1100));
    }
    assert_eq!(handshakes.len(), 3, "{handshakes:?}");
}

#[test]
#[ignore = "needs root"]
fn peers_may_change_their_address_on_either_side() {
    let Net { ours, theirs, _lab } = &Net::new("roam", [Program::Ours, Program::WireguardGo]);
    ours.add_peer(theirs, KEY_AND_THEIRS);
    theirs.add_peer(ours, KEY_AND_OURS);
    assert_eq!(ping(&ours.host, "10.9.0.2", 3, "0.2"), 3);

    theirs.host.sh("ip addr del 192.168.77.2/24 dev eth0; ip addr add 192.168.77.3/24 dev eth0");
    // wireguard-go answers from the address that it was last sent to; a new port makes it forget that one.
    theirs.host.sh(&format!("wg set {} listen-port 51822", theirs.interface));
    eventually("the peer is heard again", Duration::from_secs(10), || match ping(&theirs.host, "10.9.0.1", 1, "0.2") {
        1 => Ok(()),
        lost => Err(lost),
    });
    assert_eq!(ours.show(theirs, "endpoints"), ["192.168.77.3:51822"]);
    assert_eq!(ping(&ours.host, "10.9.0.2", 5, "0.2"), 5, "ours follows");

    ours.host.sh("ip addr del 192.168.77.1/24 dev eth0; ip addr add 192.168.77.4/24 dev eth0");
    assert_eq!(ping(&ours.host, "10.9.0.2", 5, "0.2"), 5, "the peer follows ours");
    assert_eq!(theirs.show(ours, "endpoints"), ["192.168.77.4:51820"]);
}

#[test]
#[ignore = "needs root"]
fn a_full_device_queue_slows_a_local_sender_and_loses_nothing() {
    let Net { ours, theirs, _lab } = &Net::new("queue", [Program::Ours, Program::Ours]);
    ours.add_peer(theirs, KEY_AND_THEIRS);
    theirs.add_peer(ours, KEY);
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
Endpoint = 192.168.77.2:51820
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
            ours.add_peer(theirs, KEY_AND_THEIRS);
            theirs.add_peer(ours, KEY_AND_OURS);
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
