//! A TUN device with MagicDNS behind it: packets for the service addresses do not reach the data plane.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mesh_tun::batch::Batch;
use mesh_tun::device::{Device, Waits};

use crate::dns::{Interceptor, Names, is_service_packet};

/// Answers written to the device in one go.
const BATCH: usize = 64;
/// How long the answering thread waits before it looks whether it is still wanted; an end wakes it at once.
const IDLE: Duration = Duration::from_secs(10);

/// A device without the packets that this host's resolver exchanges with 100.100.100.100.
#[derive(Debug)]
pub(super) struct ServiceDevice {
    inner: Arc<dyn Device>,
    interceptor: Arc<Interceptor>,
}

impl ServiceDevice {
    /// Answers with `names` what is asked through `inner`.
    pub(super) fn start(inner: Arc<dyn Device>, names: &Names) -> io::Result<Self> {
        let interceptor = Arc::new(Interceptor::start(names, inner.mtu())?);
        let (answers, device) = (interceptor.device(), Arc::clone(&inner));
        std::thread::Builder::new().name("mesh-dns".into()).spawn(move || {
            let mut batch = Batch::new(BATCH, device.packet_size());
            loop {
                batch.clear();
                let read = answers.recv(BATCH, IDLE, |packet| {
                    // The stack's packets fit the device: it has the same MTU.
                    batch.push(&packet);
                });
                if read.is_none() || device.write_batch(&mut batch).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { inner, interceptor })
    }
}

impl Device for ServiceDevice {
    fn read_batch(&self, batch: &mut Batch, timeout: Duration) -> io::Result<usize> {
        let before = batch.len();
        let read = self.inner.read_batch(batch, timeout)?;
        for index in before..batch.len() {
            if is_service_packet(batch.packet(index)) {
                self.interceptor.take(batch.packet(index));
                batch.discard(index);
            }
        }
        Ok(read)
    }

    fn write_batch(&self, batch: &mut Batch) -> io::Result<usize> {
        self.inner.write_batch(batch)
    }

    fn mtu(&self) -> usize {
        self.inner.mtu()
    }

    fn packet_size(&self) -> usize {
        self.inner.packet_size()
    }

    fn queues(&self) -> Vec<Arc<dyn Device>> {
        let queue = |inner| Arc::new(Self { inner, interceptor: Arc::clone(&self.interceptor) }) as Arc<dyn Device>;
        self.inner.queues().into_iter().map(queue).collect()
    }

    fn waits(&self) -> Option<&dyn Waits> {
        self.inner.waits()
    }

    fn close(&self) {
        self.inner.close();
        self.interceptor.device().close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_tun::channel;

    /// An IPv4 packet with nothing but addresses in it.
    fn packet(to: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[3] = 20;
        packet[16..20].copy_from_slice(&to);
        packet
    }

    #[tokio::test]
    async fn packets_for_the_service_address_do_not_reach_the_data_plane() {
        let (host, device) = channel::pair(1280, 16);
        let service = ServiceDevice::start(Arc::new(device), &Names::default()).unwrap();
        let mut batch = Batch::new(4, 1280);
        batch.push(&packet([100, 100, 100, 100]));
        batch.push(&packet([100, 64, 0, 2]));
        host.write_batch(&mut batch).unwrap();
        let mut read = Batch::new(4, 1280);
        service.read_batch(&mut read, Duration::from_secs(1)).unwrap();
        let left: Vec<_> = read.iter().filter(|packet| !packet.is_empty()).collect();
        assert_eq!(left, [packet([100, 64, 0, 2])]);
        service.close();
    }
}
