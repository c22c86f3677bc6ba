//! One stay in the mesh, from `up` to `down`: the engine with its relays and its coordinator.

mod incoming;
mod jobs;
mod outgoing;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_control::client::{Config, ControlEvent};
use mesh_control::driver::client::{Control, Options};
use mesh_control::netmap::Netmap;
use mesh_control::wire::Hostinfo;
use mesh_derp::driver::client::RelayEvent;
use mesh_derp::map::RegionId;
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::ClientTls;
use mesh_nat::agent::PingId;
use mesh_nat::disco::message::AllocateResponse;
use mesh_nat::driver::SpareSockets;
use mesh_noise::key::{DiscoPrivate, MachinePublic, NodePrivate, NodePublic};
use mesh_noise::random::SystemRng;
use tokio::sync::{broadcast, mpsc};

use super::control::{self, ControlTask};
use super::extra::{Arrived, ExtraSockets};
use super::relays::RelaySet;
use super::{Clock, Driver, RelaySender, Reply};
use crate::directory::Directory;
use crate::dns::MagicDns;
use crate::engine::{self, Announcement, Engine, MapView};
use crate::error::Error;
use crate::events::Event;
use crate::local_api::Via;
use crate::netcheck::NetcheckReport;
use crate::peer_relay::PeerRelay;
use crate::status::NodeState;
pub(crate) use jobs::Job;

/// Relay events that may wait; the relay's task waits when there are more.
const RELAY_QUEUE: usize = 256;
/// Answers of small jobs that may wait.
const JOB_QUEUE: usize = 16;

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
    proxies: Proxies,
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
    events: broadcast::Sender<Event>,
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
            tls: Some(tls.https(&[])?),
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
                fixed_port: driver.fixed.port_is_chosen,
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
        let proxies = driver.fixed.relay_proxies.clone();
        let way = (tls.clone(), proxies.clone());
        let relays = RelaySet::new(node_key, way, relay_sender.clone(), dataplane, events);
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
            proxies,
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
            events: driver.events.clone(),
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
}
