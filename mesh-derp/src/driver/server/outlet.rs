//! What waits to be written to one client.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use mesh_noise::key::NodePublic;

use super::counters::Atomics;
use super::region::Guest;
use super::slab::UNIT;
use crate::frame::Frame;
use crate::queue::{Depth, Lane, PacketQueue};
use crate::server::{Outcome, Watch};

/// Frames about other nodes that may wait; beyond that the oldest goes. A client does not rely on hearing of every
/// departure.
const MAX_NEWS: usize = 256;
/// Where filling a unit stops: a frame of the usual size that begins before this still fits.
const FILL: usize = UNIT - 2048;

#[derive(Debug)]
struct Waiting {
    queue: PacketQueue,
    /// Only one ping is answered at a time.
    pong: Option<[u8; 8]>,
    news: VecDeque<Frame>,
    /// What another relay of the region is told, if this client is one and asked for it.
    watch: Option<Box<Watch>>,
    /// Whether the client was told that something is wrong.
    noticed: bool,
    home: bool,
    abandoned: bool,
    closing: bool,
    closing_all: bool,
    /// The connection's task.
    task: Option<Waker>,
    /// Whether it sleeps until something is put in.
    asleep: bool,
}

impl Waiting {
    /// The task to wake because something was put in.
    fn rouse(&mut self) -> Option<Waker> {
        if std::mem::take(&mut self.asleep) { self.task.clone() } else { None }
    }

    /// Whether there is nothing to write.
    fn is_empty(&self) -> bool {
        let nothing_to_tell = self.news.is_empty() && self.watch.as_ref().is_none_or(|watch| watch.is_empty());
        self.pong.is_none() && nothing_to_tell && self.queue.is_empty()
    }
}

/// Everything that waits to be written to one client, filled by other clients' connections and emptied by its own.
#[derive(Debug)]
pub(super) struct Outlet {
    guest: Guest,
    waiting: Mutex<Waiting>,
}

impl Outlet {
    pub(super) fn new(guest: Guest, depth: Depth) -> Self {
        let waiting = Waiting {
            queue: PacketQueue::new(depth),
            pong: None,
            news: VecDeque::new(),
            watch: None,
            noticed: false,
            home: false,
            abandoned: false,
            closing: false,
            closing_all: false,
            task: None,
            asleep: false,
        };
        Self { guest, waiting: Mutex::new(waiting) }
    }

    pub(super) const fn guest(&self) -> &Guest {
        &self.guest
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put<R>(&self, put: impl FnOnce(&mut Waiting) -> R) -> R {
        let mut waiting = self.waiting();
        let result = put(&mut waiting);
        let roused = waiting.rouse();
        drop(waiting);
        if let Some(task) = roused {
            task.wake();
        }
        result
    }

    /// Queues packets, counts those that they displace, and says what came of `source`'s. On a connection that has just
    /// ended they themselves count as dropped.
    pub(super) fn push(
        &self,
        now: Instant,
        source: NodePublic,
        packets: impl Iterator<Item = Bytes>,
        counters: &Atomics,
    ) -> Outcome {
        let (mut disco, mut data, mut outcome) = (0, 0, Outcome::default());
        let gone = self.put(|waiting| {
            if waiting.abandoned {
                return packets.count();
            }
            for payload in packets {
                let length = payload.len();
                let pushed = waiting.queue.push(now, source, payload);
                match pushed.lane {
                    Lane::Disco => disco += pushed.displaced,
                    Lane::Data => data += pushed.displaced,
                }
                outcome.add(length, &pushed);
            }
            0
        });
        counters.dropped_queue_disco.add(disco);
        counters.dropped_queue_data.add(data);
        counters.dropped_gone.add(gone as u64);
        outcome
    }

    pub(super) fn pong(&self, data: [u8; 8]) {
        self.put(|waiting| waiting.pong.get_or_insert(data).len());
    }

    pub(super) fn tell(&self, news: Frame) {
        self.put(|waiting| {
            if waiting.news.len() >= MAX_NEWS {
                waiting.news.pop_front();
            }
            waiting.news.push_back(news);
        });
    }

    /// Tells the client what is wrong, or with an empty text that nothing is any more. Only if it understands that.
    pub(super) fn notice(&self, text: &str) {
        let wrong = !text.is_empty();
        if self.guest.takes_notices && std::mem::replace(&mut self.waiting().noticed, wrong) != wrong {
            self.tell(Frame::Health(text.to_owned()));
        }
    }

    /// The client is another relay and wants to be told who comes and goes.
    pub(super) fn watch(&self, watch: Watch) {
        self.put(|waiting| waiting.watch = Some(Box::new(watch)));
    }

    /// Tells a watcher of a change.
    pub(super) fn tell_watcher(&self, change: impl FnOnce(&mut Watch)) {
        self.put(|waiting| waiting.watch.as_deref_mut().map_or((), change));
    }

    pub(super) fn set_home(&self, home: bool, counters: &Atomics) {
        let before = std::mem::replace(&mut self.waiting().home, home);
        match (before, home) {
            (false, true) => counters.homes.add(1),
            (true, false) => counters.homes.sub(1),
            (true, true) | (false, false) => {}
        }
    }

    /// Moves what waits into `out`, most urgent first, up to one unit. Whether it is full and more may wait.
    pub(super) fn fill(&self, now: Instant, out: &mut BytesMut, counters: &Atomics) -> bool {
        let mut waiting = self.waiting();
        let (mut frames, mut packets, mut bytes) = (0, 0, 0);
        let dropped = waiting.queue.displaced().data;
        if let Some(data) = waiting.pong.take() {
            Frame::Pong(data).encode(out);
            frames += 1;
        }
        while out.len() < FILL
            && let Some(news) = waiting.news.pop_front()
        {
            news.encode(out);
            frames += 1;
        }
        // After the news: an answer that a node is not here is older than what is known now.
        while out.len() < FILL
            && let Some(news) = waiting.watch.as_mut().and_then(|watch| watch.poll())
        {
            news.encode(out);
            frames += 1;
        }
        while out.len() < FILL
            && let Some(packet) = waiting.queue.pop(now)
        {
            bytes += packet.payload.len() as u64;
            packets += 1;
            Frame::RecvPacket { source: packet.node, payload: packet.payload }.encode(out);
        }
        // What is displaced by a packet is counted when that is put in.
        let dropped = waiting.queue.displaced().data - dropped;
        drop(waiting);
        counters.dropped_queue_data.add(dropped);
        counters.frames_out.add(frames + packets);
        counters.packets_out.add(packets);
        counters.bytes_out.add(bytes);
        out.len() >= FILL
    }

    /// The connection's task is about to sleep; `until_filled` if it has nothing to write.
    pub(super) fn sleep(&self, task: &Waker, until_filled: bool) -> Sleep {
        let mut waiting = self.waiting();
        if waiting.closing {
            return Sleep::Closing;
        }
        if until_filled && !waiting.is_empty() {
            return Sleep::Not;
        }
        waiting.asleep = until_filled;
        if !waiting.task.as_ref().is_some_and(|known| known.will_wake(task)) {
            waiting.task = Some(task.clone());
        }
        Sleep::Until
    }

    /// The client takes nothing, or does again: what waits meanwhile keeps no buffers of its senders'.
    pub(super) fn set_blocked(&self, blocked: bool) {
        self.waiting().queue.set_blocked(blocked);
    }

    /// Nothing has waited for long: gives back what the queue holds.
    pub(super) fn shrink(&self) {
        let mut waiting = self.waiting();
        waiting.queue.shrink();
        waiting.news.shrink_to_fit();
    }

    /// Throws away what waits and refuses more; says how many packets that were.
    pub(super) fn abandon(&self, counters: &Atomics) -> u64 {
        self.set_home(false, counters);
        let mut waiting = self.waiting();
        waiting.abandoned = true;
        waiting.task = None;
        waiting.queue.clear() as u64
    }

    /// Ends the connection together with all others.
    pub(super) fn close_with_all(&self) {
        self.waiting().closing_all = true;
        self.close();
    }

    /// Whether it was ended that way.
    pub(super) fn is_closed_with_all(&self) -> bool {
        self.waiting().closing_all
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        let mut waiting = self.waiting();
        waiting.closing = true;
        let task = waiting.task.take();
        drop(waiting);
        if let Some(task) = task {
            task.wake();
        }
    }
}

/// Whether a connection's task may sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sleep {
    /// It may, and will be woken.
    Until,
    /// No: something has been put in meanwhile.
    Not,
    /// No: the connection is to end.
    Closing,
}
