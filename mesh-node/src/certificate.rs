//! The certificate of a coordinator or a relay: where it comes from, and what keeps it up to date.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use mesh_derp::acme;
use mesh_derp::driver::acme::Issuer;
use mesh_derp::driver::certificates::{CertificateFiles, Keeper};
use mesh_derp::driver::listener::Acceptor;
use mesh_derp::tls::{CurrentCertificate, ServerTls, TlsError};
use mesh_noise::key::RelayPublic;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::error::Error;

/// Where a server's certificate comes from.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Certificate {
    /// It is made once, self-signed, and kept in the state directory; a DERP map pins it.
    #[default]
    Generated,
    /// It is in files, and read again when they change.
    Files(CertificateFiles),
    /// A public authority issues and renews it (ACME).
    Acme(acme::Settings),
}

/// What a server's certificate depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Server<'a> {
    /// Where it keeps what it has to keep.
    pub(crate) state_dir: &'a Path,
    /// Its name or address, as it is published.
    pub(crate) host: &'a str,
    /// Where it accepts.
    pub(crate) listen: &'a [SocketAddr],
}

/// A certificate that is ready to be shown.
#[derive(Debug)]
pub(crate) struct Opened {
    tls: ServerTls,
    pin: Option<String>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Fixed,
    Files(CertificateFiles),
    Acme(Box<Issuer>),
}

impl Certificate {
    /// Reads the certificate, or makes one.
    pub(crate) fn open(&self, server: Server<'_>) -> Result<Opened, TlsError> {
        match self {
            Self::Generated => {
                let tls = ServerTls::load_or_generate(server.state_dir, &server.names())?;
                Ok(Opened { pin: Some(tls.pin()), tls, source: Source::Fixed })
            }
            Self::Files(files) => Ok(Opened { tls: files.load()?, pin: None, source: Source::Files(files.clone()) }),
            Self::Acme(settings) => {
                let (issuer, tls) = Issuer::open(settings.clone(), server.state_dir, server.listen)?;
                Ok(Opened { tls, pin: None, source: Source::Acme(Box::new(issuer)) })
            }
        }
    }

    /// The pin to publish, if it is a certificate of our own. Makes it if there is none yet.
    pub(crate) fn pin(&self, server: Server<'_>) -> Result<Option<String>, TlsError> {
        match self {
            Self::Generated | Self::Files(_) => Ok(self.open(server)?.pin),
            Self::Acme(_) => Ok(None),
        }
    }

    /// Whether the server may be known as `host`: a public authority certifies that name alone.
    ///
    /// # Errors
    /// If it certifies others.
    pub(crate) fn names_host(&self, host: &str) -> Result<(), Error> {
        let Self::Acme(settings) = self else { return Ok(()) };
        let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
        let names: Vec<String> = settings.names.iter().map(ToString::to_string).collect();
        if names.contains(&host) {
            return Ok(());
        }
        let problem =
            format!("the URL names {host}, and the certificate will be for {}: name it there too", names.join(", "));
        Err(Error::Setting(problem))
    }

    /// The name that a public authority certifies first.
    pub(crate) fn acme_name(&self) -> Option<String> {
        match self {
            Self::Acme(settings) => settings.names.first().map(ToString::to_string),
            Self::Generated | Self::Files(_) => None,
        }
    }
}

impl Server<'_> {
    /// The names of a certificate of our own: host and addresses.
    fn names(&self) -> Vec<String> {
        let mut names = vec![self.host.trim_matches(['[', ']']).to_owned()];
        for address in self.listen.iter().map(SocketAddr::ip).filter(|ip| !ip.is_unspecified()) {
            if !names.contains(&address.to_string()) {
                names.push(address.to_string());
            }
        }
        names
    }
}

impl Opened {
    /// The pin to publish: if it is a certificate of our own.
    pub(crate) fn pin(&self) -> Option<String> {
        self.pin.clone()
    }

    /// Shows the certificate on `listeners`, with the meta-certificate of `relay`, and keeps it up to date in `tasks`.
    /// With the acceptor, what to notify so that it is looked after at once.
    pub(crate) fn show(
        self,
        listeners: Vec<TcpListener>,
        relay: Option<&RelayPublic>,
        tasks: &mut JoinSet<()>,
    ) -> Result<(Acceptor, Arc<Notify>), TlsError> {
        let mut current = CurrentCertificate::new(self.tls, relay.copied())?;
        if let Source::Acme(_) = self.source {
            current = current.answering_validations();
        }
        let current = Arc::new(current);
        let acceptor = Acceptor::from_listeners(listeners, Some(current.config()?)).answering(Arc::clone(&current));
        let keeper = Keeper::new(current);
        let keeper = match self.source {
            Source::Fixed => keeper,
            Source::Files(files) => keeper.watching(files),
            Source::Acme(issuer) => keeper.asking(*issuer),
        };
        let request = keeper.request();
        tasks.spawn(async move { match keeper.run().await {} });
        Ok((acceptor, request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay;

    fn acme(names: &[&str]) -> Certificate {
        Certificate::Acme(acme::Settings::new(names.iter().map(|name| name.parse().unwrap()).collect()))
    }

    #[test]
    fn a_relay_with_an_issued_certificate_is_described_by_its_name_without_a_pin() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = relay::Config::new(dir.path(), vec!["0.0.0.0:443".parse().unwrap()]);
        assert!(relay::describe(&config).is_err(), "a wildcard address says nothing");
        config.certificate = acme(&["relay.example.org", "other.example.org"]);
        let node = relay::describe(&config).unwrap();
        assert_eq!((node.host_name.as_str(), node.cert_name.as_str()), ("relay.example.org", ""));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is made or asked for");
    }

    #[test]
    fn a_coordinator_has_to_be_called_what_is_certified() {
        let certificate = acme(&["mesh.example.org", "2001:db8::1"]);
        for host in ["mesh.example.org", "Mesh.Example.ORG", "[2001:db8::1]", "2001:db8::1"] {
            certificate.names_host(host).unwrap();
        }
        let line = certificate.names_host("other.example.org").unwrap_err().to_string();
        assert_eq!(
            line,
            "the URL names other.example.org, and the certificate will be for mesh.example.org, 2001:db8::1: name it there too"
        );
        Certificate::Generated.names_host("other.example.org").unwrap();
    }
}
