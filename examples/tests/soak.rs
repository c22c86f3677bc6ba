//! A long time under mixed traffic, with a rekey every few seconds and a neighbour that comes and goes.
//!
//! Run as root: `SOAK_SECONDS=1200 cargo test -p mesh --test soak -- --ignored --nocapture`; 20 seconds by default.
//!
//! ```text
//!                  192.168.77.0/24            192.168.78.0/24
//!   steady ────────── veth ────────── hub ────────── veth ────────── flapping
//!   10.9.0.2 ══════ tunnel ══════ 10.9.0.1 ══════ tunnel ══════ 10.9.0.3
//! ```
//!
//! All three run `mesh-wireguard`. Every few seconds the hub removes the flapping peer and adds it again, or the cable to
//! it is pulled. Between the hub and the steady peer nothing may be lost, doubled or out of order meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "the lab runs in real time, and what fails in it fails the test"
)]

mod lab;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{Scope, ScopedJoinHandle, scope, sleep, spawn};
use std::time::{Duration, Instant};

use lab::wireguard::End;
use lab::{Host, Lab};

/// How old a session gets. Initiations keep 5 s apart all the same.
const REKEY_AFTER_MS: &str = "3000";
/// Time between two bursts of a flow.
const TICK: Duration = Duration::from_millis(20);
/// UDP datagrams in a burst: 200 a second and flow.
const BURST: u64 = 4;
/// Bytes of TCP a tick: 6.5 Mbit/s.
const PIECE: usize = 16 << 10;
/// How much the hub's resident memory may grow after a quarter of the time.
const GROWTH_KIB: u64 = 1024;

fn resident_kib(end: &End) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", end.process.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// What the kernel threw away on the way into this tunnel, and at this host's sockets.
fn kernel_drops(end: &End) -> String {
    let path = format!("/sys/class/net/{}/statistics/tx_dropped", end.interface);
    end.host.sh(&format!("echo tun $(cat {path}), $(nstat -az UdpRcvbufErrors | tail -1)"))
}

/// Does something inside a host's namespace; sockets made there stay there.
fn inside<T: Send + 'static>(host: &Host, work: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = File::open(format!("/run/netns/{}", host.ns())).unwrap();
    let thread = spawn(move || {
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind)).unwrap();
        work()
    });
    thread.join().unwrap()
}

fn udp(host: &Host, number: u8) -> UdpSocket {
    let socket = inside(host, move || UdpSocket::bind(SocketAddr::from(([10, 9, 0, number], 0))).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 4 << 20).unwrap();
    socket
}

/// What became of a flow of numbered datagrams.
#[derive(Debug, Default)]
struct Flow {
    sent: u64,
    received: u64,
    /// Numbers that came after a greater one, or again.
    misplaced: u64,
    /// Numbers that were passed over, in order.
    missing: Vec<(u64, u64)>,
}

/// Sends numbered datagrams of many sizes until `stop`, and checks what arrives.
fn flow<'scope>(
    threads: &'scope Scope<'scope, '_>,
    from: (&Host, u8),
    to: (&Host, u8),
    stop: &'scope AtomicBool,
) -> ScopedJoinHandle<'scope, Flow> {
    let (sender, receiver) = (udp(from.0, from.1), udp(to.0, to.1));
    let target = receiver.local_addr().unwrap();
    let sending = threads.spawn(move || {
        let (mut sent, mut packet) = (0, [0x5a; 1300]);
        while !stop.load(Relaxed) {
            for _ in 0..BURST {
                packet[..8].copy_from_slice(&u64::to_be_bytes(sent));
                // Without a way to the other end this may fail, which is a loss like any other.
                let _ = sender.send_to(&packet[..8 + usize::try_from(sent * 37 % 1290).unwrap()], target);
                sent += 1;
            }
            sleep(TICK);
        }
        sent
    });
    threads.spawn(move || {
        let (mut flow, mut packet, mut next) = (Flow::default(), [0; 2048], 0);
        loop {
            match receiver.recv(&mut packet) {
                Ok(len) => {
                    let number = u64::from_be_bytes(*packet.first_chunk().unwrap());
                    assert_eq!(len, 8 + usize::try_from(number * 37 % 1290).unwrap(), "datagram {number}");
                    flow.received += 1;
                    if number < next {
                        flow.misplaced += 1;
                        continue;
                    }
                    if number > next {
                        flow.missing.push((next, number));
                    }
                    next = number + 1;
                }
                // A process that was stopped and continued finds its calls interrupted.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && !stop.load(Relaxed) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        flow.sent = sending.join().unwrap();
        if next < flow.sent {
            flow.missing.push((next, flow.sent));
        }
        flow
    })
}

/// Moves a known pattern over one TCP connection until `stop`; returns how many bytes arrived.
fn stream<'scope>(
    threads: &'scope Scope<'scope, '_>,
    from: &Host,
    to: (&Host, u8),
    stop: &'scope AtomicBool,
) -> ScopedJoinHandle<'scope, u64> {
    let number = to.1;
    let listener = inside(to.0, move || TcpListener::bind(SocketAddr::from(([10, 9, 0, number], 0))).unwrap());
    let target: SocketAddr = listener.local_addr().unwrap();
    let mut sender = inside(from, move || TcpStream::connect_timeout(&target, Duration::from_secs(10)).unwrap());
    let (mut receiver, _) = listener.accept().unwrap();
    let piece: Vec<u8> = (0..PIECE).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let expected = piece.clone();
    threads.spawn(move || {
        while !stop.load(Relaxed) {
            sender.write_all(&piece).unwrap();
            sleep(TICK);
        }
    });
    threads.spawn(move || {
        let (mut total, mut buffer) = (0, vec![0; PIECE]);
        while receiver.read_exact(&mut buffer).is_ok() {
            assert!(buffer == expected, "the stream has changed after {total} bytes");
            total += buffer.len() as u64;
        }
        total
    })
}

/// Tells a host the link-layer address of a neighbour. When it has to ask for one, the kernel keeps up to 120 packets for
/// the answer, and newer ones may overtake them.
fn know(host: &Host, interface: &str, address: &str, neighbour: &Host, its: &str) {
    let link_layer = neighbour.sh(&format!("cat /sys/class/net/{its}/address"));
    let link_layer = link_layer.trim();
    host.sh(&format!("ip neigh replace {address} lladdr {link_layer} nud permanent dev {interface}"));
}

/// Takes the third peer away and brings it back, by turns by configuration and by pulling the cable.
fn flap(hub: &End, flapping: &End, round: u32) {
    if round.is_multiple_of(2) {
        hub.remove_peer(flapping);
        sleep(Duration::from_millis(700));
        hub.add_peer(flapping, "endpoint 192.168.78.2:51820");
    } else {
        hub.host.sh("ip link set eth1 down");
        sleep(Duration::from_millis(1500));
        hub.host.sh("ip link set eth1 up");
        know(&hub.host, "eth1", "192.168.78.2", &flapping.host, "eth0");
    }
}

/// How many pings were sent and answered, from what ping prints at its end.
fn counted(log: &str) -> (u64, u64) {
    let line = log.lines().find(|line| line.contains(" packets transmitted")).unwrap();
    let numbers: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

#[test]
#[ignore = "needs root"]
fn nothing_is_lost_between_steady_peers_while_another_flaps() {
    let duration = Duration::from_secs(std::env::var("SOAK_SECONDS").map_or(20, |text| text.parse().unwrap()));
    let mut lab = Lab::new("soak");
    let [a, b, c] = ["hub", "steady", "flap"].map(|name| lab.host(name));
    lab.link((&a, "eth0", "192.168.77.1/24"), (&b, "eth0", "192.168.77.2/24"));
    lab.link((&a, "eth1", "192.168.78.1/24"), (&c, "eth0", "192.168.78.2/24"));
    know(&a, "eth1", "192.168.78.2", &c, "eth0");
    know(&c, "eth0", "192.168.78.1", &a, "eth1");
    let [hub, steady, flapping] = [(&a, 1), (&b, 2), (&c, 3)]
        .map(|(host, number)| End::ours(host, number, &[("MESH_TEST_REKEY_AFTER_MS", REKEY_AFTER_MS)]));
    hub.add_peer(&steady, "endpoint 192.168.77.2:51820");
    steady.add_peer(&hub, "endpoint 192.168.77.1:51820");
    hub.add_peer(&flapping, "endpoint 192.168.78.2:51820");
    flapping.add_peer(&hub, "endpoint 192.168.78.1:51820");
    for address in ["10.9.0.2", "10.9.0.3"] {
        hub.host.sh(&format!("ping -q -c 2 -i 0.2 -W 10 {address}"));
    }

    let stop = AtomicBool::new(false);
    let seconds = duration.as_secs();
    let (mut handshakes, mut resident, mut flaps) = (BTreeSet::new(), Vec::new(), 0);
    let mut pings = steady.host.spawn("ping", steady.host.command("ping").args(["-n", "-q", "-i", "0.2", "10.9.0.1"]));
    let (flows, stray, streams) = scope(|threads| {
        let flows = [flow(threads, (&a, 1), (&b, 2), &stop), flow(threads, (&b, 2), (&a, 1), &stop)];
        let stray = [flow(threads, (&a, 1), (&c, 3), &stop), flow(threads, (&c, 3), (&a, 1), &stop)];
        let streams = [stream(threads, &a, (&b, 2), &stop), stream(threads, &b, (&a, 1), &stop)];
        let start = Instant::now();
        while start.elapsed() < duration {
            sleep(Duration::from_secs(1));
            handshakes.insert(hub.last_handshake(&steady));
            resident.push(resident_kib(&hub));
            if start.elapsed().as_secs() / 4 > u64::from(flaps) {
                flap(&hub, &flapping, flaps);
                flaps += 1;
            }
        }
        stop.store(true, Relaxed);
        (
            flows.map(|flow| flow.join().unwrap()),
            stray.map(|flow| flow.join().unwrap()),
            streams.map(|s| s.join().unwrap()),
        )
    });
    pings.interrupt();
    let (echoes, answers) = counted(&pings.log());

    let kernel = [&hub, &steady].map(kernel_drops);
    println!("{seconds} s, {flaps} flaps, {} handshakes with the steady peer", handshakes.len());
    println!("{answers} of {echoes} pings answered");
    println!(
        "steady, UDP: {flows:?}\nflapping, UDP: {stray:?}\nsteady, TCP bytes: {streams:?}\nthe kernel dropped {kernel:?}"
    );
    for flow in &flows {
        assert_eq!((flow.received, flow.misplaced), (flow.sent, 0), "{flow:?}; {kernel:?}");
        assert!(flow.sent > seconds * 50, "the machine is too busy for this: {flow:?}");
    }
    for flow in &stray {
        assert_eq!(flow.misplaced, 0, "{flow:?}");
        assert!(flow.received > flow.sent / 4, "a flapping peer is reached between the flaps: {flow:?}");
    }
    assert!(streams.iter().all(|bytes| *bytes > seconds * PIECE as u64), "{streams:?}");
    assert!(
        echoes - answers <= 1,
        "{answers} of {echoes} pings were answered, and only the last may still have been on its way"
    );
    assert!(answers > seconds, "the machine is too busy for this: {answers} pings in {seconds} s");
    assert!(handshakes.len() as u64 >= seconds / 9, "{handshakes:?}");
    // Both ends have come to rest, and each has opened what the other has sealed.
    for (from, to) in [(&hub, &steady), (&steady, &hub)] {
        let (sent, received) = (from.transfer(to).1, to.transfer(from).0);
        assert!(sent.abs_diff(received) < 4096, "{sent} bytes sent, {received} received");
    }
    let (early, last) = (resident[resident.len() / 4], *resident.last().unwrap());
    println!("the hub's resident memory: {early} KiB after a quarter of the time, {last} KiB at the end");
    assert!(last <= early + GROWTH_KIB, "{resident:?}");
}
