//! The stack's side of the cable.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh_tun::batch::Batch;
use mesh_tun::device::{Device, Waits, closed};

use super::driver::Shared;
use super::parcel::LONGEST;

/// Where the data plane reads the stack's packets and writes those of peers; clones share it.
///
/// Packets are worked on by the thread that brings them: [`Device::write_batch`] joins what follows in order in a flow,
/// hands it to its socket, and queues the answers. Nothing waits between the two, and nothing is dropped for lack of room.
#[derive(Clone, Debug)]
pub struct StackDevice {
    shared: Arc<Shared>,
}

impl StackDevice {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Hands packets to the stack one by one, and says how many; [`Device::write_batch`] is the faster way.
    pub fn send(&self, packets: impl IntoIterator<Item = Vec<u8>>) -> usize {
        self.shared.deliver(&mut packets.into_iter())
    }

    /// Waits up to `timeout` for packets from the stack and gives up to `limit` of them to `sink`; `None` once the stack
    /// has ended. Blocks the thread. [`Device::read_batch`] is the faster way.
    pub fn recv(&self, limit: usize, timeout: Duration, mut sink: impl FnMut(Vec<u8>)) -> Option<usize> {
        let mut room = vec![0; LONGEST];
        self.shared.collect(limit, timeout, &mut |cutting| {
            let Some(len) = cutting.write_next(&mut room) else { return false };
            sink(room.get(..len).unwrap_or_default().to_vec());
            true
        })
    }
}

impl Device for StackDevice {
    fn read_batch(&self, batch: &mut Batch, timeout: Duration) -> io::Result<usize> {
        let room = batch.capacity().saturating_sub(batch.len());
        if room == 0 {
            return Ok(0);
        }
        let read = self.shared.collect(room, timeout, &mut |cutting| {
            let Some(mut slot) = batch.vacant() else { return false };
            let Some(len) = cutting.write_next(slot.buffer()) else { return false };
            slot.commit(len);
            true
        });
        read.ok_or_else(closed)
    }

    fn write_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        self.shared.deliver_batch(batch).ok_or_else(closed)
    }

    fn mtu(&self) -> usize {
        self.shared.mtu()
    }

    fn waits(&self) -> Option<&dyn Waits> {
        Some(self)
    }

    fn close(&self) {
        self.shared.close();
    }
}

/// What the stack answers to packets is sent by the thread that brought them.
impl Waits for StackDevice {
    fn wait(&self, timeout: Duration) -> io::Result<()> {
        self.shared.wait_for_packets(timeout);
        Ok(())
    }

    fn hush(&self, hushed: bool) {
        self.shared.hush(hushed);
    }

    fn lend(&self, read: Box<dyn Fn() -> bool + Send + Sync>) {
        self.shared.set_pump(read);
    }
}
