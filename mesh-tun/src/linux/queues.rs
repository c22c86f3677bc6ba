//! How many threads a machine has work for on one path.
//!
//! Where there are cores to spare, the TUN device has several queues and each address several sockets, so that flows
//! spread over threads. Nothing is shared between two threads of a kind, and the order inside a flow stays:
//!
//! ```text
//!   TUN    the kernel hashes a packet's addresses and ports ─► always the same queue ─► its TX thread
//!   UDP    the kernel hashes sender and receiver            ─► always the same socket ─► its RX thread
//! ```
//!
//! The kernel would also learn from what is *written* to a queue, and move a flow to the queue that its answers were
//! written to: packets still in the old one would be overtaken. So packets are written by a descriptor of its own whose
//! queue is detached: it learns nothing from that one (`tun_get_user` in `drivers/net/tun.c`).

use std::num::NonZero;

/// The most queues and sockets asked for: their buffers cost memory, and a link is full before.
pub const MAX_QUEUES: usize = 8;

/// Queues for this machine: one on up to two cores (one thread each way fills them), else half as many as cores, up to
/// [`MAX_QUEUES`].
#[must_use]
pub fn for_this_machine() -> usize {
    for_cores(cores())
}

/// The cores that this process may run on; 1 if the system does not say.
#[must_use]
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

fn for_cores(cores: usize) -> usize {
    (cores / 2).clamp(1, MAX_QUEUES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_machines_have_one_queue_and_large_ones_eight() {
        assert_eq!([1, 2, 3, 4, 6, 16, 128].map(for_cores), [1, 1, 1, 2, 3, 8, 8]);
    }
}
