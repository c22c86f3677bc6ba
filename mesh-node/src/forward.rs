//! Inbound traffic to this host, and through it: a peer that connects to a port of ours reaches the same port of
//! 127.0.0.1, and what it sends to a subnet behind us goes there by this host's own sockets.
//!
//! In userspace mode no kernel socket sees the mesh, so a server on this host would be unreachable. [`Forwarder`] takes
//! the stack's [`Requests`](crate::netstack::Requests) and connects them:
//!
//! - TCP: the SYN waits while the target is tried, so that a closed port is refused and not accepted and dropped.
//!   Bytes are copied both ways with half-close; a reset on one side becomes a reset on the other.
//! - UDP: each pair of addresses and ports gets a local socket, so that answers find their way back; flows end after
//!   being idle, and are bounded in number. A closed port is answered as unreachable.
//!
//! - Echo requests to a subnet: the real host is asked through an unprivileged ICMP socket, and answered for when it has
//!   answered. Where this process may have no such socket they are dropped and counted.
//!
//! [`Targets`] says where traffic really goes. [`ThisHost`] sends what is for our own addresses to 127.0.0.1, also what
//! peers send over IPv6, since most local servers listen there; and what is for
//! [`Config::subnets`](netstack::Config::subnets) where it is addressed to, but never to this host's own loopback. The
//! packet filter has decided before who may come this far.

mod ping;
mod targets;

pub use targets::{Targets, ThisHost};

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::netstack::{self, Flow, Netstack, PingRequest, Request, TcpRequest, UdpRequest};

/// Bytes copied at a time, each way.
const COPY_BUFFER: usize = 64 * 1024;
/// Datagrams that one flow holds for its local socket.
const FLOW_QUEUE: usize = 64;
/// The largest UDP payload.
const LARGEST_DATAGRAM: usize = 65_535;

/// Settings of a [`Forwarder`]; the defaults run well untouched.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// Where [`ThisHost`] takes what is for our own addresses; default 127.0.0.1.
    pub target: IpAddr,
    /// TCP connections at a time; default 512. Further ones are refused.
    pub max_connections: usize,
    /// UDP flows at a time; default 512. Datagrams of further ones are dropped and counted.
    pub max_flows: usize,
    /// How long a UDP flow stays without a datagram either way; default 60 s.
    pub flow_idle: Duration,
    /// How long a target may take to accept; default 5 s.
    pub connect_timeout: Duration,
    /// Echo requests that wait for an answer; default 64. Further ones are dropped and counted.
    pub max_pings: usize,
    /// How long a target may take to echo; default 5 s.
    pub ping_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            target: IpAddr::V4(Ipv4Addr::LOCALHOST),
            max_connections: 512,
            max_flows: 512,
            flow_idle: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            max_pings: 64,
            ping_timeout: Duration::from_secs(5),
        }
    }
}

/// What a [`Forwarder`] has done since it started.
#[derive(Debug, Default)]
pub struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
    dropped_datagrams: AtomicU64,
    pings: AtomicU64,
    dropped_pings: AtomicU64,
}

impl Counters {
    /// TCP connections that reached their target.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// TCP connections and UDP flows that were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Datagrams dropped for lack of room.
    pub fn dropped_datagrams(&self) -> u64 {
        self.dropped_datagrams.load(Ordering::Relaxed)
    }

    /// Echo requests that were answered.
    pub fn pings(&self) -> u64 {
        self.pings.load(Ordering::Relaxed)
    }

    /// Echo requests without an answer: no target, no room, no permission, or the target is silent.
    pub fn dropped_pings(&self) -> u64 {
        self.dropped_pings.load(Ordering::Relaxed)
    }
}

/// Connects the stack's unserved ports to this host, and its subnets to the hosts there.
#[derive(Debug, Clone)]
pub struct Forwarder {
    netstack: Netstack,
    config: Arc<Config>,
    targets: Arc<dyn Targets>,
    counters: Arc<Counters>,
}

impl Forwarder {
    /// A forwarder for `netstack` with [`ThisHost`] as targets. The stack offers ports of our own addresses with
    /// [`fallback`](netstack::Config::fallback), and the hosts in [`subnets`](netstack::Config::subnets).
    pub fn new(netstack: Netstack, config: Config) -> Self {
        let targets = Arc::new(ThisHost::new(netstack.clone(), config.target));
        Self { netstack, config: Arc::new(config), targets, counters: Arc::default() }
    }

    /// Asks `targets` instead where traffic goes.
    #[must_use]
    pub fn with_targets(mut self, targets: Arc<dyn Targets>) -> Self {
        self.targets = targets;
        self
    }

    /// Counts while [`run`](Self::run) runs.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Serves until the stack ends; returns at once when its requests are taken already. Dropping the future stops
    /// accepting; connections and flows that exist run on.
    pub async fn run(self) {
        let Some(mut requests) = self.netstack.requests() else {
            tracing::warn!("nothing to forward: the stack offers no requests, or somebody else has taken them");
            return;
        };
        let permits = Arc::new(Semaphore::new(self.config.max_connections));
        let pings = Arc::new(Semaphore::new(self.config.max_pings));
        let mut flows: HashMap<Flow, mpsc::Sender<UdpRequest>> = HashMap::new();
        let (ended, mut endings) = mpsc::channel(self.config.max_flows.max(1));
        loop {
            tokio::select! {
                biased;
                Some(flow) = endings.recv() => {
                    flows.remove(&flow);
                }
                request = requests.next() => match request {
                    Some(Request::Tcp(request)) => match Arc::clone(&permits).try_acquire_owned() {
                        Ok(permit) => {
                            let forwarder = self.clone();
                            tokio::spawn(async move {
                                forwarder.forward_tcp(request).await;
                                drop(permit);
                            });
                        }
                        Err(_) => {
                            self.counters.refused.fetch_add(1, Ordering::Relaxed);
                            request.refuse();
                        }
                    },
                    Some(Request::Udp(request)) => self.forward_datagram(&mut flows, &ended, request),
                    Some(Request::Ping(request)) => match Arc::clone(&pings).try_acquire_owned() {
                        Ok(permit) => {
                            let forwarder = self.clone();
                            tokio::spawn(async move {
                                forwarder.forward_ping(request).await;
                                drop(permit);
                            });
                        }
                        Err(_) => {
                            self.counters.dropped_pings.fetch_add(1, Ordering::Relaxed);
                        }
                    },
                    None => return,
                },
            }
        }
    }

    fn forward_datagram(
        &self,
        flows: &mut HashMap<Flow, mpsc::Sender<UdpRequest>>,
        ended: &mpsc::Sender<Flow>,
        request: UdpRequest,
    ) {
        let flow = request.flow();
        let request = match flows.get(&flow) {
            Some(queue) => match queue.try_send(request) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    self.counters.dropped_datagrams.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(mpsc::error::TrySendError::Closed(request)) => request,
            },
            None if flows.len() >= self.config.max_flows => {
                self.counters.dropped_datagrams.fetch_add(1, Ordering::Relaxed);
                return;
            }
            None => request,
        };
        let Some(target) = self.targets.target(flow.local) else {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            request.refuse();
            return;
        };
        let (queue, receiver) = mpsc::channel(FLOW_QUEUE);
        // The queue is empty and open.
        let _ = queue.try_send(request);
        flows.insert(flow, queue);
        let task = UdpFlow {
            flow,
            target,
            netstack: self.netstack.clone(),
            config: Arc::clone(&self.config),
            counters: Arc::clone(&self.counters),
        };
        let ended = ended.clone();
        tokio::spawn(async move {
            if let Err(error) = task.run(receiver).await {
                tracing::debug!(%flow.remote, port = flow.local.port(), %error, "a forwarded UDP flow failed");
            }
            let _ = ended.send(flow).await;
        });
    }

    /// Connects to the target first: what it refuses is refused, and not accepted and dropped.
    async fn forward_tcp(&self, request: TcpRequest) {
        let flow = request.flow();
        let Some(local) = self.connect(flow.local).await else {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            request.refuse();
            return;
        };
        self.counters.accepted.fetch_add(1, Ordering::Relaxed);
        if local.set_nodelay(true).is_err() {
            tracing::trace!(%flow.local, "the local socket has gone already");
        }
        match request.accept().await {
            Ok(remote) => bridge(remote, local).await,
            Err(error) => tracing::debug!(%flow.remote, %error, "a peer left during its handshake"),
        }
    }

    async fn connect(&self, destination: SocketAddr) -> Option<TcpStream> {
        let target = self.targets.target(destination)?;
        timeout(self.config.connect_timeout, TcpStream::connect(target)).await.ok()?.ok()
    }

    async fn forward_ping(&self, request: PingRequest) {
        let target = request.destination().and_then(|address| self.targets.target(SocketAddr::new(address, 0)));
        let answered = match target {
            Some(target) => ping::ping(target.ip(), request.message(), self.config.ping_timeout).await,
            None => Err(io::ErrorKind::AddrNotAvailable.into()),
        };
        match answered {
            Ok(()) => {
                self.counters.pings.fetch_add(1, Ordering::Relaxed);
                request.answer();
            }
            Err(error) => {
                self.counters.dropped_pings.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%error, "an echo request is not answered");
            }
        }
    }
}

/// Moves bytes both ways until both sides have closed; a reset of one side resets the other.
pub(crate) async fn bridge(remote: netstack::TcpStream, local: TcpStream) {
    let bridged = match local.into_std().map(Arc::new) {
        Ok(local) => remote.splice(&local).await.inspect_err(|_| abort(&local)),
        Err(error) => Err(error),
    };
    if let Err(error) = bridged {
        tracing::debug!(peer = %remote.peer_addr(), %error, "a bridged connection broke");
        remote.reset();
    }
}

/// Copies both ways with half-close.
pub(crate) async fn copy_both<A, B>(a: &mut A, b: &mut B) -> io::Result<(u64, u64)>
where
    A: AsyncRead + AsyncWrite + Unpin + ?Sized,
    B: AsyncRead + AsyncWrite + Unpin + ?Sized,
{
    tokio::io::copy_bidirectional_with_sizes(a, b, COPY_BUFFER, COPY_BUFFER).await
}

/// Closes a kernel socket with a reset, when it is let go.
fn abort(stream: impl AsFd) {
    // With a linger time of zero, close sends a reset (POSIX leaves it open, all systems do).
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

/// One UDP flow and its local socket.
struct UdpFlow {
    flow: Flow,
    target: SocketAddr,
    netstack: Netstack,
    config: Arc<Config>,
    counters: Arc<Counters>,
}

impl UdpFlow {
    async fn run(&self, mut requests: mpsc::Receiver<UdpRequest>) -> io::Result<()> {
        let unspecified: IpAddr = if self.target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { [0_u16; 8].into() };
        let socket = UdpSocket::bind(SocketAddr::new(unspecified, 0)).await?;
        socket.connect(self.target).await?;
        let mut buffer = vec![0; LARGEST_DATAGRAM];
        // Kept until the local port has answered: the refusal quotes it.
        let mut unanswered: Option<UdpRequest> = None;
        let mut answered = false;
        loop {
            tokio::select! {
                request = requests.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    // An error here is the answer to an earlier datagram; the next receive says so again if it lasts.
                    let _ = socket.send(request.payload()).await;
                    if !answered {
                        unanswered = Some(request);
                    }
                }
                received = socket.recv(&mut buffer) => match received {
                    Ok(len) => {
                        answered = true;
                        unanswered = None;
                        let payload = buffer.get(..len).unwrap_or_default();
                        if self.netstack.send_datagram(self.flow, payload).is_err() {
                            self.counters.dropped_datagrams.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Err(_) => {
                        if let Some(request) = unanswered {
                            self.counters.refused.fetch_add(1, Ordering::Relaxed);
                            request.refuse();
                        }
                        return Ok(());
                    }
                },
                () = tokio::time::sleep(self.config.flow_idle) => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netstack::StackDevice;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A stack that dials, and one that forwards to this host with `config`.
    fn pair(config: Config) -> (Netstack, Arc<Counters>) {
        let settings =
            |v4: &str, v6: &str| netstack::Config::with_addresses([v4.parse().unwrap(), v6.parse().unwrap()]);
        let (a, a_device) = Netstack::start(settings("100.64.0.1", "fd7a:115c:a1e0::1")).unwrap();
        let mut settings = settings("100.64.0.2", "fd7a:115c:a1e0::2");
        settings.fallback = true;
        let (b, b_device) = Netstack::start(settings).unwrap();
        pump(a_device.clone(), b_device.clone());
        pump(b_device, a_device);
        let forwarder = Forwarder::new(b, config);
        let counters = forwarder.counters();
        tokio::spawn(forwarder.run());
        (a, counters)
    }

    fn pump(from: StackDevice, to: StackDevice) {
        std::thread::spawn(move || {
            let mut packets = Vec::new();
            while from.recv(64, Duration::from_secs(5), |packet| packets.push(packet)).is_some() {
                to.send(packets.drain(..));
            }
        });
    }

    fn peer(port: u16) -> SocketAddr {
        SocketAddr::new("100.64.0.2".parse().unwrap(), port)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_connection_reaches_the_same_local_port_over_both_families() {
        let (stack, counters) = pair(Config::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
            }
        });
        for address in ["100.64.0.2", "fd7a:115c:a1e0::2"] {
            let mut stream = stack.dial_tcp(SocketAddr::new(address.parse().unwrap(), port)).await.unwrap();
            stream.write_all(&[7; 100_000]).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut echoed = Vec::new();
            stream.read_to_end(&mut echoed).await.unwrap();
            assert_eq!(echoed, [7; 100_000]);
        }
        assert_eq!((counters.accepted(), counters.refused()), (2, 0));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn megabytes_go_there_and_back_unchanged_and_then_their_ends() {
        let (stack, _) = pair(Config::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut reader, mut writer) = listener.accept().await.unwrap().0.into_split();
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
        });
        let sent: Arc<[u8]> = (0..12_usize << 20).map(|at| ((at * 31 + at / 251) % 251).to_le_bytes()[0]).collect();
        let (mut reader, mut writer) = tokio::io::split(stack.dial_tcp(peer(port)).await.unwrap());
        let writing = Arc::clone(&sent);
        tokio::spawn(async move {
            writer.write_all(&writing).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let mut echoed = Vec::with_capacity(sent.len());
        // Whoever reads late holds everybody up, and loses nothing.
        tokio::time::sleep(Duration::from_millis(200)).await;
        reader.read_to_end(&mut echoed).await.unwrap();
        assert!(echoed == *sent, "{} of {} bytes came back, or others", echoed.len(), sent.len());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_closed_local_port_refuses() {
        let (stack, counters) = pair(Config::default());
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        assert_eq!(stack.dial_tcp(peer(port)).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!((counters.accepted(), counters.refused()), (0, 1));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn connections_beyond_the_bound_are_refused() {
        let (stack, _) = pair(Config { max_connections: 1, ..Config::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let _first = stack.dial_tcp(peer(port)).await.unwrap();
        assert_eq!(stack.dial_tcp(peer(port)).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_local_reset_reaches_the_peer_as_a_reset() {
        let (stack, _) = pair(Config::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut stream = stack.dial_tcp(peer(listener.local_addr().unwrap().port())).await.unwrap();
        abort(&listener.accept().await.unwrap().0);
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn datagrams_and_their_answers_keep_their_flows() {
        let (stack, _) = pair(Config::default());
        let echo = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = echo.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut buffer = [0; 2000];
            loop {
                let (len, from) = echo.recv_from(&mut buffer).await.unwrap();
                echo.send_to(&buffer[..len], from).await.unwrap();
            }
        });
        let sockets = [stack.bind_udp(0).unwrap(), stack.bind_udp(0).unwrap()];
        for round in 0..3_u8 {
            for (index, socket) in (0_u8..).zip(&sockets) {
                socket.send_to(&[round, index], peer(port)).unwrap();
            }
            for (index, socket) in (0_u8..).zip(&sockets) {
                let mut buffer = [0; 100];
                let (len, from) =
                    timeout(Duration::from_secs(5), socket.recv_from(&mut buffer)).await.unwrap().unwrap();
                assert_eq!((&buffer[..len], from), ([round, index].as_slice(), peer(port)));
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn flows_are_bounded_refused_where_nobody_listens_and_forgotten_when_idle() {
        let idle = Duration::from_millis(50);
        let (stack, counters) = pair(Config { max_flows: 1, flow_idle: idle, ..Config::default() });
        let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let open = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let socket = stack.bind_udp(0).unwrap();
        let until = |reached: Box<dyn Fn() -> bool>| async move {
            for _ in 0..500 {
                if reached() {
                    return true;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            false
        };
        socket.send_to(b"x", peer(closed)).unwrap();
        let seen = Arc::clone(&counters);
        assert!(until(Box::new(move || seen.refused() == 1)).await, "the closed port refuses");
        tokio::time::sleep(idle).await;
        let (other, one) = (stack.bind_udp(0).unwrap(), open.local_addr().unwrap().port());
        socket.send_to(b"first", peer(one)).unwrap();
        other.send_to(b"second", peer(one)).unwrap();
        let seen = Arc::clone(&counters);
        assert!(until(Box::new(move || seen.dropped_datagrams() == 1)).await, "a second flow does not fit");
        tokio::time::sleep(4 * idle).await;
        other.send_to(b"third", peer(one)).unwrap();
        let mut buffer = [0; 100];
        let mut got = Vec::new();
        for _ in 0..2 {
            let (len, _) = timeout(Duration::from_secs(5), open.recv_from(&mut buffer)).await.unwrap().unwrap();
            got.push(buffer[..len].to_vec());
        }
        assert_eq!(got, [b"first".to_vec(), b"third".to_vec()]);
    }
}
