//! A batch to be opened, judged and written to the device.

use std::sync::Arc;

use mesh_tun::batch::Batch;
use mesh_tun::linux::udp::RecvBatch;

use super::super::receive::{Opened, Opener, Origin};
use super::super::sessions::SessionCell;
use super::super::{BATCH, Shared};
use super::Job;

/// A batch from one socket.
pub(in crate::dataplane) struct Inbound {
    pub(in crate::dataplane) number: usize,
    pub(in crate::dataplane) room: RecvBatch,
    pub(in crate::dataplane) origins: Vec<Origin>,
    sessions: Vec<Arc<SessionCell>>,
    opened: Vec<Opened>,
}

impl Inbound {
    pub(in crate::dataplane) fn new(number: usize, room: RecvBatch) -> Self {
        let (origins, sessions, opened) =
            (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
        Self { number, room, origins, sessions, opened }
    }

    /// Lends the lists to an opener.
    fn with(&mut self, shared: &Shared, step: impl FnOnce(&mut Opener<'_>, &mut Batch, &[Origin])) {
        let (sessions, opened) = (std::mem::take(&mut self.sessions), std::mem::take(&mut self.opened));
        let mut opener = Opener { shared, number: self.number, sessions, opened };
        step(&mut opener, self.room.batch_mut(), &self.origins);
        (self.sessions, self.opened) = (opener.sessions, opener.opened);
    }
}

impl Job for Inbound {
    fn work(&mut self, shared: &Shared) {
        self.with(shared, |opener, batch, origins| opener.open_all(batch, origins));
    }

    fn release(&mut self, shared: &Shared) {
        self.with(shared, |opener, batch, origins| opener.pass(batch, origins));
    }
}
