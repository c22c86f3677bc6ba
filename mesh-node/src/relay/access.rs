//! Who may use a relay, and which other relays it passes packets on to.

use std::sync::Arc;

use mesh_derp::driver::server::{self, AllOf, AllowListFile, RelayServer, Verify};
use mesh_derp::tls::ClientTls;
use tokio::task::JoinSet;

use super::Config;
use crate::error::Error;

/// What the settings ask for, ready to be run.
#[derive(Debug)]
pub(super) struct Access {
    tls: ClientTls,
    pub(super) allow_list: Option<Arc<AllowListFile>>,
}

impl Access {
    /// Reads the files that are named, and sets the relay up accordingly.
    pub(super) fn prepare(config: &Config, settings: &mut server::Config) -> Result<Self, Error> {
        let tls = config.ca_file.as_deref().map_or_else(ClientTls::system, ClientTls::with_ca_file);
        let tls = tls.map_err(|error| Error::Tls(error.to_string()))?;
        let setting = |error: &dyn std::error::Error| Error::Setting(error.to_string());
        let mut asked: Vec<Arc<dyn server::Admission>> = Vec::new();
        let allow_list = config.allow_list.as_ref().map(AllowListFile::load).transpose();
        let allow_list = allow_list.map_err(|error| setting(&error))?.map(Arc::new);
        if let Some(list) = &allow_list {
            asked.push(Arc::clone(list) as _);
        }
        if let Some(url) = &config.verify_url {
            let verify = Verify::new(url, &tls, config.verify_unreachable).map_err(|error| setting(&error))?;
            asked.push(Arc::new(verify));
        }
        if !asked.is_empty() {
            settings.admission = Arc::new(AllOf(asked));
        }
        match &config.mesh_key_file {
            Some(file) => settings.mesh_key = Some(super::mesh_key(file)?),
            None if !config.mesh_with.is_empty() => {
                let problem = "to join other relays, name the file with the mesh key that all of them share";
                return Err(Error::Setting(problem.to_owned()));
            }
            None => {}
        }
        Ok(Self { tls, allow_list })
    }

    /// Joins the other relays, and follows the allow-list.
    pub(super) fn run(&self, config: Config, relay: &Arc<RelayServer>, tasks: &mut JoinSet<()>) {
        for other in config.mesh_with {
            tasks.spawn(Arc::clone(relay).join(other, self.tls.clone()));
        }
        if let Some(list) = self.allow_list.clone() {
            let relay = Arc::clone(relay);
            tasks.spawn(async move { match list.follow(&relay).await {} });
        }
    }

    /// Reads the allow-list again at once.
    pub(super) fn reload(&self, relay: &RelayServer) {
        let Some(list) = &self.allow_list else { return };
        match list.reload() {
            Ok(()) => list.enforce(relay),
            Err(error) => tracing::error!(%error, "the allow-list stays as it was"),
        }
    }
}
