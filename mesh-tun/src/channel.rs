//! A pair of devices in memory: what is written to one is read from the other.
//!
//! For tests, and for programs that bring their own IP stack.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::batch::Batch;
use crate::device::{Device, closed};

/// Two connected devices with queues of `capacity` packets each way.
///
/// A packet that finds the queue full is dropped and counted by the writer's [`ChannelDevice::dropped`].
#[must_use]
pub fn pair(mtu: usize, capacity: usize) -> (ChannelDevice, ChannelDevice) {
    let (left, right) = (Arc::new(Queue::new(capacity)), Arc::new(Queue::new(capacity)));
    (
        ChannelDevice { mtu, incoming: Arc::clone(&left), outgoing: Arc::clone(&right) },
        ChannelDevice { mtu, incoming: right, outgoing: left },
    )
}

/// One end of an in-memory [`pair`].
#[derive(Debug)]
pub struct ChannelDevice {
    mtu: usize,
    incoming: Arc<Queue>,
    outgoing: Arc<Queue>,
}

impl ChannelDevice {
    /// Hands one packet to the other end; false if it was dropped: no room, longer than the MTU, or closed.
    #[must_use]
    pub fn send(&self, packet: &[u8]) -> bool {
        if packet.len() > self.mtu {
            self.outgoing.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let sent = self.outgoing.lock().push(packet, &self.outgoing.dropped);
        self.outgoing.filled.notify_one();
        sent
    }

    /// The next packet from the other end; none once `timeout` has passed or the pair is closed.
    #[must_use]
    pub fn recv(&self, timeout: Duration) -> Option<Vec<u8>> {
        self.incoming.wait(timeout).packets.pop_front()
    }

    /// How many packets this end has dropped on their way to the other.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.outgoing.dropped.load(Ordering::Relaxed)
    }
}

impl Device for ChannelDevice {
    fn read_batch(&self, batch: &mut Batch, timeout: Duration) -> io::Result<usize> {
        let before = batch.len();
        if batch.is_full() {
            return Ok(0);
        }
        let mut queue = self.incoming.wait(timeout);
        if queue.closed {
            return Err(closed());
        }
        while !batch.is_full() {
            let Some(packet) = queue.packets.pop_front() else { break };
            if !batch.push(&packet) {
                self.incoming.dropped.fetch_add(1, Ordering::Relaxed);
            }
            queue.recycle(packet);
        }
        Ok(batch.len() - before)
    }

    fn write_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        let mut queue = self.outgoing.lock();
        if queue.closed {
            return Err(closed());
        }
        let mut taken = 0;
        for packet in batch.iter().filter(|packet| !packet.is_empty()) {
            taken += usize::from(queue.push(packet, &self.outgoing.dropped));
        }
        drop(queue);
        self.outgoing.filled.notify_one();
        Ok(taken)
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn close(&self) {
        self.incoming.close();
        self.outgoing.close();
    }
}

/// One direction.
#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct State {
    packets: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    capacity: usize,
    closed: bool,
}

impl Queue {
    fn new(capacity: usize) -> Self {
        let state = State { packets: VecDeque::with_capacity(capacity), spare: Vec::new(), capacity, closed: false };
        Self { state: Mutex::new(state), filled: Condvar::new(), dropped: AtomicU64::new(0) }
    }

    /// A queue of bytes is whole at every moment, so a writer that panicked leaves nothing to distrust.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, timeout: Duration) -> MutexGuard<'_, State> {
        let empty = |state: &mut State| state.packets.is_empty() && !state.closed;
        self.filled.wait_timeout_while(self.lock(), timeout, empty).unwrap_or_else(PoisonError::into_inner).0
    }

    fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_all();
    }
}

impl State {
    fn push(&mut self, packet: &[u8], dropped: &AtomicU64) -> bool {
        if self.closed || self.packets.len() == self.capacity {
            dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let mut owned = self.spare.pop().unwrap_or_default();
        owned.clear();
        owned.extend_from_slice(packet);
        self.packets.push_back(owned);
        true
    }

    fn recycle(&mut self, packet: Vec<u8>) {
        if self.spare.len() < self.capacity {
            self.spare.push(packet);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn what_one_end_writes_the_other_reads_in_order() {
        let (left, right) = pair(1280, 8);
        let mut out = Batch::new(4, 1280);
        for packet in [b"a".as_slice(), b"", b"b"] {
            assert!(out.push(packet));
        }
        assert_eq!(left.write_batch(&mut out).unwrap(), 2, "empty packets are passed over");
        let mut read = Batch::new(4, 1280);
        assert_eq!(right.read_batch(&mut read, SOON).unwrap(), 2);
        assert_eq!(read.iter().collect::<Vec<_>>(), [b"a", b"b"]);
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (left, right) = pair(1280, 1);
        assert!(left.send(b"first"));
        assert!(!left.send(b"second"));
        assert!(!left.send(&[0; 1281]), "longer than the MTU");
        assert_eq!(left.dropped(), 2);
        assert_eq!(right.recv(SOON).unwrap(), b"first");
    }

    #[test]
    fn closing_wakes_a_blocked_reader() {
        let (left, right) = pair(1280, 1);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| right.read_batch(&mut Batch::new(1, 1280), Duration::from_secs(3600)));
            left.close();
            assert_eq!(reader.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        });
    }

    #[test]
    fn an_idle_read_returns_after_its_timeout() {
        let (left, _right) = pair(1280, 1);
        assert_eq!(left.read_batch(&mut Batch::new(1, 1280), Duration::from_millis(1)).unwrap(), 0);
    }
}
