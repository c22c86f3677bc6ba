//! One task per relay region that is wanted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use bytes::Bytes;
use mesh_derp::driver::client::{Options, Outbox, RelayClient, RelayEvent};
use mesh_derp::map::{DerpMap, DerpRegion, RegionId};
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::ClientTls;
use mesh_noise::key::{NodePrivate, NodePublic};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::dataplane::{Dataplane, RelaySink};
use crate::engine::RelayPlan;

/// Hands datagrams to the regions that are connected. Clones share the table.
#[derive(Debug, Clone, Default)]
pub(crate) struct RelaySender {
    outboxes: Arc<ArcSwap<BTreeMap<RegionId, Outbox>>>,
}

impl RelaySender {
    /// Queues `datagram` for `node` at `region`; false if there is no connection, or no room.
    pub(crate) fn send_one(&self, region: RegionId, node: NodePublic, datagram: Bytes) -> bool {
        self.outboxes.load().get(&region).is_some_and(|outbox| outbox.try_send(node, datagram))
    }
}

impl RelaySink for RelaySender {
    fn send(&self, region: RegionId, to: NodePublic, datagrams: &mut dyn Iterator<Item = &[u8]>) -> usize {
        let outboxes = self.outboxes.load();
        let Some(outbox) = outboxes.get(&region) else { return 0 };
        outbox.try_send_all(datagrams.map(|datagram| (to, Bytes::copy_from_slice(datagram))))
    }
}

/// What a region's task is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Orders {
    home: bool,
    /// Counts the times that the host's network has changed so that a new connection is needed.
    lost: u64,
    /// Counts the times that it has changed otherwise, and the connection may have died.
    doubted: u64,
}

#[derive(Debug)]
struct Running {
    region: DerpRegion,
    orders: watch::Sender<Orders>,
    /// Whether a packet has come since this was last looked at.
    heard: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The relay connections of a node. Dropping it closes them.
#[derive(Debug)]
pub(super) struct RelaySet {
    key: NodePrivate,
    tls: ClientTls,
    proxies: Proxies,
    map: Arc<DerpMap>,
    plan: RelayPlan,
    running: BTreeMap<RegionId, Running>,
    sender: RelaySender,
    dataplane: Arc<Dataplane>,
    events: mpsc::Sender<(RegionId, RelayEvent)>,
}

impl RelaySet {
    pub(super) fn new(
        key: NodePrivate,
        (tls, proxies): (ClientTls, Proxies),
        sender: RelaySender,
        dataplane: Arc<Dataplane>,
        events: mpsc::Sender<(RegionId, RelayEvent)>,
    ) -> Self {
        let running = BTreeMap::new();
        Self { key, tls, proxies, map: Arc::default(), plan: RelayPlan::default(), running, sender, dataplane, events }
    }

    /// Logs in anew everywhere, under another key.
    pub(super) fn set_key(&mut self, key: NodePrivate) {
        self.key = key;
        self.running.clear();
        self.reconcile();
    }

    /// Connects anew everywhere: the address that connections were made from is gone.
    pub(super) fn reconnect(&self) {
        for running in self.running.values() {
            running.orders.send_modify(|orders| orders.lost += 1);
        }
    }

    /// Whether a packet, of data as well, has come from this region since the last call.
    pub(super) fn take_heard(&self, region: RegionId) -> bool {
        self.running.get(&region).is_some_and(|running| running.heard.swap(false, Ordering::Relaxed))
    }

    /// Asks everywhere whether the relay still answers, and connects anew where it does not.
    pub(super) fn check(&self) {
        for running in self.running.values() {
            running.orders.send_modify(|orders| orders.doubted += 1);
        }
    }

    pub(super) fn set_map(&mut self, map: Arc<DerpMap>) {
        self.map = map;
        self.reconcile();
    }

    pub(super) fn set_plan(&mut self, plan: RelayPlan) {
        self.plan = plan;
        self.reconcile();
    }

    /// Starts what is missing and stops what is superfluous or described otherwise now.
    fn reconcile(&mut self) {
        let before = self.running.len();
        let (map, plan) = (&self.map, &self.plan);
        self.running.retain(|id, running| plan.regions.contains(id) && map.regions.get(id) == Some(&running.region));
        let mut outboxes = BTreeMap::clone(&self.sender.outboxes.load());
        outboxes.retain(|id, _| self.running.contains_key(id));
        for (id, running) in &self.running {
            let home = self.plan.home == Some(*id);
            running.orders.send_if_modified(|orders| std::mem::replace(&mut orders.home, home) != home);
        }
        for id in &self.plan.regions {
            let Some(region) = self.map.regions.get(id).filter(|_| !self.running.contains_key(id)) else { continue };
            let is_home = self.plan.home == Some(*id);
            let mut options = Options::new(region.clone(), self.key.clone(), self.tls.clone());
            options.proxies = self.proxies.clone();
            options.home = is_home;
            let client = RelayClient::new(options);
            outboxes.insert(*id, client.outbox());
            let (orders, wanted) = watch::channel(Orders { home: is_home, lost: 0, doubted: 0 });
            let heard = Arc::new(AtomicBool::new(false));
            let to = Receivers {
                dataplane: Arc::clone(&self.dataplane),
                events: self.events.clone(),
                heard: Arc::clone(&heard),
            };
            let task = tokio::spawn(run(*id, client, wanted, to));
            self.running.insert(*id, Running { region: region.clone(), orders, heard, task });
        }
        if before != self.running.len() {
            tracing::debug!(regions = ?self.plan.regions, home = ?self.plan.home, "relay connections");
        }
        self.sender.outboxes.store(Arc::new(outboxes));
    }
}

impl Drop for RelaySet {
    fn drop(&mut self) {
        self.sender.outboxes.store(Arc::default());
    }
}

/// Where a region's task puts what comes.
struct Receivers {
    dataplane: Arc<Dataplane>,
    events: mpsc::Sender<(RegionId, RelayEvent)>,
    heard: Arc<AtomicBool>,
}

#[expect(clippy::wildcard_enum_match_arm, reason = "everything but packets is for the session to judge")]
async fn run(id: RegionId, mut client: RelayClient, mut orders: watch::Receiver<Orders>, to: Receivers) {
    let (mut lost, mut doubted) = (0, 0);
    loop {
        tokio::select! {
            event = client.next_event() => match event {
                RelayEvent::Packet { source, payload } => {
                    // What finds no room is counted there.
                    to.dataplane.inject(id, source, payload);
                    if !to.heard.load(Ordering::Relaxed) {
                        to.heard.store(true, Ordering::Relaxed);
                    }
                }
                event => {
                    if to.events.send((id, event)).await.is_err() {
                        return;
                    }
                }
            },
            changed = orders.changed() => {
                if changed.is_err() {
                    return;
                }
                let new = *orders.borrow_and_update();
                client.set_home(new.home);
                if new.lost != lost {
                    client.reconnect();
                } else if new.doubted != doubted {
                    client.check();
                }
                (lost, doubted) = (new.lost, new.doubted);
            }
        }
    }
}
