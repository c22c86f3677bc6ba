//! A TCP/IP stack in user space: the mesh without a TUN device.
//!
//! [`Netstack::start`] gives two things. The [`Netstack`] dials, listens and binds like an operating system does. The
//! [`StackDevice`] is the other end of its cable: the data plane reads the packets that the stack sends and writes the
//! packets that peers have sent, exactly as with a TUN device.
//!
//! ```text
//!  TcpStream ─┐   ┌──────────── lock ───────────┐  outbox (bounded, back-pressure)
//!  TcpListener├──►│ Stack: smoltcp, UDP, ports  ├───────────────────────────────► StackDevice::read_batch
//!  UdpSocket ─┘   └─▲──────────▲────────────────┘                                 (cuts, writes checksums)
//!                   │          └───────────────────────────────────────────────── StackDevice::write_batch
//!         thread: timers, room, requests                                          (joins, checks checksums)
//! ```
//!
//! A task that writes to a stream runs TCP's output itself, under the lock, and so does the thread that brings packets;
//! timers are the stack thread's work. It sleeps until the next one, or until there is room in the outbox; nothing polls.
//! While the data plane's own thread sleeps, whoever has made packets has the data plane send them there and then.
//!
//! A connection that only passes between the mesh and a local socket (proxies, forwarding) is *spliced*: the stack holds
//! that socket too, and the thread that brings packets moves the bytes, without a task and its buffer in between.
//!
//! TCP is worked on in super-packets of up to 64 KiB both ways: a write becomes one, which is cut where it is copied into
//! the data plane's batch, and packets that arrive in order are joined before a socket sees them. Buffers are used again,
//! so that nothing is allocated for a packet.
//!
//! Ports that nobody listens on are offered through [`Requests`] when [`Config::fallback`] is set;
//! [`forward`](crate::forward) connects them to the same port of 127.0.0.1.
//!
//! Traffic for other addresses than ours is offered in the same way where [`Config::subnets`] says so: that is a subnet
//! router, or an exit node, without privileges.
//!
//! Not done: IP fragments (dropped; the mesh's MTU is the same everywhere), ICMP errors towards a dialing socket (a dial
//! to a silent port ends by its timeout), multicast.

mod device;
mod driver;
mod packet;
mod parcel;
mod phy;
mod recovery;
mod splice;
mod stack;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod window;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

pub use device::StackDevice;
pub use driver::{PingRequest, Request, Requests, StackCounters, TcpRequest, UdpRequest};
pub use packet::Flow;
pub use stack::Drops;
pub use tcp::{TcpListener, TcpStream};
pub use udp::UdpSocket;

use ipnet::IpNet;

use driver::Handle;

/// The service address that every node answers itself, and never routes to a peer (control protocol notes §11.1).
pub const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 100);
/// The IPv6 service address, `fd7a:115c:a1e0::53`.
pub const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53);

/// Whether `address` is one of the two service addresses.
pub fn is_service_address(address: IpAddr) -> bool {
    address == IpAddr::V4(SERVICE_V4) || address == IpAddr::V6(SERVICE_V6)
}

/// Settings of a [`Netstack`]; the defaults run well untouched.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// Our addresses; at most eight, further ones are ignored. Default none: see [`Netstack::set_addresses`].
    pub addresses: Vec<IpAddr>,
    /// Largest IP packet in bytes; default 1280.
    pub mtu: usize,
    /// Receive buffer of a TCP connection in bytes, and so its largest window; default 8 MiB, which fills 1 Gbit/s over
    /// 50 ms with a quarter to spare. It is address space: memory is what bytes have stood in, and the window that is
    /// offered begins with 1 MiB and grows where the path is long.
    pub receive_buffer: usize,
    /// Send buffer of a TCP connection in bytes; default 8 MiB, and used like the receive buffer.
    pub send_buffer: usize,
    /// Bytes that the buffers of all connections may span; default 512 MiB, 32 connections. Further ones get 512 KiB
    /// each way, so that 1,024 connections that fill every buffer hold 1.5 GiB, and idle ones next to nothing.
    pub buffer_budget: usize,
    /// TCP connections at a time, in whatever state; default 1024. Further ones are not accepted, and fail to dial.
    pub max_connections: usize,
    /// Connections that a listener holds for `accept`; default 128. Further SYNs are dropped and come again.
    pub backlog: usize,
    /// Datagrams that a UDP socket holds; default 256. Further ones are dropped and counted.
    pub udp_queue: usize,
    /// Packets waiting for the data plane; default 512. Sockets wait when it is full, datagrams are dropped.
    pub transmit_queue: usize,
    /// How long a dial may take; default 30 s.
    pub connect_timeout: Duration,
    /// How long a peer that owes an answer may stay silent before its connection is reset; default 5 minutes.
    pub silence: Duration,
    /// When to probe an idle connection; default `None`, since a probe keeps tunnels to idle peers awake.
    pub keep_alive: Option<Duration>,
    /// Whether traffic for ports that nobody serves is offered through [`Requests`]; default false: it is refused.
    pub fallback: bool,
    /// Prefixes that are not ours and that we take packets for, as a subnet router or, with both default routes, an exit
    /// node; default none. Their TCP, UDP and echo requests are offered through [`Requests`], the rest is dropped.
    pub subnets: Vec<IpNet>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            mtu: 1280,
            receive_buffer: 8 << 20,
            send_buffer: 8 << 20,
            buffer_budget: 512 << 20,
            max_connections: 1024,
            backlog: 128,
            udp_queue: 256,
            transmit_queue: 512,
            connect_timeout: Duration::from_secs(30),
            silence: Duration::from_secs(300),
            keep_alive: None,
            fallback: false,
            subnets: Vec::new(),
        }
    }
}

impl Config {
    /// The defaults with these addresses.
    pub fn with_addresses(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        Self { addresses: addresses.into_iter().collect(), ..Self::default() }
    }
}

/// Where to listen: a port of all our addresses, or of one. A socket for one address goes before one for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bind {
    /// One of our addresses; `None` is all of them.
    pub address: Option<IpAddr>,
    /// The port; 0 asks for a free one.
    pub port: u16,
}

impl Bind {
    /// `port` of all our addresses.
    pub fn port(port: u16) -> Self {
        Self { address: None, port }
    }

    /// Exactly this address and port.
    pub fn exactly(at: SocketAddr) -> Self {
        Self { address: Some(at.ip()), port: at.port() }
    }
}

impl From<u16> for Bind {
    fn from(port: u16) -> Self {
        Self::port(port)
    }
}

impl From<SocketAddr> for Bind {
    /// An unspecified address means all.
    fn from(at: SocketAddr) -> Self {
        if at.ip().is_unspecified() { Self::port(at.port()) } else { Self::exactly(at) }
    }
}

/// A running stack; clones share it. It ends with [`close`](Self::close) or when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Netstack {
    handle: Arc<Handle>,
}

impl Netstack {
    /// Starts a stack on its own thread; the data plane takes the other half.
    ///
    /// # Errors
    /// When the system gives no thread or no randomness.
    pub fn start(config: Config) -> io::Result<(Self, StackDevice)> {
        let (handle, device) = Handle::start(config)?;
        Ok((Self { handle: Arc::new(handle) }, device))
    }

    /// Replaces our addresses; connections from an address that is gone end with an error.
    pub fn set_addresses(&self, addresses: &[IpAddr]) {
        self.handle.shared.with(|stack, _| stack.set_addresses(addresses));
    }

    /// Replaces [`Config::subnets`]; connections to addresses that are in none of them any more end with an error.
    pub fn set_subnets(&self, subnets: &[IpNet]) {
        self.handle.shared.with(|stack, now| stack.set_subnets(now, subnets));
    }

    /// Our addresses.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.handle.shared.with(|stack, _| stack.addresses().to_vec())
    }

    /// Connects to `remote` from one of our addresses of its family, and a random port.
    ///
    /// # Errors
    /// `ConnectionRefused` when the peer answers with a reset, `TimedOut` after [`Config::connect_timeout`],
    /// `NetworkUnreachable` when we have no address of that family, `ResourceBusy` at [`Config::max_connections`].
    pub async fn dial_tcp(&self, remote: SocketAddr) -> io::Result<TcpStream> {
        let shared = self.open()?;
        let id = shared.with(|stack, _| stack.connect(remote))?;
        let stream = TcpStream::new(Arc::clone(shared), id)?;
        match tokio::time::timeout(shared.connect_timeout(), stream.established()).await {
            Ok(connected) => connected.map(|()| stream),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{remote} does not answer"))),
        }
    }

    /// Listens on a port of all our addresses (`80`), or of one (a `SocketAddr`); port 0 takes a free one.
    ///
    /// # Errors
    /// `AddrInUse` when there is such a listener already.
    pub fn listen_tcp(&self, bind: impl Into<Bind>) -> io::Result<TcpListener> {
        let shared = self.open()?;
        let bind = shared.with(|stack, _| {
            let backlog = stack.config().backlog;
            stack.listen(bind.into(), backlog)
        })?;
        Ok(TcpListener::new(Arc::clone(shared), bind))
    }

    /// Binds a UDP socket, as [`listen_tcp`](Self::listen_tcp) does.
    ///
    /// # Errors
    /// `AddrInUse` when there is such a socket already.
    pub fn bind_udp(&self, bind: impl Into<Bind>) -> io::Result<UdpSocket> {
        let shared = self.open()?;
        let (id, bind) = shared.with(|stack, _| stack.bind_udp(bind.into()))?;
        Ok(UdpSocket::new(Arc::clone(shared), id, bind))
    }

    fn open(&self) -> io::Result<&Arc<driver::Shared>> {
        match self.handle.shared.is_closed() {
            true => Err(io::Error::new(io::ErrorKind::NotConnected, "the stack has ended")),
            false => Ok(&self.handle.shared),
        }
    }

    /// Traffic for ports that nobody serves with [`Config::fallback`], and for [`Config::subnets`]; `None` when taken
    /// before.
    pub fn requests(&self) -> Option<Requests> {
        self.handle.requests()
    }

    /// Sends a datagram from any of our addresses and ports, as an answer to a [`UdpRequest`].
    ///
    /// # Errors
    /// `InvalidInput` when it exceeds the MTU or mixes families, `WouldBlock` when the outbox is full.
    pub fn send_datagram(&self, flow: Flow, payload: &[u8]) -> io::Result<()> {
        self.handle.shared.with(|stack, _| stack.send_datagram(flow, payload)).map_err(Into::into)
    }

    /// What passed and what was dropped.
    pub fn counters(&self) -> StackCounters {
        self.handle.shared.counters()
    }

    /// Ends the stack: connections are reset, and the device side reads end of file once it has sent that.
    pub fn close(&self) {
        self.handle.shared.close();
    }

    /// Waits until the stack has ended.
    pub async fn closed(&self) {
        let shared = &self.handle.shared;
        std::future::poll_fn(
            |context| if shared.poll_closed(context.waker()) { Poll::Ready(()) } else { Poll::Pending },
        )
        .await;
    }
}
