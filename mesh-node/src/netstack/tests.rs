//! Two stacks, back to back.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const A4: &str = "100.64.0.1";
const B4: &str = "100.64.0.2";
const A6: &str = "fd7a:115c:a1e0::1";
const B6: &str = "fd7a:115c:a1e0::2";

/// Two stacks on one cable that drops every `nth` packet of each direction; 0 drops none.
fn pair_with(nth: usize, configure: impl Fn(&mut Config)) -> (Netstack, Netstack) {
    let start = |v4: &str, v6: &str| {
        let mut config = Config::with_addresses([v4.parse().unwrap(), v6.parse().unwrap()]);
        configure(&mut config);
        Netstack::start(config).unwrap()
    };
    let ((a, a_device), (b, b_device)) = (start(A4, A6), start(B4, B6));
    pump(a_device.clone(), b_device.clone(), nth);
    pump(b_device, a_device, nth);
    (a, b)
}

fn pair() -> (Netstack, Netstack) {
    pair_with(0, |_| {})
}

fn pump(from: StackDevice, to: StackDevice, nth: usize) {
    std::thread::spawn(move || {
        let mut count = 0;
        let mut batch = Batch::new(128, 1280);
        while from.read_batch(&mut batch, Duration::from_secs(5)).is_ok() {
            for index in 0..batch.len() {
                count += 1;
                if nth != 0 && usize::is_multiple_of(count, nth) {
                    batch.discard(index);
                }
            }
            if to.write_batch(&mut batch).is_err() {
                return;
            }
            batch.clear();
        }
    });
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Bytes that do not repeat at any power of two.
fn pattern(len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + i / 251 + salt) % 251).to_le_bytes()[0]).collect()
}

#[expect(clippy::disallowed_methods, reason = "the tests' clock")]
fn clock() -> Instant {
    Instant::now()
}

/// Sends `len` bytes each way at once, checks every one, and says how long it took.
async fn exchange(a: &Netstack, b: &Netstack, to: SocketAddr, len: usize) -> Duration {
    let listener = b.listen_tcp(to.port()).unwrap();
    let (forth, back): (Arc<[u8]>, Arc<[u8]>) = (pattern(len, 1).into(), pattern(len, 2).into());
    let started = clock();
    let one_side = move |stream: TcpStream, sends: Arc<[u8]>, expects: Arc<[u8]>| async move {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let writing = tokio::spawn(async move {
            writer.write_all(&sends).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let mut received = Vec::with_capacity(expects.len());
        reader.read_to_end(&mut received).await.unwrap();
        writing.await.unwrap();
        assert_eq!(received.len(), expects.len());
        assert!(received == *expects, "bytes changed on the way");
    };
    let (theirs, ours) = (Arc::clone(&back), Arc::clone(&forth));
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        one_side(stream, theirs, ours).await;
    });
    one_side(a.dial_tcp(to).await.unwrap(), forth, back).await;
    server.await.unwrap();
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_megabytes_cross_both_ways_unchanged() {
    let (a, b) = pair();
    let len = 20 << 20;
    let took = exchange(&a, &b, at(B4, 80), len).await;
    println!("2 x 20 MiB over IPv4 in {took:?}: {:.2} Gbit/s", (2 * len * 8) as f64 / took.as_secs_f64() / 1e9);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv6_carries_data_too() {
    let (a, b) = pair();
    let took = exchange(&a, &b, at(B6, 80), 4 << 20).await;
    println!("2 x 4 MiB over IPv6 in {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fiftieth_packet_lost_delays_but_changes_nothing() {
    let (a, b) = pair_with(50, |_| {});
    let took = exchange(&a, &b, at(B4, 80), 1 << 20).await;
    println!("2 x 1 MiB with 2 % loss in {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_closed_stream_still_reads() {
    let (a, b) = pair();
    let listener = b.listen_tcp(at(B4, 7)).unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, from) = listener.accept().await.unwrap();
        let mut question = Vec::new();
        stream.read_to_end(&mut question).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.write_all(b"answer to ").await.unwrap();
        stream.write_all(&question).await.unwrap();
        from
    });
    let mut stream = a.dial_tcp(at(B4, 7)).await.unwrap();
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(stream.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"answer to question");
    assert_eq!(server.await.unwrap(), stream.local_addr());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_without_listener_refuses_at_once() {
    let (a, _b) = pair();
    let error = a.dial_tcp(at(B4, 81)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    let error = a.dial_tcp(at(B6, 81)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_peer_times_a_dial_out() {
    let (a, _b) = pair_with(1, |config| config.connect_timeout = Duration::from_millis(100));
    assert_eq!(a.dial_tcp(at(B4, 80)).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(a.counters().connections, 0, "the attempt leaves nothing behind");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_is_an_error_and_not_an_end() {
    let (a, b) = pair();
    let listener = b.listen_tcp(80).unwrap();
    let mut stream = a.dial_tcp(at(B4, 80)).await.unwrap();
    let (theirs, _) = listener.accept().await.unwrap();
    theirs.reset();
    let error = stream.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(stream.write(b"x").await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_that_nobody_will_read_is_answered_with_a_reset() {
    let (a, b) = pair();
    let listener = b.listen_tcp(80).unwrap();
    let mut stream = a.dial_tcp(at(B4, 80)).await.unwrap();
    drop(listener.accept().await.unwrap());
    let mut error = None;
    for _ in 0..100 {
        if let Err(e) = stream.write_all(b"nobody listens").await {
            error = Some(e.kind());
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(error, Some(io::ErrorKind::ConnectionReset));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_short_connections_leave_little_behind() {
    let (a, b) = pair();
    let listener = b.listen_tcp(80).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut line = [0; 5];
                stream.read_exact(&mut line).await.unwrap();
                stream.write_all(&line).await.unwrap();
            });
        }
    });
    let started = clock();
    for round in 0..20 {
        let dials = (0..25).map(|_| {
            let a = a.clone();
            tokio::spawn(async move {
                let mut stream = a.dial_tcp(at(B4, 80)).await.unwrap();
                stream.write_all(b"hello").await.unwrap();
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).await.unwrap();
                assert_eq!(answer, b"hello", "round {round}");
            })
        });
        for dial in dials.collect::<Vec<_>>() {
            dial.await.unwrap();
        }
    }
    println!("500 connections, 25 at a time, in {:?}", started.elapsed());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(a.counters().connections <= 32 && b.counters().connections <= 32, "{:?} {:?}", a.counters(), b.counters());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_bound_fail_to_dial() {
    let (a, b) = pair_with(0, |config| config.max_connections = 2);
    let _listener = b.listen_tcp(80).unwrap();
    let _one = a.dial_tcp(at(B4, 80)).await.unwrap();
    let _two = a.dial_tcp(at(B4, 80)).await.unwrap();
    assert_eq!(a.dial_tcp(at(B4, 80)).await.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn udp_goes_both_ways_on_both_families() {
    let (a, b) = pair();
    for (ours, theirs) in [(A4, B4), (A6, B6)] {
        let server = b.bind_udp(at(theirs, 53)).unwrap();
        let client = a.bind_udp(0).unwrap();
        client.send_to(b"ping", at(theirs, 53)).unwrap();
        let mut buffer = [0; 100];
        let (len, from) = server.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..len], from), (b"ping".as_slice(), at(ours, client.bind().port)));
        server.send_to(b"pong", from).unwrap();
        let (len, from) = client.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..len], from), (b"pong".as_slice(), at(theirs, 53)));
        assert_eq!(client.send_to(&[0; 1300], from).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_is_bound_once_and_free_again_after() {
    let (a, _b) = pair();
    let first = a.listen_tcp(80).unwrap();
    assert_eq!(a.listen_tcp(80).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    drop(first);
    a.listen_tcp(80).unwrap();
    let first = a.bind_udp(80).unwrap();
    assert_eq!(a.bind_udp(80).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    drop(first);
    a.bind_udp(80).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stack_reaches_its_own_address() {
    let (a, _b) = pair();
    let listener = a.listen_tcp(80).unwrap();
    let mut stream = a.dial_tcp(at(A4, 80)).await.unwrap();
    let (mut theirs, _) = listener.accept().await.unwrap();
    stream.write_all(b"self").await.unwrap();
    let mut read = [0; 4];
    theirs.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"self");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_an_address_ends_its_connections() {
    let (a, b) = pair();
    let _listener = b.listen_tcp(80).unwrap();
    let mut stream = a.dial_tcp(at(B4, 80)).await.unwrap();
    a.set_addresses(&[A6.parse().unwrap()]);
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(a.dial_tcp(at(B4, 80)).await.unwrap_err().kind(), io::ErrorKind::NetworkUnreachable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_wakes_everybody() {
    let (a, b) = pair();
    let listener = b.listen_tcp(80).unwrap();
    let mut stream = a.dial_tcp(at(B4, 80)).await.unwrap();
    let (mut theirs, _) = listener.accept().await.unwrap();
    let socket = a.bind_udp(9).unwrap();
    let accepting = a.listen_tcp(9).unwrap();
    let waiting = tokio::spawn(async move {
        assert!(stream.read(&mut [0; 8]).await.is_err());
        assert!(socket.recv().await.is_err());
        assert!(accepting.accept().await.is_err());
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    a.close();
    a.closed().await;
    waiting.await.unwrap();
    assert_eq!(theirs.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert!(a.dial_tcp(at(B4, 80)).await.is_err());
}

/// A stack and the bare other end of its cable.
fn single(configure: impl Fn(&mut Config)) -> (Netstack, StackDevice) {
    let mut config = Config::with_addresses([A4.parse().unwrap(), A6.parse().unwrap(), IpAddr::V4(SERVICE_V4)]);
    configure(&mut config);
    Netstack::start(config).unwrap()
}

fn next_packet(device: &StackDevice) -> Vec<u8> {
    let mut packet = None;
    device.recv(1, Duration::from_secs(5), |p| packet = Some(p));
    packet.expect("a packet within five seconds")
}

#[test]
fn echo_requests_are_answered() {
    use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, IpRepr, Ipv4Packet};
    let (_stack, device) = single(|_| {});
    let icmp = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 3, data: b"payload" };
    let (source, destination): (IpAddress, IpAddress) = (B4.parse().unwrap(), A4.parse().unwrap());
    let ip = IpRepr::new(source, destination, IpProtocol::Icmp, icmp.buffer_len(), 64);
    let mut packet = vec![0; ip.header_len() + icmp.buffer_len()];
    let checksums = smoltcp::phy::ChecksumCapabilities::default();
    ip.emit(&mut packet[..], &checksums);
    icmp.emit(&mut Icmpv4Packet::new_unchecked(&mut packet[20..]), &checksums);
    assert_eq!(device.send([packet]), 1);
    let answer = next_packet(&device);
    let ip = Ipv4Packet::new_checked(&answer).unwrap();
    assert_eq!((ip.src_addr().to_string(), ip.dst_addr().to_string()), (A4.into(), B4.into()));
    let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
    let answer = Icmpv4Repr::parse(&icmp, &checksums).unwrap();
    assert_eq!(answer, Icmpv4Repr::EchoReply { ident: 7, seq_no: 3, data: b"payload" });
}

#[test]
fn a_datagram_for_a_closed_port_is_answered_as_unreachable() {
    let (stack, device) = single(|_| {});
    let flow = Flow { local: at(B4, 4000), remote: at(A4, 9) };
    device.send([packet::build_udp(flow, b"anybody?", 1280).unwrap()]);
    let answer = next_packet(&device);
    assert_eq!((answer[9], answer[20], answer[21]), (1, 3, 3), "ICMP, destination unreachable, port");
    assert_eq!(stack.counters().drops, Drops::default());
}

#[test]
fn packets_for_others_are_dropped_and_counted() {
    let (stack, device) = single(|_| {});
    let flow = Flow { local: at(B4, 4000), remote: at("100.64.0.9", 9) };
    device.send([packet::build_udp(flow, b"x", 1280).unwrap(), b"junk".to_vec(), Vec::new()]);
    let started = clock();
    while stack.counters().drops.malformed < 2 && started.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let drops = stack.counters().drops;
    assert_eq!((drops.malformed, drops.misaddressed), (2, 1));
}

#[test]
fn the_device_moves_batches() {
    let (stack, device) = single(|_| {});
    let flow = Flow { local: at(B4, 4000), remote: at(A4, 9) };
    let mut batch = Batch::new(4, 1280);
    for _ in 0..2 {
        assert!(batch.push(&packet::build_udp(flow, b"x", 1280).unwrap()));
    }
    assert_eq!(device.write_batch(&mut batch).unwrap(), 2);
    let mut read = Batch::new(4, 1280);
    while read.len() < 2 {
        device.read_batch(&mut read, Duration::from_secs(5)).unwrap();
    }
    assert_eq!(read.packet(0)[9], 1, "ICMP");
    assert_eq!(device.read_batch(&mut read, Duration::from_millis(1)).unwrap(), 0);
    stack.close();
    let error = loop {
        read.clear();
        if let Err(error) = device.read_batch(&mut read, Duration::from_secs(5)) {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(device.write_batch(&mut batch).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn service_addresses_never_fall_back() {
    let (stack, device) = single(|config| config.fallback = true);
    let mut requests = stack.requests().unwrap();
    assert!(stack.requests().is_none(), "taken");
    let service = Flow { local: at(B4, 4000), remote: at("100.100.100.100", 9) };
    let own = Flow { local: at(B4, 4000), remote: at(A4, 9) };
    device.send([service, own].map(|flow| packet::build_udp(flow, b"x", 1280).unwrap()));
    let Some(Request::Udp(request)) = requests.next().await else { panic!("a datagram was sent") };
    assert_eq!(request.flow(), Flow { local: own.remote, remote: own.local });
    assert_eq!(request.payload(), b"x");
    assert_eq!(next_packet(&device)[9], 1, "the service address answers ICMP unreachable");
}

/// A thread that waits for `device` until `ends` says when it stopped.
fn waiting(device: &StackDevice) -> std::sync::mpsc::Receiver<Instant> {
    let (sender, ends) = std::sync::mpsc::channel();
    let device = device.clone();
    std::thread::spawn(move || {
        device.waits().unwrap().wait(Duration::from_secs(60)).unwrap();
        let _ = sender.send(clock());
    });
    // Long enough to be asleep, in all likelihood; the test holds either way.
    std::thread::sleep(Duration::from_millis(50));
    ends
}

#[test]
fn a_reader_that_waits_is_left_asleep_while_another_reads_and_woken_for_the_rest() {
    let (stack, device) = Netstack::start(Config::with_addresses([A4.parse().unwrap()])).unwrap();
    let socket = stack.bind_udp(at(A4, 4000)).unwrap();
    let mut batch = Batch::new(1, 1280);
    let ends = waiting(&device);
    assert_eq!(device.read_batch(&mut batch, Duration::ZERO).unwrap(), 0, "somebody else looks in vain");
    socket.send_to(b"one", at(B4, 1)).unwrap();
    ends.recv_timeout(Duration::from_secs(10)).expect("woken for a packet");
    assert_eq!(device.read_batch(&mut batch, Duration::ZERO).unwrap(), 1);

    let ends = waiting(&device);
    let waits = device.waits().unwrap();
    waits.hush(true);
    for _ in 0..2 {
        socket.send_to(b"two", at(B4, 1)).unwrap();
    }
    batch.clear();
    assert_eq!(device.read_batch(&mut batch, Duration::ZERO).unwrap(), 1);
    assert!(ends.recv_timeout(Duration::from_millis(100)).is_err(), "left asleep");
    waits.hush(false);
    ends.recv_timeout(Duration::from_secs(10)).expect("woken for what was left");
}
