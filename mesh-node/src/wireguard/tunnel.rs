//! A tunnel: what was set, the WireGuard core, the data plane, and the loop between them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_nat::{Family, Path, SocketId};
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SeededRng;
use mesh_noise::wireguard::uapi::{
    AllowedIpChange, DeviceState, PeerSettings, PeerState, Request, Settings, UapiError, status,
};
use mesh_noise::wireguard::{AllowedIps, Event, Interface, PeerConfig, Timing, message};
use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use mesh_tun::filter::{Filter, Standing};
use mesh_tun::linux::queues;
use mesh_tun::linux::tun::Tun;
use mesh_tun::linux::udp::{self, UdpBatch};
use zeroize::Zeroizing;

use super::Error;
use super::control::{Command, ControlSocket};
use crate::dataplane::{self, Dataplane, NoRelay, Notice, Notices, Workers};
use crate::driver::Clock;

/// How often the loop looks at what nobody tells it: the interface's MTU, the control socket's file.
const LOOK_AROUND: Duration = Duration::from_secs(1);
/// Ports tried when the system chooses one for IPv4 that is taken for IPv6.
const PORT_TRIES: usize = 8;

const IPV4: SocketId = SocketId(0);
const IPV6: SocketId = SocketId(1);

/// What a tunnel is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// The protocol's constants.
    pub timing: Timing,
    /// 32 random bytes from the operating system.
    pub seed: [u8; 32],
    /// Sockets on the port, for each address family; as many as the device has queues.
    pub sockets: usize,
    /// Whether other threads help where one is saturated.
    pub workers: Workers,
}

impl Options {
    /// What runs well on this machine, with 32 random bytes from the operating system.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self { timing: Timing::default(), seed, sockets: queues::for_this_machine(), workers: Workers::default() }
    }
}

/// A peer, as it was set.
#[derive(Debug, Default)]
struct Peer {
    config: PeerConfig,
    /// Where it was last heard, or what was set.
    endpoint: Option<SocketAddr>,
    allowed: BTreeSet<IpNet>,
}

/// A running tunnel between a device and WireGuard peers.
#[derive(Debug)]
pub struct Tunnel {
    clock: Clock,
    device: Arc<dyn Device>,
    interface: Interface<Path>,
    plane: Dataplane,
    notices: Notices,
    sockets: BTreeMap<SocketId, Arc<UdpBatch>>,
    private: Option<NodePrivate>,
    fwmark: u32,
    sockets_each: usize,
    peers: BTreeMap<NodePublic, Peer>,
    owners: AllowedIps<NodePublic>,
}

impl Tunnel {
    /// Starts a tunnel on `device`, without a key and without peers, on a port that the system chooses.
    ///
    /// # Errors
    /// If the system refuses a socket or a thread.
    pub fn start(device: Arc<dyn Device>, options: Options) -> Result<Self, Error> {
        let clock = Clock::start();
        let mut rng = SeededRng::from_seed(options.seed);
        // Until a key is set the interface has one that nobody knows, and no peers.
        let nobody = NodePrivate::generate(&mut rng);
        let interface =
            Interface::new(clock.epoch(), clock.wall(clock.epoch()), &nobody, rng.array()).with_timing(options.timing);
        let sockets = bind(0, 0, options.sockets)?;
        let (plane, notices) = Dataplane::start(dataplane::Config {
            device: Arc::clone(&device),
            sockets: sockets.iter().map(|(id, socket)| (*id, Arc::clone(socket))).collect(),
            relay: Arc::new(NoRelay),
            flow_seed: rng.array(),
            clock: Arc::new(move || clock.activity_ms()),
            workers: options.workers,
        })
        .map_err(Error::system("start the data plane"))?;
        plane.set_filter(Filter::open(plane.flows()));
        Ok(Self {
            clock,
            device,
            interface,
            plane,
            notices,
            sockets,
            private: None,
            fwmark: 0,
            sockets_each: options.sockets,
            peers: BTreeMap::new(),
            owners: AllowedIps::new(),
        })
    }

    /// Runs until the interface or the control socket's file is deleted, or something fails.
    ///
    /// # Errors
    /// [`Error::Ended`] if the device or a socket failed.
    pub async fn run(&mut self, control: ControlSocket) -> Result<(), Error> {
        let (serving, mut commands) = control.serve();
        let mut look_around = tokio::time::interval(LOOK_AROUND);
        loop {
            tokio::select! {
                Some(notice) = self.notices.next() => self.notice(notice)?,
                Some(command) = commands.recv() => self.command(command),
                () = self.clock.sleep_until(self.interface.poll_timeout()) => {
                    let now = self.clock.now();
                    self.interface.handle_timeout(now);
                }
                _ = look_around.tick() => {
                    if serving.is_deleted() || self.device.refresh().is_err() {
                        return Ok(());
                    }
                }
            }
            self.drain();
        }
    }

    // --- What is set

    /// What is set, and what was counted.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        let peers = self.peers.iter().map(|(key, peer)| {
            let status = self.interface.status(key);
            let activity = status.as_ref().map(|status| &status.activity);
            PeerState {
                public_key: *key,
                preshared_key: peer.config.preshared.clone(),
                endpoint: peer.endpoint,
                last_handshake: status.as_ref().and_then(|status| status.last_handshake),
                tx_bytes: activity.map_or(0, |activity| activity.sent_bytes()),
                rx_bytes: activity.map_or(0, |activity| activity.received_bytes()),
                persistent_keepalive: peer.config.persistent_keepalive,
                allowed_ips: peer.allowed.iter().copied().collect(),
            }
        });
        let listen_port = self.sockets.values().next().map_or(0, |socket| socket.local_addr().port());
        DeviceState { private_key: self.private.clone(), listen_port, fwmark: self.fwmark, peers: peers.collect() }
    }

    /// Changes what is set.
    ///
    /// # Errors
    /// If a port or a mark cannot be had; what stood before it in the request has been done.
    pub fn apply(&mut self, settings: Settings) -> Result<(), UapiError> {
        if let Some(private) = settings.private_key {
            self.set_private_key(private);
        }
        if let Some(port) = settings.listen_port {
            self.set_port(port)?;
        }
        if let Some(mark) = settings.fwmark {
            self.set_mark(mark)?;
        }
        if settings.replace_peers {
            for key in self.peers.keys().copied().collect::<Vec<_>>() {
                self.remove_peer(&key);
            }
        }
        let mut changed = BTreeSet::new();
        for peer in settings.peers {
            self.apply_peer(peer, &mut changed);
        }
        self.publish(&changed);
        self.drain();
        Ok(())
    }

    fn set_private_key(&mut self, private: Option<NodePrivate>) {
        let now = self.clock.now();
        let public = private.as_ref().map(NodePrivate::public);
        if let Some(us) = &public {
            self.remove_peer(us);
        }
        match &private {
            Some(private) => self.interface.set_private_key(now, private),
            None => {
                for key in self.peers.keys() {
                    self.interface.remove_peer(key);
                }
            }
        }
        self.private = private;
        if self.private.is_some() {
            for (key, peer) in &self.peers {
                self.interface.set_peer(now, *key, peer.config.clone());
            }
        }
    }

    fn set_port(&mut self, port: u16) -> Result<(), UapiError> {
        if port != 0 && self.sockets.values().all(|socket| socket.local_addr().port() == port) {
            return Ok(());
        }
        let refused = |error: Error| {
            // EADDRINUSE, EIO
            let errno = if matches!(error, Error::AddressInUse { .. }) { 98 } else { 5 };
            UapiError::System(error.to_string(), errno)
        };
        let sockets = bind(port, self.fwmark, self.sockets_each).map_err(refused)?;
        for (id, socket) in &sockets {
            let added = self.plane.add_socket(*id, Arc::clone(socket));
            added.map_err(|error| refused(Error::system("start a thread")(error)))?;
        }
        self.sockets = sockets;
        Ok(())
    }

    fn set_mark(&mut self, mark: u32) -> Result<(), UapiError> {
        for socket in self.sockets.values() {
            socket.set_mark(mark).map_err(|error| {
                UapiError::System(format!("cannot set the mark: {error}"), error.raw_os_error().unwrap_or(1))
            })?;
        }
        self.fwmark = mark;
        Ok(())
    }

    fn apply_peer(&mut self, settings: PeerSettings, changed: &mut BTreeSet<NodePublic>) {
        let key = settings.public_key;
        let ours = self.private.as_ref().is_some_and(|_| self.interface.public() == key);
        if settings.remove {
            self.remove_peer(&key);
            changed.remove(&key);
            return;
        }
        if ours || (settings.update_only && !self.peers.contains_key(&key)) {
            return;
        }
        let peer = self.peers.entry(key).or_default();
        if let Some(preshared) = settings.preshared_key {
            peer.config.preshared = preshared;
        }
        if let Some(interval) = settings.persistent_keepalive {
            peer.config.persistent_keepalive = Some(interval).filter(|interval| !interval.is_zero());
        }
        if let Some(endpoint) = settings.endpoint {
            peer.endpoint = Some(endpoint);
        }
        if settings.replace_allowed_ips {
            for prefix in std::mem::take(&mut peer.allowed) {
                self.owners.remove(&prefix);
            }
        }
        for change in settings.allowed_ips {
            match change {
                AllowedIpChange::Add(prefix) => {
                    if let Some(previous) = self.owners.insert(prefix, key).filter(|previous| *previous != key) {
                        changed.insert(previous);
                        if let Some(previous) = self.peers.get_mut(&previous) {
                            previous.allowed.remove(&prefix);
                        }
                    }
                    if let Some(peer) = self.peers.get_mut(&key) {
                        peer.allowed.insert(prefix);
                    }
                }
                AllowedIpChange::Remove(prefix) => {
                    if let Some(peer) = self.peers.get_mut(&key).filter(|peer| peer.allowed.contains(&prefix)) {
                        peer.allowed.remove(&prefix);
                        self.owners.remove(&prefix);
                    }
                }
            }
        }
        changed.insert(key);
    }

    /// Tells the data plane and the core about peers that have changed.
    fn publish(&mut self, changed: &BTreeSet<NodePublic>) {
        let now = self.clock.now();
        let found = changed.iter().filter_map(|key| Some((*key, self.peers.get(key)?)));
        let configs: Vec<_> = found
            .map(|(key, peer)| dataplane::PeerConfig {
                key,
                allowed_ips: peer.allowed.iter().copied().collect(),
                standing: Standing::Ordinary,
            })
            .collect();
        self.plane.set_peers(&configs);
        for config in configs {
            let Some(peer) = self.peers.get(&config.key) else { continue };
            if let Some(endpoint) = peer.endpoint {
                self.plane.set_path(&config.key, Some(direct(endpoint)));
            }
            if self.private.is_some() {
                self.interface.set_peer(now, config.key, peer.config.clone());
            }
        }
    }

    fn remove_peer(&mut self, key: &NodePublic) {
        let Some(peer) = self.peers.remove(key) else { return };
        for prefix in &peer.allowed {
            self.owners.remove(prefix);
        }
        self.interface.remove_peer(key);
        self.plane.remove_peer(key);
    }

    // --- What happens

    fn command(&mut self, (request, reply): Command) {
        let answer = match request {
            Request::Get => self.state().to_answer(),
            Request::Set(settings) => {
                let outcome = self.apply(settings);
                if let Err(error) = &outcome {
                    tracing::warn!(%error, "configuration");
                }
                Zeroizing::new(status(outcome.as_ref().copied()))
            }
        };
        // A client that hung up does not want to know.
        let _ = reply.send(answer);
    }

    fn notice(&mut self, notice: Notice) -> Result<(), Error> {
        let now = self.clock.now();
        match notice {
            Notice::Datagram { path, datagram, .. } => {
                let Path::Direct { remote, .. } = path else { return Ok(()) };
                if message::kind(&datagram).is_some()
                    && let Err(reject) = self.interface.handle_datagram(now, &path, Some(remote), &datagram)
                {
                    tracing::debug!(%remote, %reject, "handshake");
                }
            }
            Notice::WantSession { peer } => self.interface.want_session(now, &peer),
            Notice::SessionUsed { receiver_index } => self.interface.session_used(now, receiver_index),
            Notice::PeerActive { peer } => self.interface.peer_active(now, &peer),
            Notice::PathSeen { peer, path } => self.moved(&peer, path),
            // There are no relays.
            Notice::SessionUnknown { .. } => {}
            // Without a mesh, protocol 99 is a packet like any other.
            Notice::Tsmp { packet, .. } => {
                let mut batch = Batch::new(1, packet.len());
                batch.push(&packet);
                // A device that is gone says so to its reader.
                let _ = self.device.write_batch(&mut batch);
            }
            Notice::Failed { what } => return Err(Error::Ended { what }),
        }
        Ok(())
    }

    /// An authentic datagram of the peer's came by this path: that is where it is.
    fn moved(&mut self, key: &NodePublic, path: Path) {
        if let (Path::Direct { remote, .. }, Some(peer)) = (path, self.peers.get_mut(key)) {
            if peer.endpoint != Some(remote) {
                tracing::debug!(peer = ?key, %remote, "the peer has moved");
                peer.endpoint = Some(remote);
            }
            if self.plane.path(key) != Some(path) {
                self.plane.set_path(key, Some(path));
            }
        }
    }

    fn drain(&mut self) {
        while let Some(event) = self.interface.poll_event() {
            match event {
                Event::SessionOpened { session, .. } => self.plane.session_opened(&session),
                Event::SessionReady { session, .. } => self.plane.session_ready(&session),
                Event::SessionClosed { peer, receiver_index } => self.plane.session_closed(&peer, receiver_index),
                Event::HandshakeFailed { peer } => self.plane.handshake_failed(&peer),
                Event::Authenticated { peer, path } => self.moved(&peer, path),
            }
        }
        while let Some(transmit) = self.interface.poll_transmit() {
            let path = transmit.path.or_else(|| self.plane.path(&transmit.peer?));
            match path {
                Some(path) => drop(self.plane.send(&path, transmit.peer, &transmit.datagram)),
                None => tracing::debug!(peer = ?transmit.peer, "no endpoint is known"),
            }
        }
    }
}

fn direct(remote: SocketAddr) -> Path {
    let socket = match Family::of(&remote) {
        Family::V4 => IPV4,
        Family::V6 => IPV6,
    };
    Path::Direct { socket, remote }
}

/// Binds one port for both families; only IPv4 where the system has no IPv6.
fn bind(port: u16, mark: u32, sockets: usize) -> Result<BTreeMap<SocketId, Arc<UdpBatch>>, Error> {
    let config = |mut config: udp::Config| {
        config.mark = Some(mark).filter(|mark| *mark != 0);
        config.datagram_size = MAX_DATAGRAM;
        config.sockets = sockets;
        config
    };
    let mut tries = PORT_TRIES;
    loop {
        let v4 = UdpBatch::bind(&config(udp::Config::ipv4(port)))?;
        tries -= 1;
        match UdpBatch::bind(&config(udp::Config::ipv6(v4.local_addr().port()))) {
            Ok(v6) => return Ok([(IPV4, v4), (IPV6, v6)].into()),
            Err(error @ mesh_tun::Error::AddressInUse { .. }) if port != 0 || tries == 0 => return Err(error.into()),
            Err(mesh_tun::Error::AddressInUse { .. }) => {}
            Err(error) => {
                tracing::debug!(%error, "without IPv6");
                return Ok([(IPV4, v4)].into());
            }
        }
    }
}

/// Longest packet that an administrator may set as MTU, and the datagram around it.
pub(super) const MAX_PACKET: u16 = 9000;
const MAX_DATAGRAM: usize = MAX_PACKET as usize + 80;

impl Tunnel {
    /// Makes the TUN device that a tunnel wants: MTU 1420, which fits IPv6 on Ethernet, raised or lowered at will; with so
    /// many queues to read.
    ///
    /// # Errors
    /// As [`Tun::open`].
    pub fn open_device(name: &str, queues: usize) -> Result<Arc<Tun>, Error> {
        let mut config = mesh_tun::linux::tun::Config::named(name);
        (config.mtu, config.packet_size) = (1420, Some(MAX_PACKET));
        config.queues = queues;
        Ok(Arc::new(Tun::open(&config)?))
    }
}
