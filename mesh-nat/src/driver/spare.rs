//! Sockets that live as long as one report.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::path::SocketId;

/// The ids of these sockets begin here, far from those of a node's own.
const FIRST: u16 = 0xff00;
/// Datagrams that may wait; more are dropped.
const QUEUE: usize = 64;

/// A handful of IPv4 sockets on ports of the system's choice. They close when this is dropped.
///
/// [`Event::WantSockets`](crate::report::Event::WantSockets) asks for them.
#[derive(Debug)]
pub struct SpareSockets {
    sockets: Vec<Arc<UdpSocket>>,
    sender: mpsc::Sender<(SocketAddr, Vec<u8>)>,
    received: mpsc::Receiver<(SocketAddr, Vec<u8>)>,
    readers: JoinSet<()>,
}

impl Default for SpareSockets {
    fn default() -> Self {
        Self::new()
    }
}

impl SpareSockets {
    /// None so far.
    #[must_use]
    pub fn new() -> Self {
        let (sender, received) = mpsc::channel(QUEUE);
        Self { sockets: Vec::new(), sender, received, readers: JoinSet::new() }
    }

    /// Opens `count` sockets, or as many as the system grants, and says what they are bound to. What they send carries
    /// `mark`, where that is allowed: with it a host's routing rules know it (Linux only).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(&mut self, count: usize, mark: Option<u32>) -> Vec<(SocketId, SocketAddr)> {
        let mut opened = Vec::new();
        for _ in 0..count {
            let Ok(socket) = super::bind((Ipv4Addr::UNSPECIFIED, 0).into()) else { continue };
            #[cfg(target_os = "linux")]
            if let Some(mark) = mark {
                // Without the right to set it there are no rules of ours that would look at it.
                let _ = SockRef::from(&socket).set_mark(mark);
            }
            #[cfg(not(target_os = "linux"))]
            let _ = mark;
            let (Ok(bound), Ok(index)) = (socket.local_addr(), u16::try_from(self.sockets.len())) else { continue };
            let Some(id) = FIRST.checked_add(index) else { continue };
            opened.push((SocketId(id), bound));
            let socket = Arc::new(socket);
            self.sockets.push(Arc::clone(&socket));
            let sender = self.sender.clone();
            self.readers.spawn(async move {
                let mut buffer = [0; 1500];
                while let Ok((len, source)) = socket.recv_from(&mut buffer).await {
                    if let Err(mpsc::error::TrySendError::Closed(_)) = sender.try_send((source, buffer[..len].to_vec()))
                    {
                        return;
                    }
                }
            });
        }
        opened
    }

    /// Whether `socket` is one of these.
    #[must_use]
    pub fn contains(&self, socket: SocketId) -> bool {
        self.get(socket).is_some()
    }

    /// Sends a datagram. What cannot be sent at once is lost, as on the way.
    pub fn send(&self, socket: SocketId, remote: SocketAddr, datagram: &[u8]) {
        if let Some(socket) = self.get(socket) {
            let _ = SockRef::from(socket.as_ref()).send_to(datagram, &remote.into());
        }
    }

    /// The next datagram that any of them receives, and where it came from; waits for ever while there is none. Safe to
    /// cancel.
    pub async fn receive(&mut self) -> (SocketAddr, Vec<u8>) {
        match self.received.recv().await {
            Some(datagram) => datagram,
            None => std::future::pending().await,
        }
    }

    fn get(&self, socket: SocketId) -> Option<&Arc<UdpSocket>> {
        self.sockets.get(usize::from(socket.0.checked_sub(FIRST)?))
    }
}
