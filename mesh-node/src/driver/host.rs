//! The host around a node: its addresses, our UDP sockets, and the configuration of our own interface.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use mesh_nat::SocketId;
use mesh_tun::linux::interfaces::{Interfaces, Router, interfaces};
use mesh_tun::linux::monitor::Monitor;
use mesh_tun::linux::netlink::Netlink;
use mesh_tun::linux::udp::{Config, UdpBatch};
use mesh_tun::linux::{BYPASS_MARK, BYPASS_MASK, queues};
use mesh_tun::plan::{self, Host, Routing};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::engine::{DefaultRoute, Local, LocalAddress, MapView};
use crate::error::Error;
use crate::netstack::{Netstack, SERVICE_V4, SERVICE_V6};

/// The IPv4 socket.
const V4: SocketId = SocketId(0);
/// The IPv6 socket.
const V6: SocketId = SocketId(1);
/// How many ports are tried until one is free for both families.
const PORT_ATTEMPTS: usize = 8;

/// Our UDP sockets: one a family, with the same port where possible.
#[derive(Debug, Clone)]
pub(crate) struct Sockets {
    v4: Arc<UdpBatch>,
    /// None where the host has no IPv6.
    v6: Option<Arc<UdpBatch>>,
}

impl Sockets {
    /// Binds both families to `port`; 0 takes any that is free for both.
    pub(crate) fn bind(port: u16) -> Result<Self, Error> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let v4 = bind(Config::ipv4(port))?;
            match bind(Config::ipv6(v4.local_addr().port())) {
                Ok(v6) => return Ok(Self { v4, v6: Some(v6) }),
                Err(Error::Tun(mesh_tun::Error::AddressInUse { .. })) if port == 0 && attempts < PORT_ATTEMPTS => {}
                Err(error @ Error::Tun(mesh_tun::Error::AddressInUse { .. })) => return Err(error),
                Err(error) => {
                    tracing::info!(%error, "no IPv6 on this host");
                    return Ok(Self { v4, v6: None });
                }
            }
        }
    }

    /// Every socket, the IPv4 one first.
    pub(crate) fn into_all(self) -> Vec<Arc<UdpBatch>> {
        std::iter::once(self.v4).chain(self.v6).collect()
    }

    /// The IPv4 socket's port.
    pub(crate) fn port(&self) -> u16 {
        self.v4.local_addr().port()
    }

    /// Each socket with what it is bound to.
    pub(crate) fn ids(&self) -> Vec<(SocketId, SocketAddr)> {
        self.all().map(|(id, socket)| (id, socket.local_addr())).collect()
    }

    /// Each socket by its id.
    pub(crate) fn all(&self) -> impl Iterator<Item = (SocketId, &Arc<UdpBatch>)> {
        std::iter::once((V4, &self.v4)).chain(self.v6.iter().map(|socket| (V6, socket)))
    }
}

fn bind(mut config: Config) -> Result<Arc<UdpBatch>, Error> {
    config.mark = Some(BYPASS_MARK);
    // Path discovery finds out what arrives.
    config.dont_fragment = true;
    config.sockets = queues::for_this_machine();
    UdpBatch::bind(&config).map_err(Error::Tun)
}

/// Our own TUN interface, configured by a task of its own.
#[derive(Debug)]
pub(crate) struct TunHost {
    index: u32,
    wanted: watch::Sender<Host>,
    task: JoinHandle<()>,
}

impl TunHost {
    /// Takes charge of the interface `index`; addresses, routes and rules are removed again by [`HostNetwork::close`].
    pub(crate) fn start(index: u32, netlink: Netlink) -> Self {
        let (wanted, mut changes) = watch::channel(Host::default());
        let task = tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                let host = changes.borrow_and_update().clone();
                if let Err(incomplete) = netlink.converge(index, &host).await {
                    tracing::error!(error = %incomplete.error, "the interface cannot be configured");
                }
            }
            if let Err(incomplete) = netlink.converge(index, &Host::default()).await {
                tracing::warn!(error = %incomplete.error, "routes may have been left behind");
            }
        });
        Self { index, wanted, task }
    }
}

/// What the node has of the host, and what it does to it.
#[derive(Debug)]
pub(crate) struct HostNetwork {
    pub(crate) sockets: Sockets,
    found: watch::Receiver<Interfaces>,
    watcher: JoinHandle<()>,
    tun: Option<TunHost>,
    netstack: Option<Netstack>,
    routing: Routing,
}

impl HostNetwork {
    /// Reads the host's addresses and starts to watch them.
    pub(crate) async fn start(sockets: Sockets, tun: Option<TunHost>, netstack: Option<Netstack>) -> Self {
        let netlink = Netlink::open().inspect_err(|error| tracing::warn!(%error, "the host cannot be read")).ok();
        let policy = match &netlink {
            Some(netlink) => netlink.has_policy_routing().await,
            None => false,
        };
        let routing = if policy { Routing::Policy { mark: (BYPASS_MARK, BYPASS_MASK) } } else { Routing::Main };
        // Watching begins before reading, so that no change falls between the two.
        let monitor = Monitor::start().inspect_err(|error| tracing::warn!(%error, "the host cannot be watched")).ok();
        if let (Some(monitor), Some(tun)) = (&monitor, &tun) {
            monitor.ignore(tun.index);
        }
        let first = match &netlink {
            Some(netlink) => interfaces(netlink).await.unwrap_or_default(),
            None => Interfaces::default(),
        };
        let (sender, found) = watch::channel(first);
        let watcher = tokio::spawn(async move {
            let (Some(netlink), Some(mut monitor)) = (netlink, monitor) else { return std::future::pending().await };
            loop {
                monitor.changed().await;
                match interfaces(&netlink).await {
                    Ok(now) => {
                        sender.send_if_modified(|found| {
                            let changed = *found != now;
                            *found = now;
                            changed
                        });
                    }
                    Err(error) => tracing::warn!(%error, "the host's addresses cannot be read"),
                }
            }
        });
        Self { sockets, found, watcher, tun, netstack, routing }
    }

    /// Waits until the host's network has changed. Safe to cancel.
    pub(crate) async fn changed(&mut self) {
        if self.found.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// The host's interfaces and routers as they are now.
    pub(crate) fn found(&self) -> Interfaces {
        self.found.borrow().clone()
    }

    /// The addresses and ports where we may be reached.
    pub(crate) fn local(&self, loopback: bool) -> Local {
        let own = self.tun.as_ref().map(|tun| tun.index);
        let found = self.found.borrow();
        let addresses = found
            .interfaces
            .iter()
            .filter(|(index, interface)| Some(**index) != own && interface.up)
            .flat_map(|(_, interface)| {
                interface
                    .addresses
                    .iter()
                    .map(|network| LocalAddress { interface: interface.name.clone(), network: *network })
            })
            .collect();
        let port = |socket: SocketId| {
            self.sockets.all().find(|(id, _)| *id == socket).map(|(_, socket)| socket.local_addr().port())
        };
        let route = |exists: bool, router: Option<&Router>| {
            let (interface, source) = (router.map(|router| router.interface), router.and_then(|router| router.source));
            exists.then(|| DefaultRoute { router: router.map(|router| router.address), interface, source })
        };
        Local {
            addresses,
            port_v4: port(V4),
            port_v6: port(V6),
            default_v4: route(found.default_v4, found.router_v4.as_ref()),
            default_v6: route(found.default_v6, found.router_v6.as_ref()),
            loopback,
        }
    }

    /// Gives our interface, or our stack, the addresses of `map`, and routes to its peers.
    pub(crate) fn configure(&mut self, map: &MapView) {
        if let Some(netstack) = &self.netstack {
            let service = [SERVICE_V4.into(), SERVICE_V6.into()];
            netstack.set_addresses(&map.own_addresses().chain(service).collect::<Vec<_>>());
        }
        if let Some(tun) = &self.tun {
            let service = [IpAddr::from(SERVICE_V4), IpAddr::from(SERVICE_V6)].map(IpNet::from);
            let routes: Vec<_> = map.routes().chain(service).collect();
            tun.wanted.send_replace(plan::wanted(&map.addresses, &routes, self.routing));
        }
    }

    /// Takes addresses and routes away again.
    pub(crate) fn clear(&mut self) {
        if let Some(netstack) = &self.netstack {
            netstack.set_addresses(&[]);
        }
        if let Some(tun) = &self.tun {
            tun.wanted.send_replace(Host { up: true, ..Host::default() });
        }
    }

    /// Undoes everything that was done to the host.
    pub(crate) async fn close(self) {
        self.watcher.abort();
        if let Some(tun) = self.tun {
            drop(tun.wanted);
            if let Err(error) = tun.task.await {
                tracing::error!(%error, "the interface's task has failed");
            }
        }
        for (_, socket) in self.sockets.all() {
            socket.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_share_a_port_and_a_taken_port_gives_one_clear_line() {
        let first = Sockets::bind(0).unwrap();
        let ports: Vec<u16> = first.ids().iter().map(|(_, bound)| bound.port()).collect();
        assert!(ports.iter().all(|port| *port == first.port()), "{ports:?}");
        let line = Sockets::bind(first.port()).unwrap_err().to_string();
        assert!(line.contains("--port") && !line.contains('\n'), "{line}");
    }
}
