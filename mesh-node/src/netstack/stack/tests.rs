//! The core alone: any packets, any order, no clock.

use std::net::SocketAddr;
use std::task::{Poll, Waker};

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpAddress, IpProtocol, IpRepr, TcpPacket};

use super::*;
use crate::netstack::Bind;

const OURS: [&str; 2] = ["100.64.0.1", "fd7a:115c:a1e0::1"];
/// Somebody behind us.
const BEHIND: &str = "100.64.0.3";
const THEIRS: [&str; 2] = ["100.64.0.2", "fd7a:115c:a1e0::2"];

#[expect(clippy::disallowed_methods, reason = "a point to count from")]
fn start() -> Instant {
    Instant::now()
}

fn stack(now: Instant) -> Stack {
    let mut config = Config::with_addresses(OURS.map(|address| address.parse().unwrap()));
    config.fallback = true;
    config.subnets = vec!["100.64.0.0/29".parse().unwrap()];
    (config.receive_buffer, config.send_buffer) = (4096, 4096);
    let mut stack = Stack::new(now, config, [7; 32]);
    stack.listen(Bind::port(80), 4).unwrap();
    stack.bind_udp(Bind::port(53)).unwrap();
    stack
}

/// What the stack has sent, as the data plane reads it.
fn packets_of(stack: &mut Stack) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let mut room = vec![0; LONGEST];
    while let Some(parcel) = stack.poll_transmit() {
        let mut cutting = parcel.cut();
        while let Some(len) = cutting.write_next(&mut room) {
            packets.push(room[..len].to_vec());
        }
        stack.recycle(cutting.into_buffer());
    }
    packets
}

/// A packet of ours to be: protocol, and what follows the IP header.
#[derive(Clone, Debug)]
struct Made {
    v6: bool,
    behind: bool,
    protocol: u8,
    ports: (u16, u16),
    body: Vec<u8>,
}

fn made() -> impl Strategy<Value = Made> {
    let ports = (prop_oneof![Just(4000_u16), Just(4001)], prop_oneof![Just(80_u16), Just(53), Just(22)]);
    let protocol = prop_oneof![4 => Just(6_u8), 1 => Just(17), 1 => Just(1), 1 => Just(58), 1 => any::<u8>()];
    let body = proptest::collection::vec(any::<u8>(), 0..80);
    let fields = (any::<bool>(), any::<bool>(), protocol, ports, body);
    fields.prop_map(|(v6, behind, protocol, ports, body)| Made { v6, behind, protocol, ports, body })
}

impl Made {
    /// With good IP and TCP checksums, so that the damage is deeper.
    fn packet(&self, acknowledges: Option<u32>) -> Vec<u8> {
        let family = usize::from(self.v6);
        let source: IpAddress = THEIRS[family].parse().unwrap();
        let ours = if self.behind && !self.v6 { BEHIND } else { OURS[family] };
        let destination: IpAddress = ours.parse().unwrap();
        let ip = IpRepr::new(source, destination, IpProtocol::from(self.protocol), self.body.len(), 64);
        let mut packet = vec![0; ip.header_len() + self.body.len()];
        ip.emit(&mut packet[..], &ChecksumCapabilities::default());
        let body = &mut packet[ip.header_len()..];
        body.copy_from_slice(&self.body);
        if body.len() >= 20 && self.protocol == 6 {
            body[..2].copy_from_slice(&self.ports.0.to_be_bytes());
            body[2..4].copy_from_slice(&self.ports.1.to_be_bytes());
            if let Some(number) = acknowledges {
                body[8..12].copy_from_slice(&number.to_be_bytes());
            }
            // A header length that fits more often than not.
            body[12] = 0x50 | (body[12] & 0x30);
            TcpPacket::new_unchecked(body).fill_checksum(&source, &destination);
        }
        packet
    }
}

proptest! {
    #[test]
    fn any_packets_are_survived_and_timers_move_on(
        packets in proptest::collection::vec((made(), any::<bool>(), 0_u64..2000), 1..40),
    ) {
        let mut now = start();
        let mut stack = stack(now);
        let mut answered = None;
        for (made, echoes, wait) in packets {
            stack.handle_packet(now, &made.packet(answered.filter(|_| echoes)));
            stack.flush(now);
            for packet in packets_of(&mut stack) {
                prop_assert!(packet.len() <= 1280);
                // So that some of the next packets acknowledge what we have just sent.
                answered = packet::sent(&packet).map(|sent| u32::from_ne_bytes(sent.end.0.to_ne_bytes())).or(answered);
            }
            while let Some(event) = stack.poll_event() {
                match event {
                    Event::TcpRequest(flow) if echoes => {
                        if let Ok(id) = stack.admit(now, flow) {
                            stack.release(now, id);
                        }
                    }
                    Event::TcpRequest(flow) => stack.refuse_tcp(now, flow),
                    Event::UdpDatagram { packet, .. } => stack.refuse_packet(now, &packet),
                    Event::Echo { packet, message } => stack.answer_echo(packet, message.start),
                }
            }
            if let Poll::Ready(Ok((id, _))) = stack.poll_accept(Bind::port(80), Waker::noop()) {
                let _ = stack.poll_write(id, Waker::noop(), b"welcome");
                stack.release(now, id);
            }
            now += Duration::from_millis(wait);
            stack.handle_timeout(now);
            while stack.poll_transmit().is_some() {}
            prop_assert!(stack.poll_timeout().is_none_or(|at| at > now), "a timer that does not move on");
        }
        // Left alone, everything ends.
        for _ in 0..2000 {
            let Some(at) = stack.poll_timeout() else { break };
            now = at.max(now);
            stack.handle_timeout(now);
            while stack.poll_transmit().is_some() {}
        }
        prop_assert_eq!((stack.half_open, stack.connections()), (0, 0));
    }
}

#[test]
fn half_open_connections_are_bounded_and_expire() {
    let mut now = start();
    let mut stack = stack(now);
    let syn = |port: u16| {
        let mut body = vec![0; 20];
        (body[12], body[13]) = (0x50, 2);
        Made { v6: false, behind: false, protocol: 6, ports: (port, 80), body }.packet(None)
    };
    for port in 1..=300 {
        stack.handle_packet(now, &syn(port));
    }
    stack.flush(now);
    assert_eq!((stack.half_open, stack.connections()), (MAX_HALF_OPEN, MAX_HALF_OPEN));
    assert_eq!(stack.drops().connections, 300 - MAX_HALF_OPEN as u64);
    while stack.poll_transmit().is_some() {}
    while stack.connections() > 0 {
        now = stack.poll_timeout().expect("a connection has a deadline");
        stack.handle_timeout(now);
        while stack.poll_transmit().is_some() {}
    }
    assert_eq!(stack.half_open, 0);
}

#[test]
fn the_same_seed_gives_the_same_packets() {
    let now = start();
    let run = || {
        let mut stack = stack(now);
        let remote: SocketAddr = "100.64.0.2:80".parse().unwrap();
        (0..3).map(|_| stack.connect(remote).unwrap()).for_each(drop);
        stack.flush(now);
        packets_of(&mut stack)
    };
    assert_eq!(run(), run());
    assert_eq!(run().len(), 3);
}

#[test]
fn an_idle_connection_costs_no_timer() {
    let mut stack = stack(start());
    assert_eq!(stack.poll_timeout(), None);
    stack.handle_timeout(start());
    assert_eq!(stack.poll_timeout(), None);
}

/// Two stacks and a cable in virtual time: `delay` each way, and `loses` says which packets never arrive.
struct Link {
    now: Instant,
    delay: Duration,
    line: Option<Line>,
    stacks: [Stack; 2],
    /// By the side that receives.
    flying: [VecDeque<(Instant, Vec<u8>)>; 2],
    sent: [usize; 2],
    /// When half of the bytes had been read.
    half: Option<Instant>,
    /// Times that nothing happened for half a second: a timer had to help.
    stalls: usize,
}

/// What each direction carries, and how long packets queue for it before they are dropped.
struct Line {
    bits_per_second: u64,
    queue: Duration,
    free_at: [Instant; 2],
}

impl Line {
    /// When a packet of `len` bytes has left; `None` if there is no room for it.
    fn carry(&mut self, now: Instant, side: usize, len: usize) -> Option<Instant> {
        let begin = self.free_at[side].max(now);
        if begin - now > self.queue {
            return None;
        }
        let takes = Duration::from_nanos(len as u64 * 8 * 1_000_000_000 / self.bits_per_second);
        self.free_at[side] = begin + takes;
        Some(self.free_at[side])
    }
}

impl Link {
    fn new(delay: Duration) -> Self {
        let now = start();
        let stacks = [(OURS, 1), (THEIRS, 2)].map(|(addresses, seed)| {
            let config = Config::with_addresses(addresses.map(|address| address.parse().unwrap()));
            Stack::new(now, config, [seed; 32])
        });
        Self { now, delay, line: None, stacks, flying: Default::default(), sent: [0; 2], half: None, stalls: 0 }
    }

    fn with_line(mut self, bits_per_second: u64, queue: Duration) -> Self {
        self.line = Some(Line { bits_per_second, queue, free_at: [self.now; 2] });
        self
    }

    /// Moves on to the next thing that happens.
    fn step(&mut self, loses: &mut impl FnMut(usize) -> bool) {
        for side in 0..2 {
            self.stacks[side].flush(self.now);
            for packet in packets_of(&mut self.stacks[side]) {
                self.sent[side] += 1;
                let leaves = match &mut self.line {
                    Some(line) => line.carry(self.now, side, packet.len()),
                    None => Some(self.now),
                };
                if let Some(at) = leaves
                    && !loses(side)
                {
                    self.flying[1 - side].push_back((at + self.delay, packet));
                }
            }
        }
        let timers = self.stacks.iter().filter_map(Stack::poll_timeout);
        let arrivals = self.flying.iter().filter_map(|flying| flying.front()).map(|(at, _)| *at);
        let next = arrivals.chain(timers).min().expect("something happens");
        if next > self.now + Duration::from_millis(500) {
            self.stalls += 1;
        }
        self.now = self.now.max(next);
        for side in 0..2 {
            while self.flying[side].front().is_some_and(|(at, _)| *at <= self.now) {
                let Some((_, packet)) = self.flying[side].pop_front() else { break };
                self.stacks[side].handle_packet(self.now, &packet);
            }
        }
        for stack in &mut self.stacks {
            stack.handle_timeout(self.now);
        }
    }

    /// Sends `len` bytes and an end from the first stack to the second; how long it takes, and how many packets.
    fn transfer(&mut self, len: usize, mut loses: impl FnMut(usize) -> bool) -> (Duration, usize) {
        let started = self.now;
        self.stacks[1].listen(Bind::port(80), 1).unwrap();
        let client = self.stacks[0].connect("100.64.0.2:80".parse().unwrap()).unwrap();
        let (mut server, mut written, mut read, mut ended) = (None, 0, 0, false);
        let mut buffer = vec![0; 64 * 1024];
        while !ended {
            self.step(&mut loses);
            let left = (len - written).min(buffer.len());
            if left == 0 {
                self.stacks[0].shut_down(client);
            } else if let Poll::Ready(wrote) = self.stacks[0].poll_write(client, Waker::noop(), &buffer[..left]) {
                written += wrote.unwrap();
            }
            if let Poll::Ready(accepted) = self.stacks[1].poll_accept(Bind::port(80), Waker::noop()) {
                server = Some(accepted.unwrap().0);
            }
            while let Some(id) = server
                && let Poll::Ready(got) = self.stacks[1].poll_read(id, self.now, Waker::noop(), &mut buffer)
            {
                let got = got.unwrap();
                read += got;
                if read >= len / 2 {
                    self.half.get_or_insert(self.now);
                }
                ended = got == 0;
                if ended {
                    break;
                }
            }
        }
        assert_eq!(read, len);
        (self.now - started, self.sent[0])
    }
}

#[test]
fn a_loss_costs_round_trips_and_not_timers() {
    let every = |nth: usize| {
        let mut count = 0;
        move |side: usize| {
            count += usize::from(side == 0);
            side == 0 && nth != 0 && usize::is_multiple_of(count, nth)
        }
    };
    for (nth, seconds) in [(0, 1), (1000, 2), (100, 12), (50, 20)] {
        let mut link = Link::new(Duration::from_millis(10));
        let (took, packets) = link.transfer(4 << 20, every(nth));
        println!("4 MiB over 20 ms, every {nth}th packet lost: {took:?} and {packets} packets");
        assert_eq!(link.stalls, 0, "every {nth}th lost");
        assert!(took < Duration::from_secs(seconds), "every {nth}th lost: {took:?}");
    }
}

/// Megabits a second that a transfer of `len` bytes comes to after its first half.
fn rate(link: &mut Link, len: usize, loses: impl FnMut(usize) -> bool) -> f64 {
    link.transfer(len, loses);
    let took = link.now - link.half.expect("there was a first half");
    (len / 2 * 8) as f64 / took.as_secs_f64() / 1e6
}

#[test]
fn one_stream_fills_a_gigabit_over_fifty_milliseconds() {
    let mut link = Link::new(Duration::from_millis(25)).with_line(1_000_000_000, Duration::from_millis(25));
    let rate = rate(&mut link, 200_000_000, |_| false);
    println!("1 Gbit/s over 50 ms: {rate:.0} Mbit/s");
    assert!(rate >= 800.0, "{rate:.0} Mbit/s");
}

#[test]
fn one_in_a_thousand_lost_slows_a_stream_and_does_not_stop_it() {
    for (round_trip, len, least) in [(50, 4_000_000, 3.0), (2, 40_000_000, 60.0)] {
        let delay = Duration::from_millis(round_trip) / 2;
        let mut link = Link::new(delay).with_line(1_000_000_000, Duration::from_millis(25));
        let mut count = 0;
        let every_thousandth = |side: usize| {
            count += usize::from(side == 0);
            side == 0 && usize::is_multiple_of(count, 1000)
        };
        let rate = rate(&mut link, len, every_thousandth);
        println!("1 Gbit/s over {round_trip} ms, 0.1 % lost: {rate:.1} Mbit/s, {} stalls", link.stalls);
        assert!(rate >= least && link.stalls == 0, "{round_trip} ms: {rate:.1} Mbit/s, {} stalls", link.stalls);
    }
}

#[test]
fn an_offered_window_begins_small_and_a_short_connections_socket_is_used_again() {
    let mut link = Link::new(Duration::from_millis(1));
    link.transfer(100_000, |_| false);
    let newest = |stack: &Stack| stack.conns.values().next_back().map(|conn| conn.receives.limit());
    assert!(newest(&link.stacks[1]).is_none_or(|limit| limit == 1 << 20));
    while link.stacks.iter().any(|stack| stack.connections() > 0) {
        // Nobody holds them any more.
        for stack in &mut link.stacks {
            let now = link.now;
            stack.conns.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| stack.release(now, id));
        }
        link.step(&mut |_| false);
    }
    assert!(link.stacks.iter().all(|stack| stack.spare.len() == 1 && stack.buffers == 0));
}

#[test]
fn buffers_beyond_the_budget_are_small() {
    let mut config = Config::with_addresses([OURS[0].parse().unwrap()]);
    config.buffer_budget = 3 * (config.receive_buffer + config.send_buffer);
    let mut stack = Stack::new(start(), config, [7; 32]);
    let ids: Vec<_> = (0..5).map(|_| stack.connect("100.64.0.2:80".parse().unwrap()).unwrap()).collect();
    let sizes: Vec<usize> = ids.iter().map(|id| stack.conns[id].buffers >> 20).collect();
    assert_eq!(sizes, [16, 16, 16, 1, 1]);
}

#[test]
fn any_few_packets_in_a_row_may_be_lost_without_waiting_for_a_timer() {
    // Packets 3 to 5 tell the first round trip; the last one is the end of the stream.
    for (first, burst, side) in (6..40).flat_map(|first| [(first, 1, 0), (first, 3, 0), (first, 2, 1)]) {
        let mut link = Link::new(Duration::from_millis(10));
        let mut count = 0;
        let lost = |sender: usize| {
            count += usize::from(sender == side);
            sender == side && (first..first + burst).contains(&count)
        };
        let (took, _) = link.transfer(36 * 1240, lost);
        assert_eq!(link.stalls, 0, "{burst} lost from packet {first} of side {side}: {took:?}");
    }
}
