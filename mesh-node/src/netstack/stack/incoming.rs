//! What becomes of packets that arrive.

use super::{
    ACK_DELAY, Arrival, Conn, ConnId, Event, HEADERS, MAX_EVENTS, MAX_PARKED, MOST_ACKED, Origin, SEGMENTS_PER_ACK,
    Stack,
};
use crate::netstack::packet::{self, Ack, Checksum, Flow, Parsed, Sent};
use crate::netstack::parcel::Parcel;
use crate::netstack::recovery::DUPLICATES;
use crate::netstack::{Bind, is_service_address};
use mesh_tun::batch::Batch;
use smoltcp::socket::tcp::State;
use std::net::IpAddr;
use std::time::{Duration, Instant};

impl Stack {
    /// Takes the packets of a batch from the mesh, those that follow in order in a flow as one. Says how many. Call
    /// [`flush`](Self::flush) afterwards.
    pub(in crate::netstack) fn handle_batch(&mut self, now: Instant, batch: &mut Batch) -> usize {
        let mut coalescer = std::mem::take(&mut self.coalescer);
        let mut joined = std::mem::take(&mut self.joined);
        coalescer.plan(batch, false);
        let mut taken = 0;
        for group in coalescer.groups() {
            taken += group.count();
            if group.count() == 1 {
                self.handle_packet(now, batch.packet(group.first()));
                continue;
            }
            group.join(batch);
            joined.clear();
            joined.extend_from_slice(batch.packet(group.first()));
            for index in coalescer.packets(group).skip(1) {
                joined.extend_from_slice(batch.packet(index).get(group.payload_at()..).unwrap_or_default());
            }
            self.handle(now, &joined, group.count(), Checksum::Right);
        }
        (self.coalescer, self.joined) = (coalescer, joined);
        taken
    }

    /// Takes one packet from the mesh. Call [`flush`](Self::flush) after a few.
    pub(in crate::netstack) fn handle_packet(&mut self, now: Instant, packet: &[u8]) {
        self.handle(now, packet, 1, Checksum::Unknown);
    }

    /// Takes a packet, or `count` packets joined to one.
    pub(super) fn handle(&mut self, now: Instant, packet: &[u8], count: usize, checksum: Checksum) {
        let Some(parsed) = packet::parse(packet, checksum) else {
            self.drops.malformed += 1;
            return;
        };
        let behind_us = self.is_behind_us(parsed.destination());
        if !behind_us && !self.addresses.contains(&parsed.destination()) {
            self.drops.misaddressed += 1;
            return;
        }
        match parsed {
            Parsed::Tcp { flow, opens, ack } => self.handle_segment(now, flow, opens, ack, Arrival { packet, count }),
            Parsed::Udp { flow, payload } => self.handle_datagram(now, flow, payload, packet),
            Parsed::Other { echo, .. } if behind_us => match echo {
                Some(message) if self.events.len() < MAX_EVENTS => {
                    let packet = packet.get(..message.end).unwrap_or_default().to_vec();
                    self.events.push_back(Event::Echo { packet, message });
                }
                _ => self.drops.datagrams += 1,
            },
            Parsed::Other { .. } => self.feed(now, None, Arrival::one(packet)),
        }
    }

    fn handle_segment(&mut self, now: Instant, flow: Flow, opens: bool, ack: Option<Ack>, arrival: Arrival<'_>) {
        if let Some(id) = self.flows.get(&flow).copied() {
            let over = self.conns.get(&id).is_none_or(|c| matches!(c.state(), State::TimeWait | State::Closed));
            if !(opens && over) {
                // smoltcp stops its timer when only a FIN is left to repair, and never sends it again.
                let only_fin =
                    |ack: Ack, conn: &mut Conn| conn.recovery.is_repeat(ack) && conn.socket().send_queue() == 0;
                if ack.is_some_and(|ack| self.conns.get_mut(&id).is_some_and(|conn| only_fin(ack, conn))) {
                    return;
                }
                if let Some(ack) = ack {
                    self.acknowledge_by_steps(now, id, ack, arrival.packet);
                } else if let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.state() == State::SynSent) {
                    conn.note_syn(arrival.packet);
                    conn.recovery.connected(now);
                }
                self.feed(now, Some(id), arrival);
                if let Some(ack) = ack
                    && self.conns.get_mut(&id).is_some_and(|conn| conn.recovery.acknowledged(now, ack))
                {
                    self.repair(now, id);
                }
                return;
            }
            // The peer uses its port again: what is left of the old connection gives way (RFC 9293 §3.6.1).
            self.flows.remove(&flow);
            if self.conns.get(&id).is_some_and(|c| !c.attached) {
                self.remove(id);
            }
        }
        if !opens {
            self.feed(now, None, arrival);
            return;
        }
        let behind_us = self.is_behind_us(flow.local.ip());
        if let Some(bind) = self.listener_for(flow.local).filter(|_| !behind_us) {
            let full = self.listeners.get(&bind).is_none_or(|l| l.queue.len() >= l.backlog);
            if full || !self.open_passive(now, flow, Origin::Listener(bind), arrival.packet) {
                self.drops.connections += 1;
            }
        } else if behind_us || self.falls_back(flow.local.ip()) {
            if self.parked.contains_key(&flow) {
                return;
            }
            if self.parked.len() >= MAX_PARKED || self.events.len() >= MAX_EVENTS {
                self.drops.connections += 1;
                return;
            }
            self.parked.insert(flow, arrival.packet.to_vec());
            self.events.push_back(Event::TcpRequest(flow));
        } else {
            self.feed(now, None, arrival);
        }
    }

    /// Shows a socket the acknowledgements that a peer would have sent for every second packet: smoltcp's congestion
    /// window grows by the number of acknowledgements, and a peer that joins packets sends few.
    fn acknowledge_by_steps(&mut self, now: Instant, id: ConnId, ack: Ack, packet: &[u8]) {
        let at = self.smol(now);
        let step = SEGMENTS_PER_ACK * self.phy.mtu().saturating_sub(HEADERS).max(1);
        let Some(conn) = self.conns.get_mut(&id).filter(|_| ack.bare) else { return };
        let Some(acked) = conn.recovery.newly_acknowledged(ack) else { return };
        conn.sends.pass(now, acked, conn.recovery.shortest_round_trip());
        let mut room = [0; 128];
        for done in (step..acked).step_by(step).take(MOST_ACKED / SEGMENTS_PER_ACK) {
            let Some(less) = packet::acknowledge_less(packet, ack.number - (acked - done), &mut room) else { return };
            self.iface.poll_ingress_single(at, &mut self.phy.port(Some(less)), &mut conn.sockets);
        }
    }

    fn handle_datagram(&mut self, now: Instant, flow: Flow, payload: std::ops::Range<usize>, packet: &[u8]) {
        let bound = [Bind::exactly(flow.local), Bind::port(flow.local.port())];
        let behind_us = self.is_behind_us(flow.local.ip());
        if let Some(id) = bound.iter().find_map(|bind| self.udp_ports.get(bind)).filter(|_| !behind_us) {
            let Some(socket) = self.udp.get_mut(id) else { return };
            let room = socket.queue.len() < self.config.udp_queue;
            match packet.get(payload) {
                Some(body) if room => {
                    socket.queue.push_back((flow, body.to_vec()));
                    if let Some(waker) = socket.waker.take() {
                        waker.wake();
                    }
                }
                _ => self.drops.datagrams += 1,
            }
        } else if behind_us || self.falls_back(flow.local.ip()) {
            if self.events.len() >= MAX_EVENTS {
                self.drops.datagrams += 1;
                return;
            }
            self.events.push_back(Event::UdpDatagram { flow, payload, packet: packet.to_vec() });
        } else {
            self.feed(now, None, Arrival::one(packet));
        }
    }

    /// Whether traffic for a port of `address` that nobody serves is offered as an event.
    fn falls_back(&self, address: IpAddr) -> bool {
        self.config.fallback && !is_service_address(address)
    }

    /// Hands a packet to one connection's socket, or to none: then smoltcp answers echo requests, resets and errors.
    pub(super) fn feed(&mut self, now: Instant, id: Option<ConnId>, arrival: Arrival<'_>) {
        let at = self.smol(now);
        let conn = id.and_then(|id| Some((id, self.conns.get_mut(&id)?)));
        let Some((id, conn)) = conn else {
            self.iface.poll_ingress_single(at, &mut self.phy.port(Some(arrival.packet)), &mut self.nobody);
            self.phy.take_sent();
            return;
        };
        self.phy.set_window(conn.window());
        // Of several packets smoltcp sees one, and would wait for another.
        let delay = if arrival.count >= SEGMENTS_PER_ACK { Duration::ZERO } else { ACK_DELAY };
        conn.socket().set_ack_delay(Some(delay.into()));
        self.iface.poll_ingress_single(at, &mut self.phy.port(Some(arrival.packet)), &mut conn.sockets);
        self.phy.set_window(None);
        if let Some(answer) = self.phy.take_sent() {
            // An answer at once says that something is missing before this; a loss is told by several.
            let repeats = conn.recovery.ours().is_some_and(|(acks, _)| acks == answer.acks);
            if repeats && answer.start == answer.end {
                conn.receives.lose(now);
                (1..arrival.count.min(usize::from(DUPLICATES))).for_each(|_| self.phy.repeat());
            }
            conn.recovery.sent(now, answer);
        }
        // The peer's window grows by acknowledgements, not by bytes (RFC 9293 §3.8.6.3): a long batch gets several.
        conn.unanswered += arrival.count;
        if conn.splice.is_some() {
            // Its answer waits until the local socket has been written to and read from.
            self.stir(id);
        } else if conn.unanswered >= SEGMENTS_PER_ACK && self.phy.has_room() {
            self.send_burst(now, id);
        } else {
            self.touch(id);
        }
    }

    /// Has the first hole repaired: see [`Recovery`].
    pub(super) fn repair(&mut self, now: Instant, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let flow = conn.flow;
        let (Some(ack), Some((acks, window))) = (conn.recovery.last_ack(), conn.recovery.ours()) else { return };
        let closing = matches!(conn.state(), State::FinWait1 | State::Closing | State::LastAck);
        if conn.socket().send_queue() == 0 {
            if closing {
                // What is unacknowledged is our FIN.
                let numbers = Sent { start: ack.number, end: ack.number + 1, acks, window };
                self.phy.push(Parcel::whole(packet::build_fin(flow, numbers)));
            }
            return;
        }
        if !closing && !matches!(conn.state(), State::Established | State::CloseWait) {
            return;
        }
        // Another window makes the socket count anew.
        let other = Ack { window: ack.window.saturating_sub(1), ..ack };
        let duplicates = std::iter::repeat_n(other, 1 + usize::from(DUPLICATES));
        for ack in duplicates.chain(std::iter::once(ack)) {
            self.feed(now, Some(id), Arrival::one(&packet::build_ack(flow, ack)));
        }
    }
}
