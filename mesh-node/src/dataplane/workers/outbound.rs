//! A batch to be sealed and sent.

use std::ops::Range;
use std::sync::Arc;

use mesh_noise::wireguard::Session;
use mesh_tun::batch::Batch;
use mesh_tun::linux::udp::Outgoing;

use super::super::Shared;
use super::super::peer::PeerCell;
use super::super::transmit::{Dispatch, seal_run};
use super::Job;

/// Packets of one batch for one peer, with their counters.
pub(in crate::dataplane) struct Run {
    pub(in crate::dataplane) peer: Arc<PeerCell>,
    pub(in crate::dataplane) session: Arc<Session>,
    /// The first packet's counter.
    pub(in crate::dataplane) first: u64,
    pub(in crate::dataplane) range: Range<usize>,
    /// The length of the sealed datagrams.
    pub(in crate::dataplane) bytes: usize,
}

/// A batch from one queue of the device.
pub(in crate::dataplane) struct Outbound {
    pub(in crate::dataplane) queue: usize,
    pub(in crate::dataplane) batch: Batch,
    pub(in crate::dataplane) runs: Vec<Run>,
    outgoing: Vec<Vec<Outgoing>>,
}

impl Outbound {
    pub(in crate::dataplane) fn new(shared: &Shared, queue: usize) -> Self {
        let batch = shared.new_batch();
        let runs = Vec::with_capacity(batch.capacity());
        let outgoing = shared.sockets.load().iter().map(|_| Vec::with_capacity(batch.capacity())).collect();
        Self { queue, batch, runs, outgoing }
    }
}

impl Job for Outbound {
    fn work(&mut self, shared: &Shared) {
        let mtu = shared.device.mtu();
        for run in &mut self.runs {
            let limit = mtu.min(run.peer.limit());
            run.bytes = seal_run(&mut self.batch, &run.session, run.first, run.range.clone(), limit);
        }
    }

    fn release(&mut self, shared: &Shared) {
        let sockets = shared.sockets.load();
        let mut dispatch = Dispatch::new(shared, self.queue, &mut self.batch, &sockets, &mut self.outgoing);
        let now_ms = shared.now_ms();
        // Keys are not kept for longer than they are of use.
        for run in self.runs.drain(..) {
            dispatch.forward_run(&run.peer, &run.session, run.range, run.bytes, now_ms);
        }
        dispatch.flush();
    }
}
