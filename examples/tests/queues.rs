//! `mesh-wireguard` with several queues, sockets and workers: everything arrives, and no flow is put out of order.
//!
//! Run as root: `cargo test -p mesh --test queues -- --ignored --test-threads=1`.
//!
//! ```text
//!   a 192.168.77.1 ────── veth ────── 192.168.77.2 b
//!     10.9.0.1    ═════ tunnel ═════  10.9.0.2        each: 2 TUN queues, 2 sockets on one port
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "the lab runs in real time, and what fails in it fails the test"
)]

mod lab;

use std::time::Duration;

use lab::traffic::{iperf3, ping};
use lab::wireguard::End;
use lab::{Host, Lab, eventually};

/// Datagrams of eight flows, numbered: `send ADDRESS SECONDS` and `receive ADDRESS SECONDS`. The receiver says how many
/// came, and how many of them after a later one of their flow.
const DATAGRAMS: &str = r"
import socket, struct, sys, time
role, address, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(8)]
if role == 'send':
    end, number = time.monotonic() + seconds, 0
    for i, s in enumerate(sockets): s.connect((address, 7000 + i))
    while time.monotonic() < end:
        for s in sockets:
            for k in range(16): s.send(struct.pack('>I', number + k) + bytes(300))
        number += 16
        time.sleep(0.002)
else:
    import selectors
    selector, latest, came, late = selectors.DefaultSelector(), {}, 0, 0
    for i, s in enumerate(sockets):
        s.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
        s.bind((address, 7000 + i)); s.setblocking(False); selector.register(s, selectors.EVENT_READ, i)
    print('listening', flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for key, _ in selector.select(0.1):
            try:
                while True:
                    number, = struct.unpack('>I', key.fileobj.recv(2000)[:4])
                    came += 1
                    if number < latest.get(key.data, -1): late += 1
                    else: latest[key.data] = number
            except BlockingIOError: pass
    print('came', came, 'late', late, flush=True)
    time.sleep(1)
";

fn two_queues_and_two_sockets(name: &str, workers: Option<&str>) {
    let mut lab = Lab::new(name);
    let hosts = [lab.host("a"), lab.host("b")];
    lab.link((&hosts[0], "eth0", "192.168.77.1/24"), (&hosts[1], "eth0", "192.168.77.2/24"));
    let environment: Vec<_> = [("MESH_TEST_QUEUES", "2"), ("RUST_LOG", "info")]
        .into_iter()
        .chain(workers.map(|n| ("MESH_TEST_WORKERS", n)))
        .collect();
    let [a, b] = [(&hosts[0], 1), (&hosts[1], 2)].map(|(host, number)| End::ours(host, number, &environment));
    a.add_peer(&b, "endpoint 192.168.77.2:51820");
    b.add_peer(&a, "endpoint 192.168.77.1:51820");
    for host in &hosts {
        // The cable has one processor for each direction, so that it keeps the order itself.
        host.sh("echo 1 > /sys/class/net/eth0/queues/rx-0/rps_cpus");
    }
    for end in [&a, &b] {
        let queues = end.host.sh(&format!("ls -d /sys/class/net/{}/queues/tx-*", end.interface));
        assert_eq!(queues.lines().count(), 2, "{queues}");
        let sockets = end.host.sh("ss -Hlun4 'sport = :51820'");
        assert_eq!(sockets.lines().count(), 2, "{sockets}");
    }
    eventually("an answer through the tunnel", Duration::from_secs(15), || match ping(&a.host, "10.9.0.2", 1, "0.2") {
        1 => Ok(()),
        lost => Err(lost),
    });

    // Numbered datagrams both ways, beside four TCP streams.
    let datagrams = |host: &Host, name: &str, role: &str, address: &str, seconds: &str| {
        host.spawn(name, host.command("python3").args(["-c", DATAGRAMS, role, address, seconds]))
    };
    let mut receivers = [
        datagrams(&a.host, "receive", "receive", "10.9.0.1", "14"),
        datagrams(&b.host, "receive", "receive", "10.9.0.2", "14"),
    ];
    receivers.iter_mut().for_each(|receiver| receiver.wait_line("listening", Duration::from_secs(10)));
    let _senders =
        [datagrams(&a.host, "send", "send", "10.9.0.2", "8"), datagrams(&b.host, "send", "send", "10.9.0.1", "8")];
    let report = iperf3(&a.host, &b.host, "10.9.0.2", "-P 4 -t 5");
    let moved = report["sum_received"]["bytes"].as_u64().unwrap();
    let retransmits = report["sum_sent"]["retransmits"].as_u64().unwrap();
    println!("{name}: four TCP streams moved {} MB with {retransmits} retransmissions", moved / 1_000_000);
    assert!(moved > 1_000_000);
    for (receiver, to) in receivers.iter_mut().zip(["a", "b"]) {
        receiver.wait_line("came", Duration::from_secs(30));
        let log = receiver.log();
        let said = log.lines().find(|line| line.starts_with("came")).unwrap();
        println!("{name}: to {to}, {said}");
        let numbers: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        assert!(numbers[0] > 1_000 && numbers[1] == 0, "{said}");
    }
    assert_eq!(ping(&a.host, "10.9.0.2", 50, "0.02"), 50);
}

#[test]
#[ignore = "needs root"]
fn two_queues_and_two_sockets_keep_the_order_of_every_flow() {
    two_queues_and_two_sockets("queues", None);
}

#[test]
#[ignore = "needs root"]
fn workers_keep_the_order_of_every_flow() {
    two_queues_and_two_sockets("workers", Some("2"));
}
