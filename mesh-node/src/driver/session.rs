//! One stay in the mesh, from `up` to `down`: the engine with its relays and its coordinator.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_control::client::{Config, ControlEvent, Problem};
use mesh_control::driver::client::{Control, Options};
use mesh_control::netmap::Netmap;
use mesh_control::wire::Hostinfo;
use mesh_derp::driver::client::{RelayEvent, latency_check};
use mesh_derp::map::{DerpRegion, FamilyAddress, RegionId};
use mesh_derp::tls::ClientTls;
use mesh_nat::agent::PingId;
use mesh_nat::disco::message::AllocateResponse;
use mesh_nat::driver::{SpareSockets, look_for_portal};
use mesh_nat::{Family, Path, SocketId};
use mesh_noise::key::{DiscoPrivate, DiscoPublic, MachinePublic, NodePrivate, NodePublic};
use mesh_noise::random::SystemRng;
use mesh_tun::linux::BYPASS_MARK;
use tokio::sync::mpsc;

use super::control::{self, ControlTask};
use super::extra::{Arrived, ExtraSockets};
use super::relays::RelaySet;
use super::{Clock, Driver, HostNetwork, Plane, RelaySender, Reply, answer};
use crate::dataplane::Notice;
use crate::directory::Directory;
use crate::dns::MagicDns;
use crate::engine::{self, Announcement, Command, Endpoint, Engine, Event, Hop, Local, MapView};
use crate::error::Error;
use crate::local_api::Via;
use crate::netcheck::NetcheckReport;
use crate::peer_relay::PeerRelay;
use crate::prefs::PathMode;
use crate::status::NodeState;

/// Relay events that may wait; the relay's task waits when there are more.
const RELAY_QUEUE: usize = 256;
/// Answers of small jobs that may wait.
const JOB_QUEUE: usize = 16;
/// How long one HTTPS measurement, or one look-up of a name, may take.
const JOB_TIMEOUT: Duration = Duration::from_secs(3);

/// Stands for any of the sockets that were opened for a measurement.
const SPARE: SocketId = SocketId(u16::MAX);

/// What a session waits for.
#[derive(Debug)]
pub(crate) enum Input {
    Control(Option<(ControlEvent, Option<MachinePublic>)>),
    Relay(RegionId, RelayEvent),
    Job(Job),
    /// Arrived on a socket that was opened for a measurement.
    Spare(SocketAddr, Vec<u8>),
    /// Arrived on a socket that ports are guessed with.
    Extra(Arrived),
}

/// What small jobs beside the session have found out.
#[derive(Debug)]
pub(crate) enum Job {
    Https(RegionId, Option<(Duration, Family)>),
    Resolved(String, Vec<IpAddr>),
    Portal(Option<bool>),
    Sockets(Vec<(SocketId, SocketAddr)>),
}

/// The engine and the tasks that serve it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(super) engine: Engine,
    control: ControlTask,
    hostinfo: Hostinfo,
    relays: RelaySet,
    relay_sender: RelaySender,
    relay_events: mpsc::Receiver<(RegionId, RelayEvent)>,
    peer_relay: Option<Arc<PeerRelay>>,
    peer_relay_addresses: Vec<SocketAddr>,
    jobs: mpsc::Receiver<Job>,
    job_sender: mpsc::Sender<Job>,
    tls: ClientTls,
    pub(super) netmap: Option<Arc<Netmap>>,
    map: Arc<MapView>,
    state: NodeState,
    pub(super) control_connected: bool,
    pub(super) control_problem: Option<String>,
    pub(super) clock_problem: Option<String>,
    pub(super) relay_problems: BTreeMap<RegionId, String>,
    accepted_keys: Option<(NodePrivate, Option<MachinePublic>)>,
    directory: Option<Directory>,
    names: Option<MagicDns>,
    pings: BTreeMap<PingId, Reply<(Via, Duration)>>,
    netchecks: Vec<Reply<NetcheckReport>>,
    /// Allocations on our peer relay that the engine has not heard of yet.
    allocated: Vec<(NodePublic, AllocateResponse)>,
    clock: Clock,
    /// Sockets that live as long as a measurement.
    spare: SpareSockets,
    /// Sockets to guess ports with.
    extra: ExtraSockets,
}

impl Session {
    /// Starts to connect, as the driver's preferences say.
    pub(super) fn start(driver: &Driver, auth_key: Option<String>) -> Result<Self, Error> {
        let now = driver.clock.now();
        let (node_key, known) = match driver.state.node_key()? {
            Some(key) => (key, true),
            None => (NodePrivate::generate(&mut SystemRng), false),
        };
        let disco = DiscoPrivate::generate(&mut SystemRng);
        let mut hostinfo = control::hostinfo(driver.prefs.hostname.as_deref(), driver.fixed.device == "userspace");
        hostinfo.peer_relay = driver.peer_relay.is_some();
        let description = control::description(&hostinfo, disco.public(), &Announcement::default());
        let tls = driver.fixed.relay_tls.clone();
        let seed = || SystemRng.array();
        let mut client = Config::new(node_key.clone(), description);
        client.ephemeral = driver.fixed.ephemeral;
        let options = Options {
            url: driver.prefs.control_url.clone().unwrap_or_default(),
            machine: driver.fixed.machine.clone(),
            control: driver.state.control_key()?.filter(|_| known),
            tls: Some(tls.https(&[]).map_err(|error| Error::Tls(error.to_string()))?),
            client,
        };
        let mut control = Control::new(options, seed()).map_err(|problem| Error::Setting(problem.to_string()))?;
        control.login(auth_key);
        let mut engine = Engine::new(
            now,
            engine::Config {
                private: node_key.clone(),
                disco,
                seed: seed(),
                epoch: driver.clock.epoch(),
                wall: driver.clock.wall(driver.clock.epoch()),
                mode: driver.prefs.path_mode,
                static_endpoints: driver.fixed.static_endpoints.clone(),
                port_guessing: driver.fixed.port_guessing,
                timing: driver.fixed.timing.clone(),
            },
        );
        engine.set_device_mtu(now, driver.plane.dataplane().device_mtu());
        engine.set_local(now, driver.host.local(driver.fixed.loopback_endpoints), &driver.host.sockets.ids());
        let (events, relay_events) = mpsc::channel(RELAY_QUEUE);
        let (job_sender, jobs) = mpsc::channel(JOB_QUEUE);
        let relay_sender = driver.relay_sender.clone();
        let dataplane = driver.plane.dataplane();
        let relays = RelaySet::new(node_key, tls.clone(), relay_sender.clone(), dataplane, events);
        Ok(Self {
            engine,
            control: ControlTask::spawn(control),
            hostinfo,
            relays,
            relay_sender,
            relay_events,
            peer_relay: driver.peer_relay.clone(),
            peer_relay_addresses: driver.fixed.peer_relay_addresses.clone(),
            jobs,
            job_sender,
            tls,
            netmap: None,
            map: Arc::default(),
            state: NodeState::STARTING,
            control_connected: false,
            control_problem: None,
            clock_problem: None,
            relay_problems: BTreeMap::new(),
            accepted_keys: None,
            directory: None,
            names: None,
            pings: BTreeMap::new(),
            netchecks: Vec::new(),
            allocated: Vec::new(),
            clock: driver.clock,
            spare: SpareSockets::new(),
            extra: ExtraSockets::new(),
        })
    }

    pub(super) fn state(&self) -> &NodeState {
        &self.state
    }

    /// Whether a session that was asked for the same things again need not start anew: it runs, or waits for somebody and
    /// no key has come that would make that unnecessary.
    pub(super) fn goes_on(&self, has_key: bool) -> bool {
        match self.state {
            NodeState::Running => true,
            NodeState::NeedsLogin { .. } => !has_key,
            NodeState::Starting { .. } | NodeState::Stopped { .. } => false,
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.engine.poll_timeout()
    }

    /// Keys to be stored: ours, and the coordinator's.
    pub(super) fn take_accepted_keys(&mut self) -> Option<(NodePrivate, Option<MachinePublic>)> {
        self.accepted_keys.take()
    }

    /// Names to be published, if they have changed.
    pub(super) fn take_directory(&mut self) -> Option<Directory> {
        self.directory.take()
    }

    /// Names to be answered, if they have changed.
    pub(super) fn take_names(&mut self) -> Option<MagicDns> {
        self.names.take()
    }

    /// Waits for the next input. Safe to cancel.
    pub(super) async fn next_event(&mut self) -> Input {
        tokio::select! {
            event = self.control.next_event() => Input::Control(event),
            Some((region, event)) = self.relay_events.recv() => Input::Relay(region, event),
            Some(job) = self.jobs.recv() => Input::Job(job),
            (source, datagram) = self.spare.receive() => Input::Spare(source, datagram),
            Some(arrived) = self.extra.receive() => Input::Extra(arrived),
        }
    }

    // --- inputs ------------------------------------------------------------------------------------------------------

    pub(super) fn handle_event(&mut self, now: Instant, input: Input) {
        match input {
            Input::Control(Some((event, control_key))) => self.handle_control(now, event, control_key),
            Input::Control(None) => {
                self.stop("the connection to the coordinator has failed; restart the node".to_owned());
            }
            Input::Relay(region, event) => self.handle_relay(now, region, event),
            Input::Extra(Arrived { socket, source, datagram }) => {
                let path = Path::Direct { socket, remote: source };
                self.engine.handle_datagram(now, &Hop { path, node: None }, &datagram);
            }
            Input::Job(Job::Https(region, measured)) => self.engine.https_latency(now, region, measured),
            Input::Job(Job::Resolved(host, addresses)) => self.engine.resolved(now, &host, addresses),
            Input::Job(Job::Portal(found)) => self.engine.portal(now, found),
            Input::Job(Job::Sockets(opened)) => self.engine.spare_sockets(now, &opened),
            Input::Spare(remote, datagram) => {
                // Whichever of them it was: what is answered names itself.
                let path = Path::Direct { socket: SPARE, remote };
                self.engine.handle_datagram(now, &Hop { path, node: None }, &datagram);
            }
        }
    }

    fn stop(&mut self, error: String) {
        self.state = NodeState::Stopped { error: Some(error) };
    }

    fn handle_control(&mut self, now: Instant, event: ControlEvent, control_key: Option<MachinePublic>) {
        match event {
            ControlEvent::AuthUrl(url) => self.state = NodeState::NeedsLogin { url },
            ControlEvent::Registered(registered) => {
                if registered.node_key.public() != self.engine.node_key() {
                    self.engine.set_private_key(now, &registered.node_key);
                    self.relays.set_key(registered.node_key.clone());
                }
                if !self.state.is_running() {
                    self.state = NodeState::STARTING;
                    if !registered.machine_authorized {
                        self.wait("an administrator has to approve this machine".to_owned(), false);
                    }
                }
                self.accepted_keys = Some((registered.node_key, control_key));
            }
            ControlEvent::Netmap { netmap, .. } => self.handle_netmap(now, netmap),
            ControlEvent::Expired => {
                self.control_problem = Some("the node's key has expired: sign in again with `mesh login`".to_owned());
            }
            ControlEvent::Unreachable { reason, retry_in } => {
                tracing::info!(%reason, ?retry_in, "coordinator");
                self.control_connected = false;
                self.engine.set_control_connected(now, false);
                self.wait(reason.to_string(), reason.needs_attention());
            }
            ControlEvent::Error(problem) => self.refused(problem),
            ControlEvent::ClockSkew { by, ahead } => {
                let direction = if ahead { "ahead of" } else { "behind" };
                let warning = format!(
                    "this machine's clock is {} {direction} the coordinator's: set it, then restart this node",
                    span(by)
                );
                tracing::warn!("{warning}");
                self.clock_problem = Some(warning);
            }
            ControlEvent::OpenBrowser(url) => tracing::info!(url, "the coordinator asks you to open this page"),
            ControlEvent::LoggedOut(_) => self.state = NodeState::Stopped { error: None },
            ControlEvent::Ping(_) => {}
            _ => {}
        }
    }

    /// The coordinator cannot be used now; a node that runs goes on without it.
    fn wait(&mut self, problem: String, needs_attention: bool) {
        if !self.state.is_running() {
            self.state = NodeState::Starting { error: Some(problem.clone()), needs_attention };
        }
        self.control_problem = Some(problem);
    }

    fn refused(&mut self, problem: Problem) {
        self.stop(problem.to_string());
    }

    fn handle_netmap(&mut self, now: Instant, netmap: Arc<Netmap>) {
        self.control_connected = true;
        self.control_problem = None;
        let map = Arc::new(MapView::of(&netmap));
        self.map = Arc::clone(&map);
        self.engine.set_control_connected(now, true);
        self.engine.set_map(now, map);
        self.directory = Some(Directory::of(&netmap));
        self.names = Some(names(&netmap));
        match netmap.node() {
            Some(node) if node.machine_authorized => self.state = NodeState::Running,
            Some(_) => {
                let error = Some("an administrator has to approve this machine".to_owned());
                self.state = NodeState::Starting { error, needs_attention: false };
            }
            None => {}
        }
        self.netmap = Some(netmap);
    }

    fn handle_relay(&mut self, now: Instant, region: RegionId, event: RelayEvent) {
        match event {
            RelayEvent::Connected { .. } => {
                self.relay_problems.remove(&region);
                self.engine.set_relay_connected(now, region, true);
            }
            RelayEvent::Disconnected { reason } => {
                tracing::info!(%region, reason, "relay connection lost");
                self.relay_problems.insert(region, reason);
                self.engine.set_relay_connected(now, region, false);
            }
            RelayEvent::Packet { source, payload } => {
                let hop = Hop { path: Path::Relay { region }, node: Some(source) };
                self.engine.handle_datagram(now, &hop, &payload);
            }
            RelayEvent::PeerGone { peer, .. } => {
                tracing::debug!(%region, peer = peer.short(), "not at this relay");
                self.engine.peer_not_at_relay(now, &peer);
            }
            RelayEvent::Health(problem) => {
                if problem.is_empty() {
                    self.relay_problems.remove(&region);
                } else {
                    self.relay_problems.insert(region, problem);
                }
            }
            _ => {}
        }
    }

    pub(super) fn handle_notice(&mut self, now: Instant, notice: Notice) {
        match notice {
            Notice::Datagram { path, source, datagram } => {
                self.engine.handle_datagram(now, &Hop { path, node: source }, &datagram);
            }
            Notice::WantSession { peer } => self.engine.want_session(now, &peer),
            Notice::SessionUsed { receiver_index } => self.engine.session_used(now, receiver_index),
            Notice::PeerActive { peer } => self.engine.peer_active(now, &peer),
            Notice::Failed { what } => self.stop(format!("{what}; restart the node")),
            Notice::PathSeen { peer, path } => self.engine.path_seen(now, &peer, path),
            // Nothing is asked by TSMP yet.
            Notice::Tsmp { .. } => {}
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.engine.handle_timeout(now);
    }

    pub(super) fn set_local(&mut self, now: Instant, local: Local, host: &HostNetwork) {
        let here = |address| local.addresses.contains(address);
        let moved = !self.engine.local().addresses.iter().all(here);
        self.engine.set_local(now, local, &host.sockets.ids());
        if moved {
            tracing::info!("this host's addresses have changed; connecting anew");
            self.relays.reconnect();
        }
        if moved && self.state.is_running() {
            self.control.reconnect();
        } else {
            self.control.retry_now();
        }
    }

    /// The machine has slept: whoever was connected has given up on us, and NATs have forgotten.
    pub(super) fn resumed(&mut self, now: Instant) {
        self.engine.resumed(now);
        self.relays.reconnect();
        if self.state.is_running() {
            self.control.reconnect();
        } else {
            self.control.retry_now();
        }
    }

    pub(super) fn set_mode(&mut self, now: Instant, mode: PathMode) {
        self.engine.set_mode(now, mode);
    }

    pub(super) fn ping(&mut self, now: Instant, peer: NodePublic, size: Option<usize>, reply: Reply<(Via, Duration)>) {
        match self.engine.ping(now, &peer, size) {
            Some(id) => {
                self.pings.insert(id, reply);
            }
            None => answer(reply, Err(Error::UnknownPeer(peer.short()))),
        }
    }

    pub(super) fn netcheck(&mut self, now: Instant, reply: Reply<NetcheckReport>) {
        self.netchecks.push(reply);
        self.engine.measure(now);
    }

    pub(super) async fn logout(&mut self) -> Result<(), Error> {
        self.control.logout().await.map_err(|problem| {
            let why = problem.map_or_else(|| "it does not answer".to_owned(), |problem| problem.to_string());
            Error::Refused(format!("signed out here, but the coordinator could not be told: {why}"))
        })
    }

    // --- outputs -----------------------------------------------------------------------------------------------------

    /// Carries out everything that the engine has decided.
    pub(super) fn drain(&mut self, plane: &mut Plane, host: &mut HostNetwork) {
        loop {
            while let Some(command) = self.engine.poll_command() {
                self.carry_out(command, plane, host);
            }
            let Some((to, response)) = self.allocated.pop() else { break };
            self.engine.allocated(self.clock.now(), to, response);
        }
        while let Some(transmit) = self.engine.poll_transmit() {
            match (transmit.path, transmit.node) {
                (Path::Relay { region }, Some(node)) => {
                    if !self.relay_sender.send_one(region, node, Bytes::from(transmit.datagram)) {
                        tracing::debug!(%region, "no room, or no connection, for a datagram to this relay");
                    }
                }
                (Path::Relay { .. }, None) => {}
                (Path::Direct { socket, remote }, _) if self.extra.contains(socket) => {
                    self.extra.send(socket, remote, &transmit.datagram);
                }
                (Path::Direct { socket, remote }, _) if self.spare.contains(socket) => {
                    self.spare.send(socket, remote, &transmit.datagram);
                }
                (Path::Direct { socket, remote }, _) => plane.send_to(socket, remote, &transmit.datagram),
                // The engine makes datagrams to the server of these.
                (Path::PeerRelay { .. }, _) => {}
            }
        }
        while let Some(event) = self.engine.poll_event() {
            self.tell(event);
        }
        self.pings.retain(|_, reply| !reply.is_closed());
    }

    fn carry_out(&mut self, command: Command, plane: &mut Plane, host: &mut HostNetwork) {
        match command {
            Command::Relays(plan) => self.relays.set_plan(plan),
            Command::Regions(map) => self.relays.set_map(map),
            Command::Announce(announcement) => {
                if let Some(relay) = &self.peer_relay {
                    let (known, told) = (&announcement.endpoints, &self.peer_relay_addresses);
                    relay.set_addresses(peer_relay_addresses(relay.bound(), known, told));
                }
                let disco = self.engine.disco_key();
                self.control.describe(control::description(&self.hostinfo, disco, &announcement));
            }
            Command::MeasureHttps(region) => self.measure_https(region),
            Command::Resolve(host) => self.resolve(host),
            Command::Allocate { from, clients, generation } => self.allocate(from, clients, generation),
            Command::LookForPortal(checks) => {
                self.job(async move { Job::Portal(look_for_portal(checks).await) });
            }
            Command::OpenSockets(count) => {
                let opened = self.spare.open(count, Some(BYPASS_MARK));
                self.job(std::future::ready(Job::Sockets(opened)));
            }
            Command::CloseSockets => self.spare = SpareSockets::new(),
            Command::OpenExtra(count) => {
                let opened = self.extra.open(count);
                self.engine.extra_opened(self.clock.now(), opened);
            }
            Command::CarryExtra(id) => {
                if let Some(socket) = self.extra.take(id) {
                    plane.carry(id, socket);
                }
            }
            Command::CloseExtra(id) => {
                if !self.extra.close(id) {
                    plane.carry_no_more(id);
                }
            }
            Command::Configure(map) => {
                host.configure(&map);
                plane.apply(Command::Configure(map));
            }
            Command::SetPeers(_)
            | Command::RemovePeer(_)
            | Command::SetPath(..)
            | Command::SetBackup(..)
            | Command::SetLimit(..)
            | Command::OpenSession(_)
            | Command::UseSession(_)
            | Command::CloseSession(..)
            | Command::GiveUp(_) => plane.apply(command),
        }
    }

    /// Somebody who may asks for an allocation on our peer relay. Without an answer it is asked again.
    fn allocate(&mut self, from: NodePublic, clients: [DiscoPublic; 2], generation: u32) {
        let Some(relay) = &self.peer_relay else { return };
        match relay.allocate(clients) {
            Ok(endpoint) => {
                self.allocated.push((from, AllocateResponse { generation, endpoint }));
            }
            Err(reason) => tracing::debug!(%reason, peer = from.short(), "no allocation on our peer relay"),
        }
    }

    fn measure_https(&self, id: RegionId) {
        let Some(region) = self.map.derp.regions.get(&id).cloned() else { return };
        let tls = self.tls.clone();
        self.job(async move {
            let measured = tokio::time::timeout(JOB_TIMEOUT, latency_check(&region, &tls)).await;
            let latency = measured.ok().and_then(Result::ok);
            Job::Https(id, latency.map(|latency| (latency, likely_family(&region))))
        });
    }

    fn resolve(&self, host: String) {
        self.job(async move {
            let looked_up = tokio::time::timeout(JOB_TIMEOUT, tokio::net::lookup_host((host.clone(), 0))).await;
            let addresses = match looked_up {
                Ok(Ok(found)) => found.map(|address| address.ip()).collect(),
                Ok(Err(_)) | Err(_) => Vec::new(),
            };
            Job::Resolved(host, addresses)
        });
    }

    fn job(&self, job: impl Future<Output = Job> + Send + 'static) {
        let sender = self.job_sender.clone();
        tokio::spawn(async move {
            // A session that has ended needs no answer.
            sender.send(job.await).await.ok()
        });
    }

    fn tell(&mut self, event: Event) {
        match event {
            Event::PathChanged { peer, path, why } => match path {
                Some(path) => tracing::info!(peer = peer.short(), via = path_kind(&path), %why, "path"),
                None => tracing::info!(peer = peer.short(), %why, "no path"),
            },
            Event::PingAnswered { id, path, latency } => {
                if let Some(reply) = self.pings.remove(&id) {
                    answer(reply, Ok((path.into(), latency)));
                }
            }
            Event::PingFailed { id } => {
                if let Some(reply) = self.pings.remove(&id) {
                    answer(reply, Err(Error::Timeout(Duration::from_secs(5))));
                }
            }
            Event::PeerSilent { peer } => tracing::info!(peer = peer.short(), "no answer to handshakes"),
            Event::Measured(report) => {
                for reply in self.netchecks.drain(..) {
                    let port_mapping = self.engine.port_mappings().into();
                    answer(reply, Ok(NetcheckReport { port_mapping, ..NetcheckReport::from(&*report) }));
                }
            }
        }
    }
}

fn path_kind(path: &Path) -> &'static str {
    match path {
        Path::Direct { .. } => "direct",
        Path::PeerRelay { .. } => "peer relay",
        Path::Relay { .. } => "relay",
    }
}

/// Where our peer relay may be reached: what the user says, and its ports at every address that we know of ourselves.
fn peer_relay_addresses(
    bound: impl Iterator<Item = SocketAddr>,
    known: &[Endpoint],
    told: &[SocketAddr],
) -> Vec<SocketAddr> {
    let mut addresses = told.to_vec();
    for bound in bound {
        for endpoint in known.iter().filter(|endpoint| endpoint.address.is_ipv4() == bound.is_ipv4()) {
            let address = SocketAddr::new(endpoint.address.ip(), bound.port());
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    addresses
}

/// The family that an HTTPS connection to this region most likely uses.
fn likely_family(region: &DerpRegion) -> Family {
    let v4 = region.relays().any(|node| !matches!(node.v4(), FamilyAddress::Disabled));
    if v4 { Family::V4 } else { Family::V6 }
}

/// A time in its largest unit.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{seconds} seconds"),
        120..7_200 => format!("{} minutes", seconds / 60),
        7_200..172_800 => format!("{} hours", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// The names that MagicDNS answers.
fn names(netmap: &Netmap) -> MagicDns {
    let mut names = MagicDns::new(netmap.dns_suffix().unwrap_or_default());
    for node in netmap.node().into_iter().chain(netmap.peers().values().map(|node| &**node)) {
        let addresses: Vec<IpAddr> = node.addresses.iter().map(ipnet::IpNet::addr).collect();
        if !names.insert(node.name.trim_end_matches('.'), &addresses) {
            tracing::debug!(name = node.name, "not a name that DNS can answer");
        }
    }
    names
}
