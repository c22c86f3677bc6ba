//! A [`Mapper`] on real sockets: UDP for PCP, NAT-PMP and searches, TCP for UPnP's calls.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol as Transport, SockRef, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinSet;

use crate::portmap::{Config, Event, ExchangeId, Mapper, Network, Status, Transmit, http, pcp};

/// No datagram that matters is longer.
const BUFFER: usize = 2048;
/// How long one HTTP exchange may take; the mapper has given up by then.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long giving a mapping back may take, when a node ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// After a suspension, deadlines are looked at again within this time.
const MAX_SLEEP: Duration = Duration::from_secs(15);
/// A pause after an error.
const AFTER_ERROR: Duration = Duration::from_millis(10);
/// The groups to which gateways tell that they have started anew (RFC 6887 §14.1).
const ALL_HOSTS: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
const ALL_HOSTS_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Tells the time. One that counts suspensions keeps mappings alive over them.
pub type Clock = Box<dyn Fn() -> Instant + Send + Sync>;

/// Gets and keeps one port mapping, over sockets of its own.
pub struct PortMapper {
    core: Mapper,
    clock: Clock,
    mark: Option<u32>,
    /// Our address, and the interface that it is on.
    client: Option<(IpAddr, u32)>,
    socket: Option<UdpSocket>,
    announcements: Option<UdpSocket>,
    exchanges: JoinSet<(ExchangeId, Option<http::Response>)>,
    buffer: Box<[u8; BUFFER]>,
    second: Box<[u8; BUFFER]>,
}

impl std::fmt::Debug for PortMapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortMapper").field("core", &self.core).finish_non_exhaustive()
    }
}

impl PortMapper {
    /// A mapper that waits for [network](Self::set_network) and [port](Self::set_port). Its sockets carry `mark`
    /// (`SO_MARK`) where that is permitted, so that they keep out of a tunnel.
    #[must_use]
    pub fn new(config: Config, seed: [u8; 32], mark: Option<u32>, clock: Clock) -> Self {
        Self {
            core: Mapper::new(config, seed),
            clock,
            mark,
            client: None,
            socket: None,
            announcements: None,
            exchanges: JoinSet::new(),
            buffer: Box::new([0; BUFFER]),
            second: Box::new([0; BUFFER]),
        }
    }

    /// The default route is this one now. See [`Mapper::set_network`].
    pub fn set_network(&mut self, network: Option<Network>) {
        if self.core.network() == network {
            return;
        }
        let client = network.map(|network| (network.client, network.scope));
        if self.client != client {
            (self.client, self.socket, self.announcements) = (client, None, None);
        }
        self.core.set_network((self.clock)(), network);
    }

    /// The port that should be reachable. See [`Mapper::set_port`].
    pub fn set_port(&mut self, port: Option<u16>) {
        self.core.set_port((self.clock)(), port);
    }

    /// Our address as STUN servers see it. See [`Mapper::set_reflexive`].
    pub fn set_reflexive(&mut self, address: Option<IpAddr>) {
        self.core.set_reflexive((self.clock)(), address);
    }

    /// What is known.
    #[must_use]
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// Runs until there is something to know. Safe to cancel: what is dropped costs at most one datagram.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn next_event(&mut self) -> Event {
        loop {
            while let Some(transmit) = self.core.poll_transmit() {
                self.transmit(transmit);
            }
            if let Some(event) = self.core.poll_event() {
                return event;
            }
            let now = (self.clock)();
            let wait = self.core.poll_timeout().map(|at| at.saturating_duration_since(now).min(MAX_SLEEP));
            // What the core refuses is whatever else arrives at these sockets.
            let _refused = tokio::select! {
                (len, source) = receive(self.socket.as_ref(), &mut self.buffer[..]) => {
                    self.core.handle_datagram((self.clock)(), source, &self.buffer[..len])
                }
                (len, source) = receive(self.announcements.as_ref(), &mut self.second[..]) => {
                    self.core.handle_datagram((self.clock)(), source, &self.second[..len])
                }
                Some(done) = self.exchanges.join_next() => {
                    if let Ok((id, response)) = done {
                        self.core.handle_http((self.clock)(), id, response.as_ref());
                    }
                    Ok(())
                }
                () = sleep(wait) => {
                    self.core.handle_timeout((self.clock)());
                    Ok(())
                }
            };
        }
    }

    /// Gives the mapping back; takes three seconds at most.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn close(&mut self) {
        self.core.close((self.clock)());
        let closed = async { while self.next_event().await != Event::Closed {} };
        // A gateway that does not answer forgets us by itself.
        tokio::time::timeout(CLOSE_TIMEOUT, closed).await.ok();
    }

    fn transmit(&mut self, transmit: Transmit) {
        let Some((client, scope)) = self.client else { return };
        match transmit {
            Transmit::Datagram { remote, datagram } => {
                if self.socket.is_none() {
                    // An address that has just come may not be usable yet; the next datagram tries again.
                    self.socket = bind(client, self.mark).ok();
                    self.announcements = listen(client, scope).ok();
                }
                if let Some(socket) = &self.socket {
                    // Past the runtime, which would not send before it has seen the new socket to be writable. An
                    // unreachable gateway is loss, not failure.
                    SockRef::from(socket).send_to(&datagram, &remote.into()).ok();
                }
            }
            Transmit::Http { id, remote, request } => {
                let mark = self.mark;
                self.exchanges.spawn(async move {
                    let exchange = tokio::time::timeout(EXCHANGE_TIMEOUT, exchange(client, mark, remote, &request));
                    (id, exchange.await.ok().and_then(Result::ok))
                });
            }
        }
    }
}

async fn sleep(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

async fn receive(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> (usize, SocketAddr) {
    let Some(socket) = socket else { return std::future::pending().await };
    loop {
        match socket.recv_from(buffer).await {
            Ok(received) => return received,
            // It tells of a datagram that was sent before: nobody listens there. Should it tell of more, it may wait.
            Err(_) => tokio::time::sleep(AFTER_ERROR).await,
        }
    }
}

/// The socket that everything is asked from.
fn bind(client: IpAddr, mark: Option<u32>) -> io::Result<UdpSocket> {
    let address = SocketAddr::new(client, 0);
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Transport::UDP))?;
    set_mark(&socket, mark);
    if let IpAddr::V4(v4) = client {
        socket.set_multicast_if_v4(&v4)?;
        socket.set_multicast_ttl_v4(2)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

/// The socket that hears gateways which have started anew. Bound to the group, so that nothing else comes; others on this
/// host may have one too.
fn listen(client: IpAddr, scope: u32) -> io::Result<UdpSocket> {
    let group = match client {
        IpAddr::V4(_) => SocketAddr::from((ALL_HOSTS, pcp::ANNOUNCE_PORT)),
        IpAddr::V6(_) => SocketAddrV6::new(ALL_HOSTS_V6, pcp::ANNOUNCE_PORT, 0, scope).into(),
    };
    let socket = Socket::new(Domain::for_address(group), Type::DGRAM, Some(Transport::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&group.into())?;
    match client {
        IpAddr::V4(client) => socket.join_multicast_v4(&ALL_HOSTS, &client)?,
        IpAddr::V6(_) => socket.join_multicast_v6(&ALL_HOSTS_V6, scope)?,
    }
    UdpSocket::from_std(socket.into())
}

fn set_mark(socket: &Socket, mark: Option<u32>) {
    #[cfg(target_os = "linux")]
    if let Some(mark) = mark {
        // Not permitted to everyone; who is not has no tunnel device either.
        socket.set_mark(mark).ok();
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (socket, mark);
}

/// One request and its response, over a connection of their own.
async fn exchange(client: IpAddr, mark: Option<u32>, remote: SocketAddr, request: &[u8]) -> io::Result<http::Response> {
    let socket = Socket::new(Domain::for_address(remote), Type::STREAM, Some(Transport::TCP))?;
    set_mark(&socket, mark);
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(client, 0).into())?;
    let stream = TcpSocket::from_std_stream(socket.into()).connect(remote).await?;
    let mut rest = request;
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(len) => rest = &rest[len..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    let (mut received, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        stream.readable().await?;
        let ended = match stream.try_read(&mut buffer) {
            Ok(len) => {
                received.extend_from_slice(&buffer[..len]);
                len == 0
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        // Refuses what is too long, so that nobody fills our memory.
        match http::response(&received, ended) {
            Ok(Some(response)) => return Ok(response),
            Ok(None) => {}
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}
