//! The kernel's TUN device.
//!
//! Packets are read one a call without a virtio header; [`Device`]'s batches leave room for segmentation offloads.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tun_rs::{DeviceBuilder, SyncDevice};

use super::wait::{Closer, Woken};
use crate::Error;
use crate::batch::Batch;
use crate::device::{Device, closed};

/// Packets the kernel may queue for us to read, unless set otherwise: at 1280 bytes and 1 Gbit/s about 5 ms.
pub const DEFAULT_QUEUE_LEN: u32 = 500;

/// The MTU that every path carries (RFC 8200 §5), so that nothing inside the tunnel needs fragments.
pub const DEFAULT_MTU: u16 = 1280;

/// How a TUN device is made. The defaults run well.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// The interface name, 1 to 15 bytes; default `mesh0`. A `%d` in it is replaced by the first free number.
    pub name: String,
    /// The largest packet in bytes; default 1280.
    pub mtu: u16,
    /// The largest packet that slots have room for, if the administrator may raise the MTU later; default the MTU.
    pub packet_size: Option<u16>,
    /// Packets that wait in the kernel while we are busy; default [`DEFAULT_QUEUE_LEN`].
    pub queue_len: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { name: "mesh0".into(), mtu: DEFAULT_MTU, packet_size: None, queue_len: DEFAULT_QUEUE_LEN }
    }
}

impl Config {
    /// The defaults under another name.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }
}

/// An open TUN device; the interface goes away with it.
pub struct Tun {
    device: SyncDevice,
    closer: Closer,
    name: String,
    index: u32,
    mtu: AtomicUsize,
    packet_size: usize,
    refused: AtomicU64,
}

impl Tun {
    /// Makes the interface, without addresses and down: see [`crate::plan`] for the rest.
    ///
    /// # Errors
    /// [`Error::NoPermission`], [`Error::NoTun`], [`Error::DeviceBusy`] and [`Error::BadName`] say what to do.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let name = &config.name;
        if name.is_empty() || name.len() > 15 || name.contains(|c: char| c == '/' || c.is_whitespace()) {
            return Err(Error::BadName { name: name.clone() });
        }
        let what = || format!("create the TUN device {name}");
        let device = DeviceBuilder::new()
            .name(name.as_str())
            .mtu(config.mtu)
            .tx_queue_len(config.queue_len)
            .offload(false)
            .enable(false)
            .build_sync()
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::NoTun,
                Some(libc::EBUSY) => Error::DeviceBusy { name: name.clone() },
                _ => Error::system(what(), error),
            })?;
        let finish = || {
            device.set_nonblocking(true)?;
            Ok::<_, io::Error>((Closer::new()?, device.name()?, device.if_index()?))
        };
        let (closer, name, index) = finish().map_err(|error| Error::system(what(), error))?;
        let mtu = AtomicUsize::new(config.mtu.into());
        let packet_size = config.packet_size.unwrap_or(config.mtu).max(config.mtu).into();
        Ok(Self { device, closer, name, index, mtu, packet_size, refused: AtomicU64::new(0) })
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// How many packets the kernel did not take: malformed, or the interface is down.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Reads what is there without waiting.
    fn drain(&self, batch: &mut Batch) -> io::Result<usize> {
        let mut count = 0;
        while let Some(mut vacant) = batch.vacant() {
            match self.device.recv(vacant.buffer()) {
                Ok(0) => break,
                Ok(len) => {
                    vacant.commit(len);
                    count += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EIO: the interface is down for the moment.
                Err(error) if count > 0 || error.raw_os_error() == Some(libc::EIO) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(count)
    }
}

impl Device for Tun {
    fn read_batch(&self, batch: &mut Batch, timeout: Duration) -> io::Result<usize> {
        let count = self.drain(batch)?;
        if count > 0 || batch.is_full() {
            return if self.closer.is_closed() { Err(closed()) } else { Ok(count) };
        }
        match self.closer.readable(self.device.as_fd(), timeout)? {
            Woken::Closed => Err(closed()),
            Woken::TimedOut => Ok(0),
            Woken::Ready => self.drain(batch),
        }
    }

    fn write_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        let mut count = 0;
        for packet in batch.iter().filter(|packet| !packet.is_empty()) {
            match self.device.send(packet) {
                Ok(_) => count += 1,
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
                Err(_) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(count)
    }

    fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed)
    }

    fn packet_size(&self) -> usize {
        self.packet_size
    }

    /// The MTU counts no further than the packet size.
    fn refresh(&self) -> io::Result<()> {
        let mtu = usize::from(self.device.mtu()?).min(self.packet_size);
        self.mtu.store(mtu, Ordering::Relaxed);
        Ok(())
    }

    fn close(&self) {
        self.closer.close();
    }
}

impl std::fmt::Debug for Tun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tun").field("name", &self.name).field("index", &self.index).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", "sixteen-bytes-xx", "a/b", "a b"] {
            assert!(matches!(Tun::open(&Config::named(name)), Err(Error::BadName { .. })), "{name:?}");
        }
    }
}
