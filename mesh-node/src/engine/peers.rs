//! Peers: what each of them is, where its packets go, and whether there are any.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_nat::{Path, agent};
use mesh_noise::key::{DiscoPublic, NodePublic, PresharedKey};
use mesh_noise::wireguard;
use mesh_tun::packet::Packet;

use super::{ACTIVITY_INTERVAL, ACTIVITY_SOON, Command, Engine, MapView, Peer, PeerView};
use crate::prefs::PathMode;

/// Data sent within this time counts as being sent now.
const SENDING_MS: u64 = 2000;
/// Strangers that are remembered at a time; further ones ask again by themselves.
const MAX_STRANGERS: usize = 64;
/// How long a stranger is remembered: as long as it waits until it asks again.
const STRANGER_TIME: Duration = Duration::from_secs(5);

/// A peer that may have restarted is asked no more often than this.
const RENEW_INTERVAL: Duration = Duration::from_secs(5);

impl Peer {
    /// Its disco key, by its own word or control's.
    pub(super) fn disco(&self) -> Option<DiscoPublic> {
        self.told_disco.or(self.view.disco)
    }
}

impl Engine {
    /// Brings the peers in line with the map.
    pub(super) fn set_peers(&mut self, now: Instant) {
        let map: Arc<MapView> = Arc::clone(&self.map);
        let gone: Vec<NodePublic> = self.peers.keys().filter(|key| !map.peers.contains_key(key)).copied().collect();
        for peer in gone {
            self.remove_peer(now, &peer);
        }
        let mut rerouted = Vec::new();
        for (key, view) in &map.peers {
            let known = self.peers.get(key).map(|known| &known.view);
            if known.is_none_or(|known| known.routing_differs(view)) {
                rerouted.push(view.clone());
            }
            if known != Some(view) {
                self.set_peer(now, view.clone());
            }
        }
        if !rerouted.is_empty() {
            self.commands.push_back(Command::SetPeers(rerouted));
        }
    }

    fn set_peer(&mut self, now: Instant, view: PeerView) {
        let key = view.node;
        self.moved.insert(key);
        // What the peer itself has told is newer than a map that still says what it said before.
        let known = self.peers.get(&key).filter(|known| known.view.disco == view.disco);
        let told = known.and_then(|known| known.told_disco);
        let (former, disco) = (self.peers.get(&key).and_then(Peer::disco), told.or(view.disco));
        self.introduce(now, &view, disco);
        if let Some(known) = self.peers.get_mut(&key) {
            let restarted = former.zip(disco).is_some_and(|(former, disco)| former != disco);
            known.view = view;
            known.told_disco = told;
            if restarted && !known.sessions.is_empty() {
                self.renew_session(now, &key);
            } else {
                // What has changed may be that it can now be reached, or that it has just learnt of us.
                self.interface.retry_handshake(now, &key, Duration::ZERO);
            }
            return;
        }
        let config = wireguard::PeerConfig { preshared: PresharedKey::default(), persistent_keepalive: None };
        self.interface.set_peer(now, key, config);
        let peer = Peer {
            view,
            path: None,
            heard_at: None,
            last_handshake: None,
            sessions: Vec::new(),
            last_sent: 0,
            backup: None,
            renewed: None,
            told_disco: None,
        };
        self.peers.insert(key, peer);
        let asked = self.strangers.remove(&key);
        if asked.is_some_and(|asked| now.saturating_duration_since(asked) < STRANGER_TIME) {
            self.interface.want_session(now, &key);
        }
    }

    /// Tells path discovery what is known of a peer.
    fn introduce(&mut self, now: Instant, view: &PeerView, disco: Option<DiscoPublic>) {
        let Some(disco) = disco else { return self.agent.remove_peer(&view.node) };
        let config = agent::PeerConfig {
            node: view.node,
            disco,
            home: view.home,
            endpoints: view.endpoints.clone(),
            ours: view.ours,
            ..agent::PeerConfig::default()
        };
        self.agent.set_peer(now, config);
    }

    /// A message of `peer`'s to us ourselves has come through the tunnel: an IP packet of protocol 99. Deployed peers tell
    /// their disco key in one after every handshake: the letter `a` and 32 bytes. So who has restarted is found even while
    /// control is away. Other messages are for nobody here.
    pub fn tsmp(&mut self, now: Instant, peer: &NodePublic, packet: &[u8]) {
        let payload = Packet::parse(packet).map(|packet| packet.payload).unwrap_or_default();
        let told = match payload.split_first() {
            Some((b'a', rest)) => rest.first_chunk().map(|key| DiscoPublic::from_bytes(*key)),
            Some(_) | None => None,
        };
        if let (Some(told), Some(known)) = (told.filter(|told| !told.is_zero()), self.peers.get_mut(peer))
            && known.disco().is_some_and(|disco| disco != told)
        {
            known.told_disco = Some(told);
            let view = known.view.clone();
            self.introduce(now, &view, Some(told));
        }
        self.settle(now);
    }

    /// `node` speaks through its relay under a disco key that is not known to be its own. That proves nothing, but most
    /// likely it has restarted and control has not told us yet. A handshake asks the node itself.
    pub(super) fn may_have_restarted(&mut self, now: Instant, node: NodePublic) {
        let lately = |at: Instant| now.saturating_duration_since(at) < RENEW_INTERVAL;
        let Some(known) = self.peers.get(&node) else { return };
        if !known.sessions.is_empty() && !known.renewed.is_some_and(lately) {
            self.agent.suspect(now, &node);
            self.renew_session(now, &node);
        }
    }

    /// The peer's keys went with its former self, and silence would tell us so much later.
    fn renew_session(&mut self, now: Instant, key: &NodePublic) {
        if let Some(known) = self.peers.get_mut(key) {
            known.renewed = Some(now);
        }
        self.interface.renew_session(now, key);
    }

    fn remove_peer(&mut self, now: Instant, key: &NodePublic) {
        self.interface.remove_peer(key);
        self.agent.remove_peer(key);
        self.settle(now);
        if let Some(peer) = self.peers.remove(key) {
            self.live_sessions -= peer.sessions.len();
        }
        self.moved.remove(key);
        self.commands.push_back(Command::RemovePeer(*key));
    }

    /// A node that we do not know wants a session. If control introduces it soon, we ask it in turn, so that it need not
    /// wait until it asks again.
    pub(super) fn note_stranger(&mut self, now: Instant, node: NodePublic) {
        self.strangers.retain(|_, asked| now.saturating_duration_since(*asked) < STRANGER_TIME);
        if self.strangers.len() < MAX_STRANGERS {
            self.strangers.insert(node, now);
        }
    }

    /// Where packets to `peer` go now.
    pub(super) fn current_path(&self, key: &NodePublic) -> Option<Path> {
        let peer = self.peers.get(key)?;
        let relay = || peer.view.home.or(peer.heard_at).map(|region| Path::Relay { region });
        let direct = || self.agent.path(key).filter(|path| !matches!(path, Path::Relay { .. }));
        match self.mode {
            PathMode::Auto => direct().or_else(relay),
            PathMode::Direct => direct(),
            PathMode::Relay => relay(),
        }
    }

    pub(super) fn note_relay_use(&mut self, now: Instant, peer: &NodePublic) {
        if let Some(region) = self.peers.get(peer).and_then(|peer| peer.view.home.or(peer.heard_at)) {
            self.relays.note_use(now, region);
        }
    }

    /// We send to `peer`: its path is worth an effort, and so are our own addresses.
    pub(super) fn note_traffic(&mut self, now: Instant, peer: &NodePublic) {
        self.agent.traffic(now, peer);
        self.last_active = Some(now);
        if self.next_measure.is_none() && !self.netcheck.is_running() {
            self.plan_measuring(now);
        }
    }

    /// Tells the agent who has been sent data since the last look, and who has not answered it. The regions of peers with
    /// live sessions stay connected, so that the first packet after a pause finds a way.
    pub(super) fn read_activity(&mut self, now: Instant) {
        let now_ms = self.interface.clock_ms(now);
        let (mut active, mut relayed, mut unanswered) = (Vec::new(), Vec::new(), Vec::new());
        self.activity_interval = ACTIVITY_INTERVAL;
        for (key, peer) in &mut self.peers {
            if peer.sessions.is_empty() {
                continue;
            }
            if matches!(peer.path, Some(Path::Relay { .. })) || peer.backup.is_some() {
                relayed.push(*key);
            }
            let Some(activity) = self.interface.activity(key) else { continue };
            let sent = activity.last_data_sent();
            if sent > peer.last_sent {
                peer.last_sent = sent;
                active.push(*key);
            }
            let direct = peer.path.is_some_and(|path| path.is_direct());
            if direct && sent > 0 && now_ms.saturating_sub(sent) < SENDING_MS {
                self.activity_interval = ACTIVITY_SOON;
                let since = activity.unanswered();
                if since > 0 {
                    let silence = Duration::from_millis(now_ms.saturating_sub(since));
                    unanswered.push((*key, now.checked_sub(silence).unwrap_or(now)));
                }
            }
        }
        for key in active {
            self.note_traffic(now, &key);
        }
        for (key, since) in unanswered {
            if self.agent.unanswered(now, &key, since) {
                relayed.push(key);
            }
        }
        for key in relayed {
            self.note_relay_use(now, &key);
        }
        self.next_activity = None;
    }
}
