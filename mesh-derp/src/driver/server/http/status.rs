//! What a relay tells about itself: a page for people, `/metrics` for Prometheus, `/healthz` for whoever restarts it.
//!
//! The page is for everybody and names nobody: what runs here, since when, for how many, how much. `/metrics` is for this
//! host and for the networks that the operator named ([`Public::metrics_from`]). A request that some HTTP proxy has passed
//! on comes from that proxy's address, which says nothing, so such requests are not answered there at all.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use ipnet::IpNet;

use super::super::RelayServer;
use super::BootstrapDns;
use crate::driver::listener::contains;
use crate::driver::now;
use crate::metrics::{Exposition, Kind, Metric, Source};
use crate::upgrade::RequestHead;

/// What a relay's HTTP surface shows besides the relay.
#[derive(Debug, Clone, Default)]
pub struct Public {
    /// Networks that may read `/metrics`, besides this host. Default none.
    pub metrics_from: Vec<IpNet>,
    /// Send plain HTTP to HTTPS on this port, but for `/generate_204`, `/healthz` and `/metrics`. Without it, plain HTTP
    /// is answered as HTTPS is. Default none.
    pub redirect_plain_to: Option<u16>,
    /// Names told at `/bootstrap-dns`. Default none, and no such path.
    pub bootstrap_dns: Option<Arc<BootstrapDns>>,
}

impl RelayServer {
    /// Shows further numbers at `/metrics`, such as those of the listener in front.
    pub fn show(&self, source: impl Source + 'static) {
        self.sources.write().unwrap_or_else(PoisonError::into_inner).push(Box::new(source));
    }

    /// The names told at `/bootstrap-dns`, which somebody has to [look up](BootstrapDns::run).
    #[must_use]
    pub fn bootstrap_dns(&self) -> Option<Arc<BootstrapDns>> {
        self.config.public.bootstrap_dns.clone()
    }

    pub(super) fn may_see_metrics(&self, head: &RequestHead, peer: SocketAddr) -> bool {
        let proxied =
            ["forwarded", "x-forwarded-for", "x-real-ip", "via"].iter().any(|name| head.header(name).is_some());
        let address = peer.ip().to_canonical();
        !proxied && (address.is_loopback() || contains(&self.config.public.metrics_from, address))
    }

    /// All numbers, as Prometheus reads them.
    #[must_use]
    pub fn metrics(&self) -> String {
        let mut text = Exposition::new();
        self.counters().expose(&mut text);
        for source in self.sources.read().unwrap_or_else(PoisonError::into_inner).iter() {
            source.expose(&mut text);
        }
        let gauge = |name, help| Metric { name, labels: "", kind: Kind::Gauge, help };
        let version = concat!("version=\"", env!("CARGO_PKG_VERSION"), "\"");
        text.add(Metric { labels: version, ..gauge("mesh_build_info", "The version of this program.") }, 1);
        text.add(gauge("mesh_uptime_seconds", "Seconds since the start."), self.uptime().as_secs());
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            // One of them is the directory's own.
            text.add(gauge("derp_current_file_descriptors", "Open file descriptors."), open.count().saturating_sub(1));
        }
        if let Some(bytes) = resident() {
            text.add(gauge("process_resident_memory_bytes", "Resident memory in bytes."), bytes);
        }
        text.finish()
    }

    fn uptime(&self) -> std::time::Duration {
        now().saturating_duration_since(self.started)
    }

    /// The page for people.
    pub(super) fn page(&self) -> String {
        let counters = self.counters();
        let (hours, minutes) = (self.uptime().as_secs() / 3600, self.uptime().as_secs() / 60 % 60);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>mesh relay</title></head><body>\n\
             <h1>mesh relay</h1>\n\
             <p>This is a relay (DERP) of a private network. It passes on packets that it cannot read, between nodes that \
             cannot reach each other directly.</p>\n\
             <ul>\n<li>version {}</li>\n<li>up for {hours} h {minutes} min{}</li>\n<li>{} nodes connected</li>\n\
             <li>{} packets, {} MB passed on</li>\n</ul>\n</body></html>\n",
            env!("CARGO_PKG_VERSION"),
            if self.is_ending() { ", and about to end" } else { "" },
            counters.nodes,
            counters.packets_out,
            counters.bytes_out / 1_000_000,
        )
    }
}

/// Resident memory of this process in bytes, where the system tells.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
