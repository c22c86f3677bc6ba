//! What a session is told, by its own tasks and by the driver.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_control::client::{ControlEvent, Problem};
use mesh_control::netmap::Netmap;
use mesh_derp::driver::client::RelayEvent;
use mesh_derp::map::RegionId;
use mesh_nat::{Path, SocketId};
use mesh_noise::key::{MachinePublic, NodePublic};

use super::{Arrived, Input, Job, Session};
use crate::dataplane::Notice;
use crate::directory::Directory;
use crate::dns::MagicDns;
use crate::driver::{HostNetwork, Reply, answer};
use crate::engine::{Hop, LinkChange, Local, MapView};
use crate::error::Error;
use crate::local_api::Via;
use crate::netcheck::NetcheckReport;
use crate::prefs::PathMode;
use crate::status::NodeState;

/// Stands for any of the sockets that were opened for a measurement.
const SPARE: SocketId = SocketId(u16::MAX);

impl Session {
    pub(in crate::driver) fn handle_event(&mut self, now: Instant, input: Input) {
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
            RelayEvent::Restarting { reconnect_in } => tracing::debug!(%region, ?reconnect_in, "relay restarts"),
            _ => {}
        }
    }

    pub(in crate::driver) fn handle_notice(&mut self, now: Instant, notice: Notice) {
        match notice {
            Notice::Datagram { path, source, datagram } => {
                self.engine.handle_datagram(now, &Hop { path, node: source }, &datagram);
            }
            Notice::WantSession { peer } => self.engine.want_session(now, &peer),
            Notice::SessionUsed { receiver_index } => self.engine.session_used(now, receiver_index),
            Notice::PeerActive { peer } => self.engine.peer_active(now, &peer),
            Notice::Failed { what } => self.stop(format!("{what}; restart the node")),
            Notice::PathSeen { peer, path } => self.engine.path_seen(now, &peer, path),
            Notice::SessionUnknown { peer } => self.engine.session_unknown(now, &peer),
            Notice::Tsmp { peer, packet } => self.engine.tsmp(now, &peer, &packet),
        }
    }

    pub(in crate::driver) fn handle_timeout(&mut self, now: Instant) {
        if let Some(home) = self.engine.home().filter(|home| self.relays.take_heard(*home)) {
            self.engine.relay_heard(now, home);
        }
        self.engine.handle_timeout(now);
    }

    pub(in crate::driver) fn set_local(&mut self, now: Instant, local: Local, host: &HostNetwork) {
        let change = self.engine.set_local(now, local, &host.sockets.ids());
        match change {
            Some(LinkChange::Address) => {
                tracing::info!("this host's addresses have changed; connecting anew");
                self.relays.reconnect();
            }
            Some(LinkChange::Route) => {
                tracing::info!("this host's default route has changed; looking what still works");
                self.relays.check();
            }
            Some(LinkChange::Minor) | None => {}
        }
        if change.is_some_and(LinkChange::is_major) && self.state.is_running() {
            self.control.reconnect();
        } else {
            self.control.retry_now();
        }
    }

    /// The machine has slept: whoever was connected has given up on us, and NATs have forgotten.
    pub(in crate::driver) fn resumed(&mut self, now: Instant) {
        self.engine.resumed(now);
        self.relays.reconnect();
        if self.state.is_running() {
            self.control.reconnect();
        } else {
            self.control.retry_now();
        }
    }

    pub(in crate::driver) fn set_mode(&mut self, now: Instant, mode: PathMode) {
        self.engine.set_mode(now, mode);
    }

    pub(in crate::driver) fn ping(
        &mut self,
        now: Instant,
        peer: NodePublic,
        size: Option<usize>,
        reply: Reply<(Via, Duration)>,
    ) {
        match self.engine.ping(now, &peer, size) {
            Some(id) => {
                self.pings.insert(id, reply);
            }
            None => answer(reply, Err(Error::UnknownPeer(peer.short()))),
        }
    }

    pub(in crate::driver) fn netcheck(&mut self, now: Instant, reply: Reply<NetcheckReport>) {
        self.netchecks.push(reply);
        self.engine.measure(now);
    }

    pub(in crate::driver) async fn logout(&mut self) -> Result<(), Error> {
        self.control.logout().await.map_err(|problem| {
            let why = problem.map_or_else(|| "it does not answer".to_owned(), |problem| problem.to_string());
            Error::Refused(format!("signed out here, but the coordinator could not be told: {why}"))
        })
    }
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
