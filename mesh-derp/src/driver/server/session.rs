//! One relay connection, from its login to its end: a task on a [shard](super::shards).
//!
//! Each time the task runs it writes one unit of what waits for its client, and reads one unit of what its client has
//! sent. Reading twice in a row takes a turn; see there.

use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use mesh_noise::key::{KEY_LEN, NodePublic};
use tokio::io::{AsyncReadExt as _, AsyncWrite as _};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, oneshot};
use tokio::time::Sleep as Timer;

use super::RelayServer;
use super::login::Ended;
use super::outlet::{Outlet, Sleep};
use super::region::Guest;
use super::routes::{Route, Routes};
use super::shards::Turns;
use super::slab;
use crate::driver::stream::{Rewind, Transport};
use crate::driver::{now, random_fraction};
use crate::frame::{Frame, GoneReason};
use crate::queue::Lane;
use crate::server::{Connection, ConnectionId, Input, Pressure, RateLimiter};

/// What is added to the configured keep-alive period, at random, once a connection.
const KEEP_ALIVE_SPREAD: Duration = Duration::from_secs(5);
/// How long a client may take nothing before its queue stops holding on to the buffers that others' packets came in.
const BRIEF: Duration = Duration::from_millis(20);
/// How long another relay of the region may take no byte, at least: a pause of its is no reason to part.
const RELAY_STALL: Duration = Duration::from_secs(30);
/// So little room is not worth another read.
const SHORT: usize = 2 * 1024;
/// Receivers that a connection remembers having given a packet to.
const MAX_GIVEN: usize = 16 * 1024;

/// A connection that runs on its shard. Dropping this ends it.
#[derive(Debug)]
pub(super) struct Running {
    outlet: Arc<Outlet>,
    ended: oneshot::Receiver<()>,
}

impl Running {
    /// Waits until the connection has ended.
    pub(super) async fn wait(mut self) {
        let _ = (&mut self.ended).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.outlet.close();
    }
}

/// A connection's place in the registry, given up when its task ends.
#[derive(Debug)]
struct Registration {
    server: Arc<RelayServer>,
    id: ConnectionId,
    outlet: Arc<Outlet>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.server.leave(self.id, self.outlet.is_closed_with_all());
        let counters = &self.server.counters;
        counters.dropped_gone.add(self.outlet.abandon(counters));
    }
}

type AwaitedTurn = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

/// Whether this connection may be read.
enum Reading {
    /// It may: there was little when it was last read dry.
    Free,
    /// When something has arrived and its turn comes: it was read dry, but there was much.
    Dry,
    /// When its turn comes.
    Waiting(AwaitedTurn),
    /// It is its turn.
    Turn(#[expect(dead_code, reason = "held, not used")] OwnedSemaphorePermit),
}

/// What became of writing one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    /// It is gone, and nothing else waited.
    All,
    /// It is gone, and there is probably more.
    More,
    /// The socket has not taken all of it; the task will be woken when it takes more.
    Blocked,
}

/// One relay connection. See the [module doc](self).
pub(super) struct Session {
    stream: Rewind<Transport>,
    core: Connection,
    node: NodePublic,
    registration: Registration,
    /// What the socket has not taken yet of the present unit.
    out: BytesMut,
    unflushed: bool,
    /// Since when the client takes nothing, if it does not.
    blocked_since: Option<Instant>,
    /// Whether the queue knows.
    told_blocked: bool,
    keep_alive_period: Duration,
    keep_alive_at: Instant,
    reading: Reading,
    /// Until when nothing is read.
    paused_until: Option<Instant>,
    pressure: Pressure<ConnectionId>,
    rate: RateLimiter,
    rate_version: u64,
    routes: Routes,
    /// Receivers that know of this node because they were given a packet from it.
    given: HashSet<ConnectionId>,
    skipped: u64,
}

/// Registers a client that has been let in and hands its connection to a shard.
///
/// # Errors
/// If the system does not let the connection go from the present runtime.
pub(super) fn start(
    server: Arc<RelayServer>,
    stream: Rewind<Transport>,
    core: Connection,
    guest: Guest,
) -> io::Result<Running> {
    let stream = stream.detach()?;
    let outlet = Arc::new(Outlet::new(guest, server.config.queue));
    let id = server.enter(&outlet);
    let registration = Registration { server: Arc::clone(&server), id, outlet: Arc::clone(&outlet) };
    let shard = server.shards().pick();
    let turns = Arc::clone(shard.turns());
    let (on_end, ended) = oneshot::channel();
    let runtime = shard.runtime().clone();
    runtime.spawn(async move {
        let reason = match stream.attach() {
            Ok(stream) => Session::new(registration, stream, core, guest.node).run(turns).await,
            Err(error) => error.into(),
        };
        server.note_end(guest.presence.address, &reason);
        let _ = on_end.send(());
    });
    Ok(Running { outlet, ended })
}

impl Session {
    fn new(registration: Registration, stream: Rewind<Transport>, mut core: Connection, node: NodePublic) -> Self {
        let mut out = BytesMut::new();
        while let Some(bytes) = core.poll_transmit() {
            out.extend_from_slice(&bytes);
        }
        let (at, (rate_version, rate)) = (now(), registration.server.rate());
        let relay = registration.outlet.guest().is_relay();
        let period = registration.server.config.keep_alive + KEEP_ALIVE_SPREAD.mul_f64(random_fraction());
        Self {
            stream,
            core,
            node,
            out,
            unflushed: false,
            blocked_since: None,
            told_blocked: false,
            keep_alive_period: period,
            keep_alive_at: at + period,
            reading: Reading::Free,
            paused_until: None,
            pressure: Pressure::new(),
            rate: if relay { RateLimiter::exempt() } else { RateLimiter::new(at, rate) },
            rate_version,
            routes: Routes::default(),
            given: HashSet::new(),
            skipped: 0,
            registration,
        }
    }

    async fn run(mut self, turns: Arc<Turns>) -> Ended {
        let timer = tokio::time::sleep_until(self.keep_alive_at.into());
        tokio::pin!(timer);
        match self.take_early() {
            Ok(()) => std::future::poll_fn(|cx| self.poll(cx, timer.as_mut(), &turns)).await,
            Err(reason) => reason,
        }
    }

    /// Does what came together with the login.
    fn take_early(&mut self) -> Result<(), Ended> {
        self.paused_until = self.take_frames(now())?;
        let rest = BytesMut::from(&self.core.read_buffer()[..]);
        *self.core.read_buffer() = rest;
        Ok(())
    }

    /// Runs once; ready when the connection is over.
    fn poll(&mut self, cx: &mut Context<'_>, timer: Pin<&mut Timer>, turns: &Turns) -> Poll<Ended> {
        match self.step(cx, timer, turns) {
            Ok(()) => Poll::Pending,
            Err(ended) => Poll::Ready(ended),
        }
    }

    fn step(&mut self, cx: &mut Context<'_>, timer: Pin<&mut Timer>, turns: &Turns) -> Result<(), Ended> {
        let at = now();
        let wrote = self.write_unit(cx, at)?;
        let read = self.read_unit(cx, at, turns)?;
        self.keep_time(cx, at, timer)?;
        match self.registration.outlet.sleep(cx.waker(), wrote == Written::All) {
            Sleep::Closing => return Err(Ended::Dismissed),
            Sleep::Not => cx.waker().wake_by_ref(),
            Sleep::Until if read || wrote == Written::More => after_events(cx),
            Sleep::Until => {}
        }
        Ok(())
    }

    /// Writes one unit of what waits.
    fn write_unit(&mut self, cx: &mut Context<'_>, at: Instant) -> Result<Written, Ended> {
        let mut full = false;
        if self.out.is_empty() {
            let Registration { server, outlet, .. } = &self.registration;
            let mut unit = slab::take();
            full = outlet.fill(at, &mut unit, &server.counters);
            if unit.is_empty() {
                slab::give_back(unit);
            } else {
                self.out = unit;
            }
        }
        if self.push_out(cx)?.is_pending() {
            self.blocked_since.get_or_insert(at);
            return Ok(Written::Blocked);
        }
        self.unblock();
        Ok(if full { Written::More } else { Written::All })
    }

    /// Hands the present unit to the socket.
    fn push_out(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Ended> {
        while !self.out.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.out) {
                Poll::Ready(Ok(0)) => return Err(Ended::Closed),
                Poll::Ready(Ok(taken)) => {
                    self.out.advance(taken);
                    self.unflushed = true;
                    self.unblock();
                }
                Poll::Ready(Err(error)) => return Err(error.into()),
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
        if self.out.capacity() > 0 {
            slab::give_back(std::mem::take(&mut self.out));
        }
        if self.unflushed {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(flushed) => flushed?,
                Poll::Pending => return Ok(Poll::Pending),
            }
            self.unflushed = false;
        }
        Ok(Poll::Ready(()))
    }

    fn unblock(&mut self) {
        self.blocked_since = None;
        if std::mem::take(&mut self.told_blocked) {
            self.registration.outlet.set_blocked(false);
        }
    }

    /// Reads one unit of what the client has sent, if it may, and passes it on. Whether to do so again at once; otherwise
    /// the task will be woken when it may.
    fn read_unit(&mut self, cx: &mut Context<'_>, at: Instant, turns: &Turns) -> Result<bool, Ended> {
        if self.paused_until.is_some_and(|until| at < until) {
            return Ok(false);
        }
        self.paused_until = None;
        if let Reading::Dry = self.reading {
            match self.stream.get_ref().poll_arrived(cx) {
                Poll::Pending => return Ok(false),
                Poll::Ready(arrived) => arrived?,
            }
            self.await_turn(cx, turns);
        }
        if let Reading::Waiting(awaited) = &mut self.reading {
            let Poll::Ready(permit) = awaited.as_mut().poll(cx) else { return Ok(false) };
            self.reading = permit.map_or(Reading::Free, Reading::Turn);
            after_events(cx);
            return Ok(false);
        }
        if matches!(self.reading, Reading::Turn(_)) {
            self.paused_until = turns.wait(at);
            if self.paused_until.is_some() {
                return Ok(false);
            }
        }
        let mut unit = slab::take();
        unit.extend_from_slice(self.core.read_buffer());
        let most = slab::UNIT.saturating_sub(unit.len()).max(slab::UNIT / 2);
        let mut room = most;
        unit.reserve(room);
        // A stream may hand out what it has in small pieces.
        let end = loop {
            match std::pin::pin!(self.stream.read_buf(&mut (&mut unit).limit(room))).poll(cx) {
                Poll::Pending => break Some(Ok(())),
                Poll::Ready(Ok(0)) => break Some(Err(Ended::Closed)),
                Poll::Ready(Err(error)) => break Some(Err(error.into())),
                Poll::Ready(Ok(read)) => room -= read,
            }
            if room < SHORT {
                break None;
            }
        };
        let read = most - room;
        if read == 0 {
            slab::give_back(unit);
        } else {
            turns.note_unit();
            let lent = slab::lend(unit, self.core.read_buffer());
            let taken = self.take_frames(at);
            slab::keep_rest(self.core.read_buffer(), lent);
            self.paused_until = taken?;
        }
        if let Some(Err(ended)) = end {
            return Err(ended);
        }
        if self.paused_until.is_some() {
            self.registration.server.counters.pauses.add(1);
        }
        if end.is_some() || self.paused_until.is_some() {
            // Unless it was read dry, the stream may hold more already, and nothing need arrive for that.
            self.reading = if end.is_none() || read < slab::LITTLE { Reading::Free } else { Reading::Dry };
            return Ok(false);
        }
        self.await_turn(cx, turns);
        Ok(!matches!(self.reading, Reading::Waiting(_)))
    }

    /// Gets in line. Whoever has the turn and wants another one does so before it is over: those who wait already come
    /// first.
    fn await_turn(&mut self, cx: &mut Context<'_>, turns: &Turns) {
        let mut awaited: AwaitedTurn = Box::pin(Arc::clone(turns.free()).acquire_owned());
        self.reading = match awaited.as_mut().poll(cx) {
            Poll::Ready(Ok(permit)) => Reading::Turn(permit),
            Poll::Ready(Err(_)) => Reading::Free,
            Poll::Pending => Reading::Waiting(awaited),
        };
    }

    fn keep_time(&mut self, cx: &mut Context<'_>, at: Instant, mut timer: Pin<&mut Timer>) -> Result<(), Ended> {
        let mut next = self.keep_alive_at;
        if let Some(since) = self.blocked_since {
            let Registration { server, outlet, .. } = &self.registration;
            let stall = server.config.write_stall;
            let stalled_at = since + if outlet.guest().is_relay() { stall.max(RELAY_STALL) } else { stall };
            if at >= stalled_at {
                return Err(Ended::Stalled);
            }
            if at >= since + BRIEF && !self.told_blocked {
                self.told_blocked = true;
                self.registration.outlet.set_blocked(true);
            }
            next = next.min(if self.told_blocked { stalled_at } else { since + BRIEF });
        }
        if let Some(until) = self.paused_until {
            next = next.min(until);
        }
        if at >= self.keep_alive_at {
            self.keep_alive_at = at + self.keep_alive_period;
            next = next.max(at).min(self.keep_alive_at);
            self.registration.outlet.shrink();
            self.registration.outlet.tell(Frame::KeepAlive);
        }
        // An alarm that comes too early is set again then.
        if timer.is_elapsed() || timer.deadline() > next.into() {
            timer.as_mut().reset(next.into());
        }
        if timer.poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }

    /// Does what the frames say that have been read. Until when nothing more is to be read.
    fn take_frames(&mut self, at: Instant) -> Result<Option<Instant>, Ended> {
        self.refresh_rate(at);
        let Registration { server, id, outlet } = &self.registration;
        self.routes.refresh(server, *id, outlet);
        let mut run = Run::default();
        let (mut frames, mut until) = (0, None);
        let result = loop {
            let input = match self.core.poll_input() {
                Ok(Some(input)) => input,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            };
            frames += 1;
            match input {
                Input::Packet { destination, payload } => {
                    until = until.max(self.rate.charge(at, KEY_LEN + payload.len()));
                    if run.destination != Some(destination) {
                        self.pass_on(at, &mut run);
                        run.destination = Some(destination);
                    }
                    run.packets.push(payload);
                }
                Input::Ping(data) => {
                    self.registration.server.counters.pings.add(1);
                    self.registration.outlet.pong(data);
                }
                Input::Preferred(home) => {
                    self.registration.outlet.set_home(home, &self.registration.server.counters);
                }
                Input::Regional(asked) => {
                    let Registration { server, id, outlet } = &self.registration;
                    server.regional(at, asked, &mut self.core, *id, outlet);
                }
                Input::Login { .. } | Input::Nothing => {}
            }
        };
        self.pass_on(at, &mut run);
        let counters = &self.registration.server.counters;
        counters.frames_in.add(frames);
        counters.frames_unknown.add(self.core.skipped() - self.skipped);
        self.skipped = self.core.skipped();
        result.map(|()| until.max(self.pressure.pause(at)))
    }

    /// Takes note of another rate limit.
    fn refresh_rate(&mut self, at: Instant) {
        let server = &self.registration.server;
        if server.rate_version.load(Ordering::Acquire) != self.rate_version {
            let (version, rate) = server.rate();
            self.rate.set_limit(at, rate);
            self.rate_version = version;
        }
    }

    /// Puts a run of packets where they belong.
    fn pass_on(&mut self, at: Instant, run: &mut Run) {
        let Some(destination) = run.destination.take() else { return };
        let server = Arc::clone(&self.registration.server);
        let counters = &server.counters;
        counters.packets_in.add(run.packets.len() as u64);
        counters.bytes_in.add(run.packets.iter().map(|packet| packet.len() as u64).sum());
        let known = self.routes.get(&destination).map(|route| (route.id, Arc::clone(&route.outlet)));
        let Some((id, receiver)) = known.or_else(|| self.find(destination)) else {
            if server.forward(self.node, destination, &mut run.packets) {
                return;
            }
            counters.dropped_unknown.add(run.packets.len() as u64);
            for packet in run.packets.drain(..) {
                if Lane::of(&packet) == Lane::Disco && self.core.may_report_missing(at) {
                    counters.peer_gone.add(1);
                    let frame = Frame::PeerGone { peer: destination, reason: GoneReason::NotHere };
                    self.registration.outlet.tell(frame);
                }
            }
            return;
        };
        let outcome = receiver.push(at, self.node, run.packets.drain(..), counters);
        self.pressure.note(id, outcome);
    }

    /// Asks the registry where a node is, and lets it know when this one leaves.
    fn find(&mut self, node: NodePublic) -> Option<(ConnectionId, Arc<Outlet>)> {
        let server = &self.registration.server;
        let (id, outlet) = server.registry().route(&node).map(|(id, outlet)| (id, Arc::clone(outlet)))?;
        if self.given.insert(id) {
            // Identifiers are never used twice, so a long-lived sender's list would grow with every reconnect.
            if self.given.len() > MAX_GIVEN {
                self.given.clear();
            }
            server.registry_mut().note_heard(id, self.node);
        }
        self.routes.remember(Route { node, id, outlet: Arc::clone(&outlet) });
        Some((id, outlet))
    }
}

/// Lets the task run again once the shard has looked for events, and has let those run that they woke.
fn after_events(cx: &mut Context<'_>) {
    let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
}

/// Packets in a row for one destination.
#[derive(Debug, Default)]
struct Run {
    destination: Option<NodePublic>,
    packets: Vec<Bytes>,
}
