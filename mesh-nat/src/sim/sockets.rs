//! The sockets that are open on a host.

use std::collections::BTreeMap;

use crate::path::{Family, SocketId};

/// The first port of those that are given to sockets that ask for none.
const FIRST_EPHEMERAL: u16 = 49_152;

/// The open sockets of a host.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub(super) open: BTreeMap<SocketId, (Family, u16)>,
    pub(super) by_port: BTreeMap<(Family, u16), SocketId>,
    next: u16,
    next_port: u16,
}

impl Sockets {
    pub(super) fn open(&mut self, family: Family, port: u16) -> SocketId {
        let mut port = port;
        while port == 0 || self.by_port.contains_key(&(family, port)) {
            port = FIRST_EPHEMERAL + self.next_port;
            self.next_port = (self.next_port + 1) % (u16::MAX - FIRST_EPHEMERAL);
        }
        let id = SocketId(self.next);
        self.next = self.next.wrapping_add(1);
        self.open.insert(id, (family, port));
        self.by_port.insert((family, port), id);
        id
    }

    pub(super) fn close(&mut self, id: SocketId) {
        if let Some(held) = self.open.remove(&id) {
            self.by_port.remove(&held);
        }
    }

    pub(super) fn port(&self, id: SocketId) -> Option<u16> {
        self.open.get(&id).map(|(_, port)| *port)
    }
}
