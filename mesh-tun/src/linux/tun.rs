//! The kernel's TUN device.
//!
//! With [`Offload`], the kernel hands over super-packets that were not cut into packets yet, and takes such: one system
//! call moves up to 64 KiB of one flow, and the host's network stack works once instead of 50 times. See
//! [`crate::offload`]. A kernel that has no such thing, or refuses a super-packet, is given single packets.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tun_rs::{DeviceBuilder, SyncDevice};

use super::wait::{Closer, Watch, Woken};
use super::{qdisc, sys};
use crate::Error;
use crate::batch::Batch;
use crate::device::{Device, Waits, closed};
use crate::offload::coalesce::{Group, MAX_JOINED};
use crate::offload::{self, Coalescer, Header, Segments};

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
    /// What the kernel and we do in fewer, larger packets; default [`Offload::Full`], and less where it knows less.
    pub offload: Offload,
    /// Queues to read, 1 to 256; default 1. With more, [`Device::queues`] has the others, and all have to be read. See
    /// [`super::queues`].
    pub queues: usize,
}

/// Which super-packets a TUN device moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Offload {
    /// None: one packet a call.
    Off,
    /// TCP.
    Tcp,
    /// TCP and UDP (Linux 6.2).
    Full,
}

impl Offload {
    fn mask(self) -> libc::c_uint {
        let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
        match self {
            Self::Off => 0,
            Self::Tcp => tcp,
            Self::Full => tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "mesh0".into(),
            mtu: DEFAULT_MTU,
            packet_size: None,
            queue_len: DEFAULT_QUEUE_LEN,
            offload: Offload::Full,
            queues: 1,
        }
    }
}

impl Config {
    /// The defaults under another name.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }
}

/// An open TUN device, or one of its further queues; the interface goes away with the last of them.
pub struct Tun {
    /// Read from.
    device: Arc<SyncDevice>,
    /// Written to: the same, or with several queues one for all that is not read.
    outlet: Arc<SyncDevice>,
    watch: Watch,
    shared: Arc<Interface>,
    name: String,
    index: u32,
    packet_size: usize,
    offload: Offload,
    queues: Vec<Arc<Self>>,
    /// Each locked once a batch.
    reader: Mutex<Reader>,
    writer: Mutex<Coalescer>,
}

/// What the queues of a device have in common and may change.
struct Interface {
    closer: Closer,
    mtu: AtomicUsize,
    refused: AtomicU64,
    /// Whether the kernel takes super-packets: some refuse good ones.
    joins: AtomicBool,
}

/// A super-packet on its way into batches.
struct Reader {
    /// Virtio header and packet.
    buffer: Box<[u8]>,
    /// What is left of the packet in `buffer`, and its end there.
    rest: Option<(Segments, usize)>,
}

impl Reader {
    /// Fills the batch from what is left; true once nothing is.
    fn take(&mut self, batch: &mut Batch, count: &mut usize, refused: &AtomicU64) -> bool {
        while let Some((segments, end)) = &mut self.rest {
            if segments.remaining() == 0 {
                self.rest = None;
                break;
            }
            let Some(mut vacant) = batch.vacant() else { return false };
            match segments.write_next(&self.buffer[offload::HEADER_LEN..*end], vacant.buffer()) {
                Some(Ok(len)) => {
                    vacant.commit(len);
                    *count += 1;
                }
                Some(Err(_)) => {
                    refused.fetch_add(1, Ordering::Relaxed);
                }
                None => self.rest = None,
            }
        }
        true
    }

    /// Looks at the `len` bytes read into `buffer`.
    fn begin(&mut self, len: usize, refused: &AtomicU64) {
        let read = self.buffer[..len].split_first_chunk::<{ offload::HEADER_LEN }>();
        let segments = read.and_then(|(header, packet)| Segments::new(Header::decode(header).ok()?, packet).ok());
        self.rest = segments.map(|segments| (segments, len));
        refused.fetch_add(u64::from(segments.is_none()), Ordering::Relaxed);
    }
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
        let build = |offload| {
            let builder = DeviceBuilder::new().name(name.as_str()).mtu(config.mtu).tx_queue_len(config.queue_len);
            builder.multi_queue(config.queues > 1).offload(offload).enable(false).build_sync()
        };
        let device = match build(config.offload != Offload::Off) {
            Err(error) if config.offload != Offload::Off && error.raw_os_error() == Some(libc::EINVAL) => build(false),
            built => built,
        };
        let device = device.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Error::NoTun,
            Some(libc::EBUSY) => Error::DeviceBusy { name: name.clone() },
            _ => Error::system(what(), error),
        })?;
        let finish = || {
            device.set_nonblocking(true)?;
            let others = (0..config.queues).filter(|_| config.queues > 1).map(|_| {
                let queue = device.try_clone()?;
                queue.set_nonblocking(true)?;
                Ok(Arc::new(queue))
            });
            let others = others.collect::<io::Result<Vec<_>>>()?;
            Ok::<_, io::Error>((others, Closer::new()?, device.name()?, device.if_index()?))
        };
        let (mut readers, closer, name, index) = finish().map_err(|error| Error::system(what(), error))?;
        if qdisc::is_blind() {
            // Refused, all works as well; only a full queue costs more.
            let _ = qdisc::remove(index);
        }
        let offload = match device.tcp_gso() {
            true => [Offload::Full, Offload::Tcp].into_iter().find(|offload| {
                *offload <= config.offload && sys::set_tun_offload(device.as_fd(), offload.mask()).is_ok()
            }),
            false => None,
        };
        let offload = offload.unwrap_or(Offload::Off);
        let outlet = Arc::new(device);
        let first = match readers.pop() {
            Some(reader) => {
                // The first one: the others then have the numbers from 0 on.
                sys::detach_tun_queue(outlet.as_fd()).map_err(|error| Error::system(what(), error))?;
                reader
            }
            None => Arc::clone(&outlet),
        };
        let shared = Arc::new(Interface {
            closer,
            mtu: AtomicUsize::new(config.mtu.into()),
            refused: AtomicU64::new(0),
            joins: AtomicBool::new(offload != Offload::Off),
        });
        let packet_size = config.packet_size.unwrap_or(config.mtu).max(config.mtu).into();
        let queue = |device: Arc<SyncDevice>, queues| {
            let buffer = vec![0; if device.tcp_gso() { offload::HEADER_LEN + offload::MAX_PACKET } else { 0 }].into();
            Ok::<_, io::Error>(Self {
                watch: Watch::new(device.as_fd(), &shared.closer)?,
                device,
                outlet: Arc::clone(&outlet),
                shared: Arc::clone(&shared),
                name: name.clone(),
                index,
                packet_size,
                offload,
                queues,
                reader: Mutex::new(Reader { buffer, rest: None }),
                writer: Mutex::default(),
            })
        };
        let others = readers.into_iter().map(|reader| queue(reader, Vec::new()).map(Arc::new));
        let whole = others.collect::<io::Result<_>>().and_then(|others| queue(first, others));
        whole.map_err(|error| Error::system(what(), error))
    }

    /// Which super-packets are moved: what was asked for, or less where the kernel knows less.
    #[must_use]
    pub fn offload(&self) -> Offload {
        self.offload
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
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Reads what is there without waiting.
    fn drain(&self, batch: &mut Batch) -> io::Result<usize> {
        if self.device.tcp_gso() { self.drain_super(batch) } else { self.drain_single(batch) }
    }

    fn drain_super(&self, batch: &mut Batch) -> io::Result<usize> {
        let mut count = 0;
        // What is left in a reader whose thread panicked is whole all the same.
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        while reader.take(batch, &mut count, &self.shared.refused) && !batch.is_full() {
            match rustix::io::read(&*self.device, &mut *reader.buffer) {
                Ok(0) => break,
                Ok(len) => reader.begin(len, &self.shared.refused),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                // EIO: the interface is down for the moment.
                Err(error) if count > 0 || error == rustix::io::Errno::IO => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(count)
    }

    fn drain_single(&self, batch: &mut Batch) -> io::Result<usize> {
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

    /// Writes packets with virtio headers, joined where they belong together.
    fn write_joined(&self, batch: &mut Batch) -> io::Result<usize> {
        let mut count = 0;
        let mut coalescer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        coalescer.plan(batch, self.offload == Offload::Full);
        for group in coalescer.groups() {
            if group.count() == 1 || !self.shared.joins.load(Ordering::Relaxed) {
                count += self.write_singly(batch, &coalescer, group)?;
                continue;
            }
            let (header, saved) = group.join(batch);
            let mut parts = [IoSlice::new(&[]); MAX_JOINED + 1];
            parts[0] = IoSlice::new(&header);
            let mut payload_at = 0;
            for (part, index) in parts[1..].iter_mut().zip(coalescer.packets(group)) {
                *part = IoSlice::new(&batch.packet(index)[payload_at..]);
                payload_at = group.payload_at();
            }
            match self.write_parts(&parts[..=group.count()]) {
                Ok(()) => count += group.count(),
                Err(rustix::io::Errno::INVAL) => {
                    // Some kernels refuse good super-packets: no more of them, and these as what they were.
                    self.shared.joins.store(false, Ordering::Relaxed);
                    group.restore(batch, &saved);
                    count += self.write_singly(batch, &coalescer, group)?;
                }
                Err(error) => self.refuse(error, group.count())?,
            }
        }
        Ok(count)
    }

    fn write_singly(&self, batch: &Batch, coalescer: &Coalescer, group: &Group) -> io::Result<usize> {
        let header = Header::SINGLE.encode();
        let mut count = 0;
        for index in coalescer.packets(group) {
            match self.write_parts(&[IoSlice::new(&header), IoSlice::new(batch.packet(index))]) {
                Ok(()) => count += 1,
                Err(error) => self.refuse(error, 1)?,
            }
        }
        Ok(count)
    }

    fn write_parts(&self, parts: &[IoSlice<'_>]) -> Result<(), rustix::io::Errno> {
        rustix::io::retry_on_intr(|| rustix::io::writev(&*self.outlet, parts)).map(drop)
    }

    /// Counts packets that the kernel did not take; an error if it will take none ever.
    fn refuse(&self, error: rustix::io::Errno, count: usize) -> io::Result<()> {
        if error == rustix::io::Errno::BADFD {
            return Err(error.into());
        }
        self.shared.refused.fetch_add(count as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Device for Tun {
    fn read_batch(&self, batch: &mut Batch, timeout: Duration) -> io::Result<usize> {
        let count = self.drain(batch)?;
        if count > 0 || batch.is_full() {
            return if self.shared.closer.is_closed() { Err(closed()) } else { Ok(count) };
        }
        if timeout.is_zero() {
            return if self.shared.closer.is_closed() { Err(closed()) } else { Ok(0) };
        }
        match self.watch.wait(timeout)? {
            Woken::Closed => Err(closed()),
            Woken::TimedOut => Ok(0),
            Woken::Ready => self.drain(batch),
        }
    }

    fn write_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        if self.device.tcp_gso() {
            return self.write_joined(batch);
        }
        let mut count = 0;
        for packet in batch.iter().filter(|packet| !packet.is_empty()) {
            match self.outlet.send(packet) {
                Ok(_) => count += 1,
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
                Err(_) => {
                    self.shared.refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(count)
    }

    fn mtu(&self) -> usize {
        self.shared.mtu.load(Ordering::Relaxed)
    }

    fn packet_size(&self) -> usize {
        self.packet_size
    }

    /// The MTU counts no further than the packet size.
    fn refresh(&self) -> io::Result<()> {
        let mtu = usize::from(self.device.mtu()?).min(self.packet_size);
        self.shared.mtu.store(mtu, Ordering::Relaxed);
        Ok(())
    }

    fn queues(&self) -> Vec<Arc<dyn Device>> {
        self.queues.iter().map(|queue| Arc::clone(queue) as Arc<dyn Device>).collect()
    }

    fn waits(&self) -> Option<&dyn Waits> {
        Some(self)
    }

    fn close(&self) {
        self.shared.closer.close();
    }
}

impl Waits for Tun {
    fn wait(&self, timeout: Duration) -> io::Result<()> {
        match self.watch.wait(timeout)? {
            Woken::Closed => Err(closed()),
            Woken::Ready | Woken::TimedOut => Ok(()),
        }
    }

    fn hush(&self, hushed: bool) {
        // Changing what is watched for fails only if it is not watched, and it is from the beginning.
        let _ = self.watch.hush(self.device.as_fd(), hushed);
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
