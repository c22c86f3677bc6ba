//! What waits to be written to one client.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_noise::key::NodePublic;
use tokio::sync::Notify;

use super::counters::Atomics;
use crate::driver::now;
use crate::frame::Frame;
use crate::queue::{Depth, Lane, PacketQueue, Pushed};

/// How much is handed to the socket at once: four TLS records.
const BATCH: usize = 64 * 1024;
/// Frames about other nodes that may wait; beyond that the oldest goes. A client does not rely on hearing of every
/// departure.
const MAX_NEWS: usize = 256;

#[derive(Debug)]
struct Waiting {
    queue: PacketQueue,
    /// Only one ping is answered at a time.
    pong: Option<[u8; 8]>,
    news: VecDeque<Frame>,
    home: bool,
    abandoned: bool,
}

/// Everything that waits to be written to one client, filled by other clients' readers and emptied by its writer.
#[derive(Debug)]
pub(super) struct Outlet {
    node: NodePublic,
    waiting: Mutex<Waiting>,
    ready: Notify,
    close: Notify,
    closing: AtomicBool,
}

impl Outlet {
    pub(super) fn new(node: NodePublic, depth: Depth) -> Self {
        let queue = PacketQueue::new(depth);
        let waiting = Waiting { queue, pong: None, news: VecDeque::new(), home: false, abandoned: false };
        Self {
            node,
            waiting: Mutex::new(waiting),
            ready: Notify::new(),
            close: Notify::new(),
            closing: AtomicBool::new(false),
        }
    }

    pub(super) const fn node(&self) -> &NodePublic {
        &self.node
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a packet; says what came of it. On a connection that has just ended the packet itself counts as displaced.
    pub(super) fn push(&self, source: NodePublic, payload: Bytes) -> Pushed {
        let mut waiting = self.waiting();
        if waiting.abandoned {
            return Pushed { lane: Lane::of(&payload), displaced: 1, own_dropped: 1, stuck: Duration::ZERO };
        }
        let pushed = waiting.queue.push(now(), source, payload);
        drop(waiting);
        self.ready.notify_one();
        pushed
    }

    pub(super) fn pong(&self, data: [u8; 8]) {
        self.waiting().pong.get_or_insert(data);
        self.ready.notify_one();
    }

    pub(super) fn tell(&self, news: Frame) {
        let mut waiting = self.waiting();
        if waiting.news.len() >= MAX_NEWS {
            waiting.news.pop_front();
        }
        waiting.news.push_back(news);
        drop(waiting);
        self.ready.notify_one();
    }

    pub(super) fn set_home(&self, home: bool, counters: &Atomics) {
        let before = std::mem::replace(&mut self.waiting().home, home);
        match (before, home) {
            (false, true) => counters.homes.add(1),
            (true, false) => counters.homes.sub(1),
            (true, true) | (false, false) => {}
        }
    }

    /// Waits until there may be something to write.
    pub(super) async fn ready(&self) {
        self.ready.notified().await;
    }

    /// Moves what waits into `out`, most urgent first, up to one batch.
    pub(super) fn fill(&self, out: &mut BytesMut, counters: &Atomics) {
        let mut waiting = self.waiting();
        let (mut frames, mut packets, mut bytes) = (0, 0, 0);
        let dropped = waiting.queue.displaced().data;
        if let Some(data) = waiting.pong.take() {
            Frame::Pong(data).encode(out);
            frames += 1;
        }
        while out.len() < BATCH
            && let Some(news) = waiting.news.pop_front()
        {
            news.encode(out);
            frames += 1;
        }
        let now = now();
        while out.len() < BATCH
            && let Some(packet) = waiting.queue.pop(now)
        {
            bytes += packet.payload.len() as u64;
            packets += 1;
            Frame::RecvPacket { source: packet.node, payload: packet.payload }.encode(out);
        }
        // What is displaced by a packet is counted when that is put in.
        counters.dropped_queue_data.add(waiting.queue.displaced().data - dropped);
        drop(waiting);
        counters.frames_out.add(frames + packets);
        counters.packets_out.add(packets);
        counters.bytes_out.add(bytes);
    }

    /// Throws away what waits and refuses more; says how many packets that were.
    pub(super) fn abandon(&self, counters: &Atomics) -> u64 {
        self.set_home(false, counters);
        let mut waiting = self.waiting();
        waiting.abandoned = true;
        waiting.queue.clear() as u64
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.close.notify_one();
    }

    /// Waits until [`Outlet::close`].
    pub(super) async fn closed(&self) {
        while !self.closing.load(Ordering::Acquire) {
            self.close.notified().await;
        }
    }
}
