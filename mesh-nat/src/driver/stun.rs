//! A STUN responder on a UDP socket.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::net::UdpSocket;

use crate::stun::responder::{Audience, Counters, Responder};

/// Answers STUN binding requests on one address, or on two ports of one.
#[derive(Debug)]
pub struct StunServer {
    socket: UdpSocket,
    /// The second port, if there is one.
    other: Option<UdpSocket>,
    responder: Mutex<Responder>,
}

impl StunServer {
    /// Binds `address`. It answers members of a mesh only; see [`Self::for_audience`].
    ///
    /// # Errors
    /// If the address cannot be bound.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[expect(clippy::unused_async, reason = "tells the caller that a runtime is needed")]
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        Ok(Self { socket: super::bind(address)?, other: None, responder: Mutex::new(Responder::default()) })
    }

    /// The same on a socket that is bound already and does not block.
    ///
    /// # Errors
    /// If the system refuses it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn from_socket(socket: std::net::UdpSocket) -> io::Result<Self> {
        Ok(Self { socket: UdpSocket::from_std(socket)?, other: None, responder: Mutex::new(Responder::default()) })
    }

    /// The same as [`with_other_port`](Self::with_other_port) with a socket that is bound already and does not block.
    ///
    /// # Errors
    /// If the system refuses it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn with_other_socket(mut self, other: std::net::UdpSocket) -> io::Result<Self> {
        self.other = Some(UdpSocket::from_std(other)?);
        self.responder = Mutex::new(self.responder.into_inner().unwrap_or_else(PoisonError::into_inner).paired());
        Ok(self)
    }

    /// Answers on another port of the same address as well, and from the other port those who ask for that. With two
    /// ports, clients find out whether their NAT maps and filters by port.
    ///
    /// # Errors
    /// If the port cannot be bound.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[expect(clippy::unused_async, reason = "tells the caller that a runtime is needed")]
    pub async fn with_other_port(mut self, port: u16) -> io::Result<Self> {
        let address = SocketAddr::new(self.local_addr()?.ip(), port);
        self.other = Some(super::bind(address)?);
        self.responder = Mutex::new(self.responder.into_inner().unwrap_or_else(PoisonError::into_inner).paired());
        Ok(self)
    }

    /// The same server for another audience.
    #[must_use]
    pub fn for_audience(self, audience: Audience) -> Self {
        let responder = Responder::new(audience);
        let responder = if self.other.is_some() { responder.paired() } else { responder };
        Self { responder: Mutex::new(responder), ..self }
    }

    /// The second port, if there is one.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn other_port(&self) -> io::Result<Option<u16>> {
        self.other.as_ref().map(|other| Ok(other.local_addr()?.port())).transpose()
    }

    /// The address that was bound, with the port that the system chose if none was asked for.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.responder.lock().unwrap_or_else(PoisonError::into_inner).counters()
    }

    /// Answers for as long as it is polled. Safe to cancel: a dropped future costs at most one answer.
    pub async fn run(&self) -> Infallible {
        match &self.other {
            None => self.serve(&self.socket, &self.socket).await,
            Some(other) => {
                tokio::select! {
                    never = self.serve(&self.socket, other) => never,
                    never = self.serve(other, &self.socket) => never,
                }
            }
        }
    }

    async fn serve(&self, socket: &UdpSocket, other: &UdpSocket) -> Infallible {
        let mut buffer = [0; 1500];
        loop {
            let Ok((len, source)) = socket.recv_from(&mut buffer).await else {
                // Errors of a UDP socket are news about earlier datagrams; those that persist must not spin.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let answer = {
                let mut responder = self.responder.lock().unwrap_or_else(PoisonError::into_inner);
                responder.handle_datagram(source, &buffer[..len])
            };
            if let Ok(answer) = answer {
                let socket = if answer.from_other_port { other } else { socket };
                // An unreachable client is its own loss.
                let _ = socket.send_to(&answer.datagram, source).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stun::message::{Response, TransactionId, request, request_from_other_port};

    #[tokio::test]
    async fn who_asks_for_it_is_answered_from_the_other_port() {
        let server = StunServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let server = server.with_other_port(0).await.unwrap();
        let address = server.local_addr().unwrap();
        let other = SocketAddr::new(address.ip(), server.other_port().unwrap().unwrap());
        let client = super::super::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let tx = TransactionId([4; 12]);
        let mut buffer = [0; 100];
        for (to, datagram, from) in [
            (address, request(tx), address),
            (other, request(tx), other),
            (address, request_from_other_port(tx), other),
            (other, request_from_other_port(tx), address),
        ] {
            client.send_to(&datagram, to).await.unwrap();
            let (len, source) = tokio::select! {
                never = server.run() => match never {},
                received = client.recv_from(&mut buffer) => received.unwrap(),
            };
            assert_eq!(source, from);
            assert_eq!(Response::decode(&buffer[..len]).unwrap().tx, tx);
        }
    }

    #[tokio::test]
    async fn a_client_learns_its_address_over_both_families_on_one_port() {
        let v4 = StunServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let port = v4.local_addr().unwrap().port();
        let mut servers = vec![v4];
        if let Ok(v6) = StunServer::bind(SocketAddr::new("::1".parse().unwrap(), port)).await {
            servers.push(v6);
        }
        for server in servers {
            let client = super::super::bind(SocketAddr::new(server.local_addr().unwrap().ip(), 0)).unwrap();
            let tx = TransactionId([4; 12]);
            client.send_to(b"nonsense", server.local_addr().unwrap()).await.unwrap();
            client.send_to(&request(tx), server.local_addr().unwrap()).await.unwrap();
            let mut buffer = [0; 100];
            let len = tokio::select! {
                never = server.run() => match never {},
                received = client.recv(&mut buffer) => received.unwrap(),
            };
            let response = Response::decode(&buffer[..len]).unwrap();
            assert_eq!(response, Response { tx, mapped: client.local_addr().unwrap() });
            assert_eq!(server.counters(), Counters { answered: 1, rejected: 1 });
        }
    }
}
