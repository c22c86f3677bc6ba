//! Small jobs beside a session: each ends by telling it what it has found out.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_derp::driver::client::latency_check;
use mesh_derp::map::{DerpRegion, FamilyAddress, RegionId};
use mesh_nat::{Family, SocketId};

use super::Session;

/// How long one HTTPS measurement, or one look-up of a name, may take.
const JOB_TIMEOUT: Duration = Duration::from_secs(3);

/// What small jobs beside the session have found out.
#[derive(Debug)]
pub(crate) enum Job {
    Https(RegionId, Option<(Duration, Family)>),
    Resolved(String, Vec<IpAddr>),
    Portal(Option<bool>),
    Sockets(Vec<(SocketId, SocketAddr)>),
}

impl Session {
    pub(super) fn measure_https(&self, id: RegionId) {
        let Some(region) = self.map.derp.regions.get(&id).cloned() else { return };
        let (tls, proxies) = (self.tls.clone(), self.proxies.clone());
        self.job(async move {
            let measured = tokio::time::timeout(JOB_TIMEOUT, latency_check(&region, &tls, &proxies)).await;
            let latency = measured.ok().and_then(Result::ok);
            Job::Https(id, latency.map(|latency| (latency, likely_family(&region))))
        });
    }

    pub(super) fn resolve(&self, host: String) {
        self.job(async move {
            let looked_up = tokio::time::timeout(JOB_TIMEOUT, tokio::net::lookup_host((host.clone(), 0))).await;
            let addresses = match looked_up {
                Ok(Ok(found)) => found.map(|address| address.ip()).collect(),
                Ok(Err(_)) | Err(_) => Vec::new(),
            };
            Job::Resolved(host, addresses)
        });
    }

    pub(super) fn job(&self, job: impl Future<Output = Job> + Send + 'static) {
        let sender = self.job_sender.clone();
        tokio::spawn(async move {
            // A session that has ended needs no answer.
            sender.send(job.await).await.ok()
        });
    }
}

/// The family that an HTTPS connection to this region most likely uses.
fn likely_family(region: &DerpRegion) -> Family {
    let v4 = region.relays().any(|node| !matches!(node.v4(), FamilyAddress::Disabled));
    if v4 { Family::V4 } else { Family::V6 }
}
