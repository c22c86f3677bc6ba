//! What connections have to send, and when they are looked at.

use super::{BURST, ConnId, Event, FIN_WAIT_TIME, MAX_TIME_WAIT, Origin, SHORTEST_WAIT, Stack, TIME_WAIT_SERVICE};
use crate::netstack::packet::Checksum;
use crate::netstack::parcel::Parcel;
use smoltcp::iface::PollResult;
use smoltcp::socket::tcp::State;
use std::time::Instant;

impl Stack {
    /// How many packets [`poll_transmit`](Self::poll_transmit) may hold; sockets wait for room beyond it.
    pub(in crate::netstack) fn set_transmit_limit(&mut self, limit: usize) {
        self.phy.set_limit(limit);
    }

    /// The next parcel for the mesh.
    pub(in crate::netstack) fn poll_transmit(&mut self) -> Option<Parcel> {
        self.phy.pop()
    }

    /// Takes a parcel's buffer back for another one.
    pub(in crate::netstack) fn recycle(&mut self, buffer: Vec<u8>) {
        self.phy.recycle(buffer);
    }

    /// The next decision to make.
    pub(in crate::netstack) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    pub(in crate::netstack) fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Whether a connection has something to send and no room for it.
    pub(in crate::netstack) fn is_blocked(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Does whatever is due at `now`.
    pub(in crate::netstack) fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, id)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop_first();
            if let Some(conn) = self.conns.get_mut(&id) {
                conn.deadline = None;
                if conn.expires.is_some_and(|expires| expires <= now) {
                    conn.expires = None;
                    conn.socket().abort();
                } else if conn.recovery.probe(now) {
                    self.repair(now, id);
                }
            }
            self.touch(id);
        }
        self.flush(now);
    }

    /// Lets every touched connection send, as far as there is room, and notes what has become of it.
    pub(in crate::netstack) fn flush(&mut self, now: Instant) {
        loop {
            self.run_stirred(now);
            while self.phy.has_room() {
                let Some(id) = self.ready.pop_front() else { break };
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.queued = false;
                    self.send_burst(now, id);
                }
            }
            let Some(parcel) = self.phy.pop_looped() else { break };
            self.handle(now, parcel.bytes(), parcel.count(), Checksum::Right);
            self.phy.recycle(parcel.into_buffer());
        }
    }

    /// Lets one connection send, and has it come again if it has more to send than it may, or than there is room for.
    pub(super) fn send_burst(&mut self, now: Instant, id: ConnId) {
        let at = self.smol(now);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.unanswered = 0;
        let resting = conn.attached && conn.time_wait_since.is_some_and(|since| now >= since + TIME_WAIT_SERVICE);
        let mut more = !resting;
        self.phy.set_window(conn.window());
        for _ in 0..BURST {
            if !more || !self.phy.has_room() {
                break;
            }
            more = self.iface.poll_egress(at, &mut self.phy.port(None), &mut conn.sockets)
                == PollResult::SocketStateChanged;
            if let Some(sent) = self.phy.take_sent() {
                conn.recovery.sent(now, sent);
            }
        }
        self.phy.set_window(None);
        if more {
            self.touch(id);
        } else {
            self.settle(now, id, resting);
        }
    }

    /// Notes the state that `id` has come to, and when to look at it again.
    fn settle(&mut self, now: Instant, id: ConnId, resting: bool) {
        let at = self.smol(now);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let passive = conn.origin != Origin::Dialed;
        match conn.state() {
            State::Listen => {
                // The handshake was reset.
                self.remove(id);
                return;
            }
            State::Closed if conn.socket().remote_endpoint().is_none() => {
                if conn.attached {
                    conn.expires = None;
                    if self.flows.get(&conn.flow) == Some(&id) {
                        self.flows.remove(&conn.flow);
                    }
                    self.set_deadline(id, None);
                    self.wake_splice(id);
                } else {
                    self.remove(id);
                }
                return;
            }
            State::SynSent | State::SynReceived | State::Closed => {}
            state @ (State::Established
            | State::CloseWait
            | State::FinWait1
            | State::FinWait2
            | State::Closing
            | State::LastAck
            | State::TimeWait) => {
                if !conn.established {
                    conn.established = true;
                    conn.expires = None;
                    self.half_open -= usize::from(passive);
                    if let Origin::Listener(bind) = conn.origin {
                        match self.listeners.get_mut(&bind) {
                            Some(listener) => {
                                conn.attached = true;
                                listener.queue.push_back(id);
                                if let Some(waker) = listener.waker.take() {
                                    waker.wake();
                                }
                            }
                            None => conn.socket().abort(),
                        }
                    }
                }
                if state == State::TimeWait && conn.time_wait_since.is_none() {
                    conn.time_wait_since = Some(now);
                }
                if !conn.attached {
                    if conn.socket().can_recv() {
                        // Nobody will read this: tell the peer (RFC 1122 §4.2.2.13).
                        conn.socket().abort();
                    }
                    if state == State::FinWait2 {
                        let latest = now + FIN_WAIT_TIME;
                        conn.expires = Some(conn.expires.map_or(latest, |at| at.min(latest)));
                    }
                    if state == State::TimeWait {
                        conn.expires = None;
                        self.time_wait.insert(id);
                    }
                }
            }
        }
        let others = [conn.expires, conn.recovery.poll_timeout()];
        let timer = if resting { None } else { self.iface.poll_at(at, &conn.sockets) };
        let timer = timer.map(|at| self.real(at).max(now + SHORTEST_WAIT));
        let deadline = others.into_iter().chain([timer]).flatten().min();
        self.set_deadline(id, deadline);
        while self.time_wait.len() > MAX_TIME_WAIT {
            let Some(oldest) = self.time_wait.first().copied() else { break };
            self.remove(oldest);
        }
    }

    fn set_deadline(&mut self, id: ConnId, deadline: Option<Instant>) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if conn.deadline == deadline {
            return;
        }
        if let Some(old) = conn.deadline {
            self.deadlines.remove(&(old, id));
        }
        conn.deadline = deadline;
        if let Some(new) = deadline {
            self.deadlines.insert((new, id));
        }
    }

    pub(super) fn touch(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id)
            && !conn.queued
        {
            conn.queued = true;
            self.ready.push_back(id);
        }
    }

    pub(super) fn remove(&mut self, id: ConnId) {
        let Some(mut conn) = self.conns.remove(&id) else { return };
        self.buffers -= conn.buffers;
        self.keep_socket(&mut conn);
        if let Some(at) = conn.deadline {
            self.deadlines.remove(&(at, id));
        }
        if self.flows.get(&conn.flow) == Some(&id) {
            self.flows.remove(&conn.flow);
        }
        self.time_wait.remove(&id);
        if !conn.established && conn.origin != Origin::Dialed {
            self.half_open -= 1;
        }
    }
}
