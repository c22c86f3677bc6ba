//! DNS where packets go through a TUN device: this host's resolver sends to 100.100.100.100, and nobody is there.
//!
//! A small stack of its own takes the packets for the service addresses, and so answers UDP and TCP, echo requests and
//! closed ports alike. The data plane asks [`is_service_packet`] of what it reads from the TUN device, gives those
//! packets to [`Interceptor::take`], and writes what [`Interceptor::device`] reads back to the TUN device.
//!
//! ```text
//!  resolver ─► TUN ─► data plane ──┬─► peers
//!                ▲                 └─► take ─► Netstack with the service addresses ─► serve
//!                └───────────── device().recv ◄──────┘
//! ```

use std::io;

use crate::netstack::{self, Netstack, SERVICE_V4, SERVICE_V6, StackDevice};

use super::{Names, serve};

/// Buffers of one TCP connection: DNS messages are at most 64 KiB.
const BUFFER: usize = 64 * 1024;
/// TCP connections at a time.
const MAX_CONNECTIONS: usize = 128;

/// Whether `packet` is for one of the service addresses, which no peer has.
pub fn is_service_packet(packet: &[u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => packet.get(16..20) == Some(SERVICE_V4.octets().as_slice()),
        Some(6) => packet.get(24..40) == Some(SERVICE_V6.octets().as_slice()),
        _ => false,
    }
}

/// The service addresses of a host with a TUN device. Dropping it ends the service.
#[derive(Debug)]
pub struct Interceptor {
    netstack: Netstack,
    device: StackDevice,
}

impl Interceptor {
    /// Starts answering with `names`; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the system gives no thread for the stack.
    pub fn start(names: &Names, mtu: usize) -> io::Result<Self> {
        let mut config = netstack::Config::with_addresses([SERVICE_V4.into(), SERVICE_V6.into()]);
        config.mtu = mtu;
        (config.receive_buffer, config.send_buffer) = (BUFFER, BUFFER);
        config.max_connections = MAX_CONNECTIONS;
        let (netstack, device) = Netstack::start(config)?;
        for address in [SERVICE_V4.into(), SERVICE_V6.into()] {
            let service = serve(&netstack, address, names)?;
            tokio::spawn(async move {
                if let Err(error) = service.await {
                    tracing::debug!(%address, %error, "DNS service ended");
                }
            });
        }
        Ok(Self { netstack, device })
    }

    /// Takes one packet for a service address; false when it was dropped for lack of room.
    pub fn take(&self, packet: &[u8]) -> bool {
        self.device.send([packet.to_vec()]) == 1
    }

    /// Where the answers are read, by a thread of the data plane; closed when the interceptor is dropped.
    pub fn device(&self) -> StackDevice {
        self.device.clone()
    }
}

impl Drop for Interceptor {
    fn drop(&mut self) {
        self.netstack.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::MagicDns;
    use crate::netstack::Config;
    use std::net::SocketAddr;
    use std::time::Duration;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn diverted_packets_are_answered_and_others_are_not_diverted() {
        let mut table = MagicDns::new("mesh.example");
        table.insert("web", &["100.64.0.7".parse().unwrap()]);
        let interceptor = Interceptor::start(&Names::new(table), 1280).unwrap();
        let answers = interceptor.device();
        // The host's own stack, and the data plane between the two.
        let (host, cable) = Netstack::start(Config::with_addresses(["100.64.0.1".parse().unwrap()])).unwrap();
        let back = cable.clone();
        let reading = answers.clone();
        let reader = std::thread::spawn(move || {
            let pass = |packet| {
                back.send([packet]);
            };
            while reading.recv(1, Duration::from_secs(5), pass).is_some() {}
        });
        let (passed_on, peers) = std::sync::mpsc::channel();
        let data_plane = std::thread::spawn(move || {
            let mut packets = Vec::new();
            while cable.recv(1, Duration::from_secs(5), |packet| packets.push(packet)).is_some() {
                for packet in packets.drain(..) {
                    if is_service_packet(&packet) {
                        interceptor.take(&packet);
                    } else if passed_on.send(packet).is_err() {
                        return;
                    }
                }
            }
        });
        let server: SocketAddr = "100.100.100.100:53".parse().unwrap();
        let mut stream = host.dial_tcp(server).await.unwrap();
        tokio::io::AsyncWriteExt::shutdown(&mut stream).await.unwrap();
        let socket = host.bind_udp(0).unwrap();
        socket.send_to(&[0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], server).unwrap();
        let (flow, answer) = socket.recv().await.unwrap();
        assert_eq!(flow.remote, server);
        assert_eq!((answer[..2].to_vec(), answer[3] & 15), (vec![0, 1], 1), "no question is a format error");
        socket.send_to(b"to a peer", "100.64.0.2:9".parse().unwrap()).unwrap();
        let packet = peers.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(packet.ends_with(b"to a peer"));
        host.close();
        data_plane.join().unwrap();
        reader.join().unwrap();
        assert!(!is_service_packet(&[]) && !is_service_packet(&[0x45; 19]) && !is_service_packet(&[0x60; 39]));
    }
}
