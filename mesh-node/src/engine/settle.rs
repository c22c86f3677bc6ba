//! The drain rule, inwards: after any input, the inner cores are emptied and what depends on them is brought up to date.

use std::time::{Duration, Instant};

use mesh_nat::relay::geneve::{self, Content};
use mesh_nat::report::Scope;
use mesh_nat::{Path, agent, report};
use mesh_noise::key::NodePublic;
use mesh_noise::wireguard;

use super::{Command, Engine, Event, Hop, SEALED, Transmit};

impl Engine {
    /// Empties the inner cores after any input, then brings what depends on them up to date.
    pub(super) fn settle(&mut self, now: Instant) {
        loop {
            while self.drain_agent(now) | self.drain_interface(now) | self.drain_netcheck(now) {}
            self.announce(now);
            if !self.update_paths(now) {
                break;
            }
        }
        if let Some(plan) = self.relays.poll_plan() {
            self.commands.push_back(Command::Relays(plan));
        }
        if self.live_sessions == 0 {
            self.next_activity = None;
        } else if self.next_activity.is_none() {
            self.next_activity = Some(now + self.activity_interval);
        }
    }

    /// Tells the data plane where packets go now; returns whether that gave the others something to do.
    fn update_paths(&mut self, now: Instant) -> bool {
        let mut hastened = false;
        while let Some(key) = self.moved.pop_first() {
            let to = self.current_path(&key);
            let Some(peer) = self.peers.get_mut(&key).filter(|peer| peer.path != to) else { continue };
            let from = std::mem::replace(&mut peer.path, to);
            let status = self.agent.status(&key);
            let why = status.map_or(agent::Why::NoDisco, |status| status.why);
            let latency = status.and_then(|status| status.latency).filter(|_| !matches!(to, Some(Path::Relay { .. })));
            let limit = status.and_then(|status| status.limit).map(|limit| limit.saturating_sub(SEALED));
            self.commands.push_back(Command::SetPath(key, to));
            self.events.push_back(Event::PathChanged { peer: key, from, to, latency, limit, why });
            if to.is_some() {
                // An initiation that had no way, or went the former one, is not worth waiting for.
                self.interface.retry_handshake(now, &key, Duration::ZERO);
                hastened = true;
            }
        }
        hastened
    }

    fn drain_agent(&mut self, now: Instant) -> bool {
        let mut busy = false;
        // What others have just told it may be due at once.
        if self.agent.poll_timeout().is_some_and(|due| due <= now) {
            self.agent.handle_timeout(now);
            busy = true;
        }
        while let Some(transmit) = self.agent.poll_transmit() {
            busy = true;
            self.transmit(now, transmit.path, Some(transmit.peer), transmit.datagram);
        }
        while let Some(event) = self.agent.poll_event() {
            busy = true;
            match event {
                agent::Event::PingAnswered { id, path, latency, .. } => {
                    self.events.push_back(Event::PingAnswered { id, path, latency });
                }
                agent::Event::PingFailed { id, .. } => self.events.push_back(Event::PingFailed { id }),
                // A measurement under way will tell them.
                agent::Event::NeedEndpoints if self.netcheck.is_running() => {}
                agent::Event::NeedEndpoints => self.start_measuring(now, Scope::Auto),
                agent::Event::PathChanged { peer, .. } => {
                    self.moved.insert(peer);
                }
                agent::Event::BackupChanged { peer, backup } => {
                    if let Some(known) = self.peers.get_mut(&peer) {
                        known.backup = backup;
                        self.commands.push_back(Command::SetBackup(peer, backup));
                        self.events.push_back(Event::BackupChanged { peer, backup });
                        if backup.is_some() {
                            // An initiation that went the doubtful way alone is not worth waiting for.
                            self.interface.retry_handshake(now, &peer, Duration::ZERO);
                        }
                    }
                }
                agent::Event::LimitChanged { peer, limit } => {
                    let limit = limit.map(|datagram| datagram.saturating_sub(SEALED));
                    self.commands.push_back(Command::SetLimit(peer, limit));
                    self.events.push_back(Event::LimitChanged { peer, limit });
                }
                agent::Event::AllocationAsked { from, clients, generation } => {
                    self.commands.push_back(Command::Allocate { from, clients, generation });
                }
                agent::Event::PeerMapped { socket, .. } => self.carry_extra(socket),
                agent::Event::OpenSockets { count, .. } => self.commands.push_back(Command::OpenExtra(count)),
                agent::Event::CloseSocket { socket } => self.commands.push_back(Command::CloseExtra(socket)),
                agent::Event::Guessed { peer, outcome } => {
                    tracing::debug!(peer = peer.short(), ?outcome, "guessing ports");
                }
                _ => {}
            }
        }
        busy
    }

    fn drain_interface(&mut self, now: Instant) -> bool {
        let mut busy = false;
        while let Some(transmit) = self.interface.poll_transmit() {
            busy = true;
            let hop = transmit.path.or_else(|| {
                let path = self.current_path(&transmit.peer?)?;
                // While that is in doubt, the relay gets a copy; whoever sees both drops the second.
                if let Some(backup) = self.peers.get(&transmit.peer?).and_then(|peer| peer.backup) {
                    self.transmit(now, backup, transmit.peer, transmit.datagram.clone());
                }
                Some(Hop { path, node: transmit.peer })
            });
            match hop {
                Some(hop) => self.transmit(now, hop.path, hop.node.or(transmit.peer), transmit.datagram),
                None => self.unroutable += 1,
            }
        }
        while let Some(event) = self.interface.poll_event() {
            busy = true;
            self.wireguard_event(now, event);
        }
        busy
    }

    fn wireguard_event(&mut self, now: Instant, event: wireguard::Event<Hop>) {
        match event {
            wireguard::Event::SessionOpened { peer, session } => {
                if let Some(known) = self.peers.get_mut(&peer) {
                    known.sessions.push(session.receiver_index());
                    self.live_sessions += 1;
                    self.commands.push_back(Command::OpenSession(session));
                }
            }
            wireguard::Event::SessionReady { peer, session } => {
                if let Some(known) = self.peers.get_mut(&peer) {
                    known.last_handshake = Some(now);
                    self.commands.push_back(Command::UseSession(session));
                }
            }
            wireguard::Event::SessionClosed { peer, receiver_index } => {
                if let Some(known) = self.peers.get_mut(&peer) {
                    let before = known.sessions.len();
                    known.sessions.retain(|index| *index != receiver_index);
                    self.live_sessions -= before - known.sessions.len();
                }
                self.commands.push_back(Command::CloseSession(peer, receiver_index));
            }
            wireguard::Event::HandshakeFailed { peer } => {
                self.commands.push_back(Command::GiveUp(peer));
                self.events.push_back(Event::PeerSilent { peer });
            }
            wireguard::Event::Authenticated { peer, path } => {
                if let (Some(known), Path::Relay { region }) = (self.peers.get_mut(&peer), path.path) {
                    known.heard_at = Some(region);
                    self.agent.heard_by_relay(&peer, region);
                    self.moved.insert(peer);
                }
            }
        }
    }

    fn drain_netcheck(&mut self, now: Instant) -> bool {
        let mut busy = false;
        while let Some(transmit) = self.netcheck.poll_transmit() {
            busy = true;
            let path = Path::Direct { socket: transmit.socket, remote: transmit.remote };
            self.transmit(now, path, None, transmit.datagram);
        }
        while let Some(event) = self.netcheck.poll_event() {
            busy = true;
            match event {
                report::Event::Located(report) => self.located(now, report),
                report::Event::Finished(report) => self.measured(now, report),
                report::Event::WantSockets { count } => self.commands.push_back(Command::OpenSockets(count)),
                report::Event::WantPortalCheck(checks) => self.commands.push_back(Command::LookForPortal(checks)),
                report::Event::WantHttpsLatency { region } => self.commands.push_back(Command::MeasureHttps(region)),
                report::Event::Resolve { host } => self.commands.push_back(Command::Resolve(host)),
                _ => {}
            }
        }
        busy
    }

    fn transmit(&mut self, now: Instant, path: Path, node: Option<NodePublic>, datagram: Vec<u8>) {
        let (path, datagram) = match path {
            Path::Relay { region } => {
                self.relays.note_use(now, region);
                (path, datagram)
            }
            Path::Direct { .. } => (path, datagram),
            // WireGuard's handshakes; path discovery puts its own header on.
            Path::PeerRelay { server, vni } => match self.agent.way_to(server) {
                Some(way) => (way, geneve::encapsulate(vni, Content::WireGuard, &datagram)),
                None => {
                    self.unroutable += 1;
                    return;
                }
            },
        };
        self.transmits.push_back(Transmit { path, node, datagram });
    }
}
