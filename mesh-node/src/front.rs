//! What stands in front of a relay, alone or in a coordinator: who may read its numbers, which proxies it believes, and how
//! many may come.

use std::sync::Arc;

use ipnet::IpNet;
use mesh_derp::driver::listener::Settings;
use mesh_derp::driver::server::{BootstrapDns, Public, RelayServer};
use mesh_derp::server::{AcceptLimit, Limits};
use tokio::task::JoinSet;

/// The settings of a relay's front. The defaults suit a relay that faces the internet itself.
#[derive(Debug, Clone)]
pub struct Front {
    /// Networks that may read `/metrics`, besides this host. Default none.
    pub metrics_from: Vec<IpNet>,
    /// Send plain HTTP to HTTPS on this port. Default none: both are answered alike.
    pub redirect_plain_to: Option<u16>,
    /// Names told at `/bootstrap-dns`. Default none.
    pub bootstrap_dns_names: Vec<String>,
    /// Proxies that announce their clients with the PROXY protocol, and have to. Default none.
    pub proxies: Vec<IpNet>,
    /// Connections served in a second; further ones are closed at once. No limit by default.
    pub accept: AcceptLimit,
    /// Connections that have not logged in.
    pub limits: Limits,
}

impl Default for Front {
    fn default() -> Self {
        let Settings { accept, limits, .. } = Settings::default();
        let (metrics_from, bootstrap_dns_names, proxies) = (Vec::new(), Vec::new(), Vec::new());
        Self { metrics_from, redirect_plain_to: None, bootstrap_dns_names, proxies, accept, limits }
    }
}

impl Front {
    /// The part that the listener acts on.
    pub(crate) fn listener(&self) -> Settings {
        Settings { limits: self.limits, accept: self.accept, proxies: self.proxies.clone(), ..Settings::default() }
    }

    /// The part that the relay's HTTP surface acts on.
    pub(crate) fn public(&self) -> Public {
        let names = &self.bootstrap_dns_names;
        Public {
            metrics_from: self.metrics_from.clone(),
            redirect_plain_to: self.redirect_plain_to,
            bootstrap_dns: (!names.is_empty()).then(|| Arc::new(BootstrapDns::new(names.clone()))),
        }
    }
}

/// Keeps what a relay tells about itself up to date.
pub(crate) fn refresh(relay: &RelayServer, tasks: &mut JoinSet<()>) {
    if let Some(names) = relay.bootstrap_dns() {
        tasks.spawn(async move { match names.run().await {} });
    }
}
