//! Where packets come from and go to: a TUN device, a userspace stack, or memory.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::batch::Batch;

/// A source and sink of IP packets, used by plain threads in batches.
///
/// One thread reads and any number write; a device may allow more readers. Every packet is one whole IPv4 or IPv6 packet
/// without link-layer header.
pub trait Device: Send + Sync + Debug {
    /// Appends packets to `batch`, waiting up to `timeout` for the first one, and returns how many were added.
    ///
    /// 0 means that `timeout` passed, or that `batch` was full.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`] for good after [`Device::close`]; anything else if the device failed.
    fn read_batch(&self, batch: &mut Batch, timeout: Duration) -> io::Result<usize>;

    /// Writes the packets of `batch` in order, passing over empty ones, and returns how many were taken.
    ///
    /// A packet that the device has no room for, or does not like, is dropped and counted by the device. The bytes of
    /// `batch` are unspecified afterwards, the room before each packet included.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`] for good after [`Device::close`]; anything else if the device failed.
    fn write_batch(&self, batch: &mut Batch) -> io::Result<usize>;

    /// The largest packet in bytes that is read or should be written.
    fn mtu(&self) -> usize;

    /// The largest packet in bytes that slots should have room for; above [`Device::mtu`] if that may rise later.
    fn packet_size(&self) -> usize {
        self.mtu()
    }

    /// Looks again at what an administrator may have changed, the MTU; to be called now and then where that matters.
    ///
    /// # Errors
    /// If the device is gone.
    fn refresh(&self) -> io::Result<()> {
        Ok(())
    }

    /// Further queues of the same device; none by default.
    ///
    /// What is read from one queue is not read from another, and all packets of a flow are read from the same one. So
    /// whoever calls this reads each queue, and the device itself, by a thread of its own. Any queue may be written to.
    /// They close together.
    fn queues(&self) -> Vec<Arc<dyn Device>> {
        Vec::new()
    }

    /// How to wait for packets apart from reading them, if the device can.
    fn waits(&self) -> Option<&dyn Waits> {
        None
    }

    /// Ends the device for all threads: blocked readers wake at once.
    fn close(&self);
}

/// A device whose readers wait without reading, so that whoever is awake may read.
///
/// A thread that writes often makes the device readable by that: the host answers at once. It then reads the answer
/// itself, sooner than another thread would wake up.
pub trait Waits {
    /// Returns once there may be a packet to read, or after `timeout`.
    ///
    /// # Errors
    /// As [`Device::read_batch`].
    fn wait(&self, timeout: Duration) -> io::Result<()>;

    /// Leaves those who wait asleep although packets come, or no longer. Whoever hushes a device reads from it, and
    /// always takes the hush off again: what is left then wakes those who wait.
    fn hush(&self, hushed: bool);

    /// Has `read` called by threads that have made the device readable, while readers wait. It reads what there is and
    /// says so, or says that it may not, and the readers are woken. By default it is never called.
    fn lend(&self, read: Box<dyn Fn() -> bool + Send + Sync>) {
        drop(read);
    }
}

/// The error that a closed device answers with.
#[must_use]
pub fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the device is closed")
}
