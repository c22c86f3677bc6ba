//! Sockets that path discovery asks for to guess ports with: many, for seconds, and each sees a few datagrams at most.
//!
//! They are plain sockets in the driver's own task system, one descriptor each. The one by which a peer comes through is
//! handed to the data plane, which gives it a thread like any other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_nat::SocketId;
use mesh_nat::hard::{Extra, MAX_SOCKETS};
use mesh_tun::linux::BYPASS_MARK;
use mesh_tun::linux::udp::{Config, UdpBatch, plain};
use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// The first number of such a socket; ordinary ones have lower numbers.
const FIRST: u16 = 256;
/// The last one; then it begins again.
const LAST: u16 = 0x7fff;
/// Datagrams that wait for the driver; more are dropped, as in any network.
const QUEUE: usize = 256;
/// The longest datagram that is taken: what arrives is signalling.
const LONGEST: usize = 2048;

/// A datagram that has arrived.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) socket: SocketId,
    pub(crate) source: SocketAddr,
    pub(crate) datagram: Vec<u8>,
}

#[derive(Debug)]
struct Held {
    socket: Arc<UdpSocket>,
    reader: AbortHandle,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// The extra sockets of a session.
#[derive(Debug)]
pub(crate) struct ExtraSockets {
    held: BTreeMap<SocketId, Held>,
    next: u16,
    sender: mpsc::Sender<Arrived>,
    arrivals: mpsc::Receiver<Arrived>,
}

fn config() -> Config {
    let mut config = Config::ipv4(0);
    config.mark = Some(BYPASS_MARK);
    config.dont_fragment = true;
    config
}

impl ExtraSockets {
    pub(crate) fn new() -> Self {
        let (sender, arrivals) = mpsc::channel(QUEUE);
        Self { held: BTreeMap::new(), next: FIRST, sender, arrivals }
    }

    /// Opens so many, or as many as the system gives. Inside a runtime only.
    pub(crate) fn open(&mut self, count: usize) -> Vec<Extra> {
        let room = MAX_SOCKETS.saturating_sub(self.held.len());
        let mut opened = Vec::new();
        for _ in 0..count.min(room) {
            let socket = plain(&config()).map_err(std::io::Error::other).and_then(UdpSocket::from_std);
            let (socket, port) = match socket.and_then(|socket| Ok((socket.local_addr()?.port(), socket))) {
                Ok((port, socket)) => (Arc::new(socket), port),
                Err(error) => {
                    tracing::debug!(%error, "no more sockets to guess ports with");
                    break;
                }
            };
            let id = self.number();
            let reader = tokio::spawn(read(id, Arc::clone(&socket), self.sender.clone())).abort_handle();
            self.held.insert(id, Held { socket, reader });
            opened.push(Extra { id, port });
        }
        opened
    }

    fn number(&mut self) -> SocketId {
        let id = SocketId(self.next);
        self.next = if self.next >= LAST { FIRST } else { self.next + 1 };
        id
    }

    /// Closes one. False if it is none of these.
    pub(crate) fn close(&mut self, id: SocketId) -> bool {
        self.held.remove(&id).is_some()
    }

    /// Whether it is one of these.
    pub(crate) fn contains(&self, id: SocketId) -> bool {
        self.held.contains_key(&id)
    }

    /// Sends a datagram; a full buffer and an unreachable path are loss.
    pub(crate) fn send(&self, id: SocketId, remote: SocketAddr, datagram: &[u8]) {
        // Past the runtime, which takes a socket for full until it has looked at it once.
        if let Some(held) = self.held.get(&id)
            && let Err(error) = SockRef::from(&*held.socket).send_to(datagram, &remote.into())
        {
            tracing::trace!(%error, "guess not sent");
        }
    }

    /// Gives one away, for the data plane to carry data by.
    pub(crate) fn take(&mut self, id: SocketId) -> Option<Arc<UdpBatch>> {
        let held = self.held.remove(&id)?;
        let adopted = UdpBatch::adopt(&*held.socket, &config());
        adopted.inspect_err(|error| tracing::warn!(%error, "a socket cannot be used for data")).ok()
    }

    /// The next datagram. Safe to cancel.
    pub(crate) async fn receive(&mut self) -> Option<Arrived> {
        self.arrivals.recv().await
    }
}

async fn read(id: SocketId, socket: Arc<UdpSocket>, sender: mpsc::Sender<Arrived>) {
    let mut buffer = vec![0; LONGEST];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, source)) => {
                let datagram = buffer[..length].to_vec();
                // Without room it is lost, as in any network.
                let _ = sender.try_send(Arrived { socket: id, source, datagram });
            }
            // What an earlier datagram has met with.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(error) => {
                tracing::debug!(%error, "a socket to guess ports with has failed");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_have_numbers_and_ports_of_their_own_until_they_are_closed() {
        let mut extra = ExtraSockets::new();
        let opened = extra.open(3);
        assert_eq!(opened.iter().map(|extra| extra.id.0).collect::<Vec<_>>(), [256, 257, 258]);
        assert!(opened[0].port != opened[1].port);
        assert!(extra.close(opened[0].id) && !extra.close(opened[0].id));
        assert_eq!(extra.open(1)[0].id, SocketId(259), "a number is not given again soon");
        assert_eq!(extra.open(10_000).len(), MAX_SOCKETS - 3);
    }

    #[tokio::test]
    async fn what_arrives_names_its_socket_and_a_socket_can_be_given_away() {
        let mut extra = ExtraSockets::new();
        let opened = extra.open(2);
        let to = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        extra.send(opened[0].id, to(opened[1].port), b"guess");
        let arrived = extra.receive().await.unwrap();
        assert_eq!((arrived.socket, arrived.source.port()), (opened[1].id, opened[0].port));
        assert_eq!(arrived.datagram, b"guess");

        let batch = extra.take(opened[1].id).unwrap();
        assert_eq!(batch.local_addr().port(), opened[1].port);
        assert!(!extra.contains(opened[1].id));
        extra.send(opened[0].id, to(opened[1].port), b"data");
        let mut room = batch.recv_room(4);
        let mut count = 0;
        for _ in 0..50 {
            count = batch.recv_batch(&mut room, std::time::Duration::from_millis(100)).unwrap();
            if count > 0 {
                break;
            }
        }
        assert_eq!((count, room.batch().packet(0)), (1, &b"data"[..]));
    }
}
