//! The stack's side of the cable.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh_tun::batch::Batch;
use mesh_tun::device::{Device, closed};

use super::driver::Shared;

/// Where the data plane reads the stack's packets and writes those of peers; clones share it.
#[derive(Clone, Debug)]
pub struct StackDevice {
    shared: Arc<Shared>,
}

impl StackDevice {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Hands packets to the stack; those beyond [`Config::receive_queue`](super::Config::receive_queue) are dropped and
    /// counted. Says how many were taken.
    pub fn send(&self, packets: impl IntoIterator<Item = Vec<u8>>) -> usize {
        self.shared.deliver(&mut packets.into_iter())
    }

    /// Waits up to `timeout` for packets from the stack and gives up to `limit` of them to `sink`; `None` once the stack
    /// has ended. Blocks the thread.
    pub fn recv(&self, limit: usize, timeout: Duration, mut sink: impl FnMut(Vec<u8>)) -> Option<usize> {
        self.shared.collect(limit, timeout, &mut sink)
    }
}

impl Device for StackDevice {
    fn read_batch(&self, batch: &mut Batch, timeout: Duration) -> io::Result<usize> {
        let room = batch.capacity().saturating_sub(batch.len());
        if room == 0 {
            return Ok(0);
        }
        let mut added = 0;
        let read = self.recv(room, timeout, |packet| added += usize::from(batch.push(&packet)));
        read.map(|_| added).ok_or_else(closed)
    }

    fn write_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        if self.shared.is_closed() {
            return Err(closed());
        }
        Ok(self.send(batch.iter().filter(|packet| !packet.is_empty()).map(<[u8]>::to_vec)))
    }

    fn mtu(&self) -> usize {
        self.shared.mtu()
    }

    fn close(&self) {
        self.shared.close();
    }
}
