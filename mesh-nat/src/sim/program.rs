//! What listens on a host, besides the node's agent.

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use mesh_noise::key::NodePublic;
use rand::rngs::StdRng;

use super::host::HostId;
use super::sockets::Sockets;
use super::world::World;
use crate::path::{Family, SocketId};
use crate::stun::Responder;

/// Names one request over a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// A program on a host. Any core fits: hand it what comes, then send what it polls.
///
/// A host offers every datagram that is not for its agent to its programs in turn, until one takes it.
pub trait Program: Any {
    /// A datagram came to one of the host's sockets. Returns whether it was for this program.
    fn handle_datagram(&mut self, io: &mut Io<'_>, socket: SocketId, from: SocketAddr, datagram: &[u8]) -> bool;

    /// A frame came from a node through a relay. Returns whether it was for this program.
    fn handle_frame(&mut self, io: &mut Io<'_>, from: NodePublic, frame: &[u8]) -> bool {
        let _ = (io, from, frame);
        false
    }

    /// A request was answered; `None` if nobody was there.
    fn handle_reply(&mut self, io: &mut Io<'_>, id: RequestId, reply: Option<&[u8]>) {
        let _ = (io, id, reply);
    }

    /// Does what is due.
    fn handle_timeout(&mut self, io: &mut Io<'_>) {
        let _ = io;
    }

    /// When to be called again.
    fn poll_timeout(&self) -> Option<Instant> {
        None
    }
}

/// What a program can do.
#[derive(Debug)]
pub struct Io<'a> {
    /// The time.
    pub now: Instant,
    /// Where chance comes from.
    pub rng: &'a mut StdRng,
    pub(super) sockets: &'a mut Sockets,
    pub(super) addresses: &'a [IpAddr],
    pub(super) gateway: Option<IpAddr>,
    pub(super) next_request: &'a mut u64,
    pub(super) out: Vec<Outgoing>,
}

/// What a program wants done.
#[derive(Debug)]
pub(super) enum Outgoing {
    Datagram { socket: SocketId, to: SocketAddr, datagram: Vec<u8> },
    Request { id: RequestId, to: SocketAddr, request: Vec<u8> },
    Close(SocketId),
}

impl Io<'_> {
    /// Sends a datagram.
    pub fn send(&mut self, socket: SocketId, to: SocketAddr, datagram: Vec<u8>) {
        self.out.push(Outgoing::Datagram { socket, to, datagram });
    }

    /// Opens a socket on `port`, or on any if that is 0 or taken.
    pub fn open(&mut self, family: Family, port: u16) -> SocketId {
        self.sockets.open(family, port)
    }

    /// Closes a socket once what was sent before has left.
    pub fn close(&mut self, socket: SocketId) {
        self.out.push(Outgoing::Close(socket));
    }

    /// The port of a socket.
    #[must_use]
    pub fn port(&self, socket: SocketId) -> Option<u16> {
        self.sockets.port(socket)
    }

    /// The host's own addresses.
    #[must_use]
    pub const fn addresses(&self) -> &[IpAddr] {
        self.addresses
    }

    /// The address of the gateway of the host's network.
    #[must_use]
    pub const fn gateway(&self) -> Option<IpAddr> {
        self.gateway
    }

    /// Sends a request over a stream, as HTTP would, to a gateway. The answer comes two round trips later.
    pub fn request(&mut self, to: SocketAddr, request: Vec<u8>) -> RequestId {
        let id = RequestId(*self.next_request);
        *self.next_request += 1;
        self.out.push(Outgoing::Request { id, to, request });
        id
    }
}

/// Answers binding requests on every socket of its host.
#[derive(Debug, Default)]
pub struct StunServer(pub Responder);

impl Program for StunServer {
    fn handle_datagram(&mut self, io: &mut Io<'_>, socket: SocketId, from: SocketAddr, datagram: &[u8]) -> bool {
        let Ok(answer) = self.0.handle_datagram(from, datagram) else { return false };
        io.send(socket, from, answer.datagram);
        true
    }
}

impl World {
    /// Adds a program to a host. It is called for the first time at once, as if by a timeout.
    pub fn add_program(&mut self, host: HostId, program: impl Program) {
        self.hosts[host.0].programs.push(Some(Box::new(program)));
        let index = self.hosts[host.0].programs.len() - 1;
        self.call_program(host, index, |program, io| program.handle_timeout(io));
        self.settle(host);
    }

    /// The host's first program of a type.
    #[must_use]
    pub fn program<P: Program>(&self, host: HostId) -> Option<&P> {
        self.hosts[host.0].programs.iter().flatten().find_map(|program| {
            let program: &dyn Any = program.as_ref();
            program.downcast_ref()
        })
    }

    /// Calls the host's first program of a type, then sends what it wants sent. `None` if there is none.
    pub fn with_program<P: Program, T>(
        &mut self,
        host: HostId,
        call: impl FnOnce(&mut P, &mut Io<'_>) -> T,
    ) -> Option<T> {
        let index = self.hosts[host.0].programs.iter().position(|program| {
            program.as_ref().is_some_and(|program| {
                let program: &dyn Any = program.as_ref();
                program.is::<P>()
            })
        })?;
        let result = self.call_program(host, index, |program, io| {
            let program: &mut dyn Any = program;
            program.downcast_mut().map(|program| call(program, io))
        });
        self.settle(host);
        result.flatten()
    }

    /// Calls one program and does what it wants done.
    pub(super) fn call_program<T>(
        &mut self,
        host: HostId,
        index: usize,
        call: impl FnOnce(&mut dyn Program, &mut Io<'_>) -> T,
    ) -> Option<T> {
        let addresses = self.addresses(host);
        let gateway = self.gateway_address(host);
        let place = &mut self.hosts[host.0];
        let mut program = place.programs.get_mut(index)?.take()?;
        let mut io = Io {
            now: self.now,
            rng: &mut self.rng,
            sockets: &mut place.sockets,
            addresses: &addresses,
            gateway,
            next_request: &mut self.next_request,
            out: Vec::new(),
        };
        let result = call(program.as_mut(), &mut io);
        let out = io.out;
        if let Some(slot) = self.hosts[host.0].programs.get_mut(index) {
            *slot = Some(program);
        }
        for outgoing in out {
            match outgoing {
                Outgoing::Datagram { socket, to, datagram } => self.emit(host, socket, to, datagram),
                Outgoing::Request { id, to, request } => self.request(host, id, to, &request),
                Outgoing::Close(socket) => self.close_socket(host, socket),
            }
        }
        Some(result)
    }
}
