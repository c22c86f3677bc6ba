//! The task that keeps the connection to the coordinator, and what we tell it of ourselves.

use std::time::Duration;

use mesh_control::client::{ControlEvent, Description, Problem};
use mesh_control::driver::client::Control;
use mesh_control::wire::hostinfo::VERSION_SUFFIX;
use mesh_control::wire::{EndpointType, Hostinfo, NetInfo};
use mesh_noise::key::{DiscoPublic, MachinePublic};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::engine::{Announcement, EndpointKind};

/// Events that may wait for the engine; the task waits when there are more.
const QUEUE: usize = 64;
/// How long the coordinator has to hear of a logout.
const LOGOUT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum Request {
    Describe(Box<Description>),
    RetryNow,
    Reconnect,
    Logout,
}

/// A running connection to the coordinator. Dropping it ends it.
#[derive(Debug)]
pub(super) struct ControlTask {
    requests: mpsc::UnboundedSender<Request>,
    events: mpsc::Receiver<(ControlEvent, Option<MachinePublic>)>,
    task: JoinHandle<()>,
}

impl ControlTask {
    pub(super) fn spawn(mut control: Control) -> Self {
        let (requests, mut wanted) = mpsc::unbounded_channel();
        let (sender, events) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    event = control.next_event() => {
                        // Nobody listens any more once the session has ended.
                        if sender.send((event, control.control_key())).await.is_err() {
                            return;
                        }
                    }
                    request = wanted.recv() => match request {
                        Some(Request::Describe(description)) => control.update(*description),
                        Some(Request::RetryNow) => control.retry_now(),
                        Some(Request::Reconnect) => {
                            control.stop();
                            control.login(None);
                        }
                        Some(Request::Logout) => control.logout(),
                        None => return,
                    },
                }
            }
        });
        Self { requests, events, task }
    }

    /// Tells the coordinator what has changed about us.
    pub(super) fn describe(&self, description: Description) {
        self.request(Request::Describe(Box::new(description)));
    }

    /// The network has changed: waiting makes no sense any more.
    pub(super) fn retry_now(&self) {
        self.request(Request::RetryNow);
    }

    /// Connects anew: the address that the connection was made from is gone, and nobody would notice for minutes.
    pub(super) fn reconnect(&self) {
        self.request(Request::Reconnect);
    }

    fn request(&self, request: Request) {
        if self.requests.send(request).is_err() {
            tracing::debug!("the connection to the coordinator has ended");
        }
    }

    /// The next event, with the coordinator's key as it was then; `None` once the task has ended. Safe to cancel.
    pub(super) async fn next_event(&mut self) -> Option<(ControlEvent, Option<MachinePublic>)> {
        self.events.recv().await
    }

    /// Logs out, and says why if the coordinator could not be told.
    pub(super) async fn logout(&mut self) -> Result<(), Option<Problem>> {
        self.request(Request::Logout);
        let told = async {
            loop {
                match self.events.recv().await {
                    Some((ControlEvent::LoggedOut(None), _)) => return Ok(()),
                    Some((ControlEvent::LoggedOut(problem), _)) => return Err(problem),
                    Some(_) => {}
                    None => return Err(None),
                }
            }
        };
        tokio::time::timeout(LOGOUT_TIMEOUT, told).await.unwrap_or(Err(None))
    }
}

impl Drop for ControlTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The part of our description that does not change while we run.
pub(super) fn hostinfo(hostname: Option<&str>, userspace: bool) -> Hostinfo {
    let name = hostname.map_or_else(|| kernel_text("hostname"), str::to_owned);
    Hostinfo {
        ipn_version: format!("{}{VERSION_SUFFIX}", env!("CARGO_PKG_VERSION")),
        os: std::env::consts::OS.to_owned(),
        os_version: kernel_text("osrelease"),
        machine: std::env::consts::ARCH.to_owned(),
        hostname: name,
        userspace: Some(userspace),
        userspace_router: Some(userspace),
        ..Hostinfo::default()
    }
}

/// A text that the kernel shows below `/proc/sys/kernel`; empty where there is none.
fn kernel_text(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default().trim().to_owned()
}

/// What the coordinator is told: `hostinfo`, with the network and the endpoints of `announcement`.
pub(super) fn description(hostinfo: &Hostinfo, disco: DiscoPublic, announcement: &Announcement) -> Description {
    let endpoints = announcement.endpoints.iter().map(|endpoint| {
        let kind = match endpoint.kind {
            EndpointKind::PortMapped => EndpointType::PortMapped,
            EndpointKind::Local => EndpointType::Local,
            EndpointKind::Stun => EndpointType::Stun,
            EndpointKind::StunLocalPort => EndpointType::Stun4LocalPort,
            EndpointKind::Explicit => EndpointType::Explicit,
        };
        (endpoint.address, kind)
    });
    let mut hostinfo = hostinfo.clone();
    hostinfo.net_info = Some(net_info(announcement));
    Description { hostinfo, endpoints: endpoints.collect(), disco }
}

fn net_info(announcement: &Announcement) -> NetInfo {
    let gateway = &announcement.mappings.v4;
    let mut info = NetInfo {
        preferred_derp: announcement.home,
        have_port_map: gateway.mapping.is_some(),
        upnp: gateway.upnp,
        pmp: gateway.nat_pmp,
        pcp: gateway.pcp,
        ..NetInfo::default()
    };
    if let Some(report) = &announcement.report {
        info.mapping_varies_by_dest_ip = report.mapping_varies_by_dest_ip;
        info.working_udp = Some(report.udp);
        info.working_ipv6 = Some(report.ipv6);
        let families = [(&report.region_latency_v4, "v4"), (&report.region_latency_v6, "v6")];
        for (latencies, family) in families {
            let named = latencies.iter().map(|(region, latency)| (format!("{region}-{family}"), latency.as_secs_f64()));
            info.derp_latency.extend(named);
        }
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Endpoint, PortMappings};
    use mesh_nat::portmap::Status;

    #[test]
    fn the_description_names_home_and_endpoints() {
        let address = "192.0.2.1:41641".parse().unwrap();
        let announcement = Announcement {
            endpoints: vec![Endpoint { address, kind: EndpointKind::Explicit }],
            home: mesh_derp::map::RegionId::new(7),
            report: None,
            mappings: PortMappings { v4: Status { upnp: Some(true), ..Status::default() }, ..PortMappings::default() },
        };
        let description = description(&hostinfo(Some("one"), true), DiscoPublic::ZERO, &announcement);
        assert_eq!(description.endpoints, [(address, EndpointType::Explicit)]);
        assert_eq!(description.hostinfo.hostname, "one");
        let network = description.hostinfo.net_info.unwrap();
        assert_eq!(network.preferred_derp, announcement.home);
        assert_eq!((network.upnp, network.pmp, network.have_port_map), (Some(true), None, false));
    }
}
