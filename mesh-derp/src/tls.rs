//! TLS for relay connections: what a client demands of a certificate, and the certificate a server shows.
//!
//! A DERP map says for each node which certificate to expect ([`CertCheck`]): one for its name issued by a trusted root,
//! one particular certificate by its SHA-256 (a *pin*), or, in tests, any. [`ClientTls::for_node`] turns that into a
//! rustls configuration. `ServerTls` (feature `server`) loads or makes a certificate; `CurrentCertificate` shows it with
//! the [meta-certificate](crate::x509) appended, and can be given another one while connections come and go.
//!
//! # Pins and the meta-certificate
//! Every relay shows two certificates: its own and the meta-certificate. A pin therefore means: the *first* certificate,
//! whose key the handshake proves, has this hash, and every further one is a meta-certificate. A chain in which the
//! pinned certificate stands anywhere else is refused: anybody can append a copy of it.
//!
//! Everything runs on one provider, aws-lc-rs, named explicitly; a process-wide default is neither used nor set.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CipherSuite, ClientConfig, RootCertStore};

use crate::map::{BadPin, CertCheck, DerpNode};

#[cfg(feature = "server")]
mod current;
#[cfg(feature = "server")]
mod server;
#[cfg(feature = "acme")]
pub(crate) mod validation;
mod verify;

#[cfg(feature = "server")]
pub use current::CurrentCertificate;
#[cfg(feature = "server")]
pub use server::ServerTls;
use verify::{AnyVerifier, ListedVerifier, NamedVerifier, PinVerifier};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A file holds no usable certificate or key.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is missing or malformed.
        reason: String,
    },
    /// The DERP map's pin is no pin.
    #[error(transparent)]
    Pin(#[from] BadPin),
    /// A name cannot be sent or verified.
    #[error("\"{0}\" is neither a DNS name nor an address")]
    Name(String),
    /// That URL is no authority's directory.
    #[error("\"{0}\" is not the https:// URL of an authority's directory")]
    Directory(String),
    /// rustls refuses the configuration.
    #[error("tls: {0}")]
    Rustls(#[from] rustls::Error),
    /// No certificate can be made.
    #[error("cannot generate a certificate: {0}")]
    Generate(String),
}

/// The one crypto provider. AES-128-GCM is asked for first, as Go does: with a key of 256 bits a gigabyte takes a tenth of
/// a CPU second more, and what goes through a relay is encrypted already.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// How a client secures its connections. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls {
    roots: Option<Arc<dyn ServerCertVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_plain() { "ClientTls(plain)" } else { "ClientTls" })
    }
}

impl ClientTls {
    /// Trusts what the system trusts; where it trusts nothing (a bare container), Mozilla's list.
    ///
    /// # Errors
    /// If the system's roots cannot be used.
    pub fn system() -> Result<Self, TlsError> {
        Self::with_roots(Vec::new())
    }

    /// Trusts the certificates in a PEM file as well.
    ///
    /// # Errors
    /// If the file cannot be read or holds no certificate.
    pub fn with_ca_file(path: &Path) -> Result<Self, TlsError> {
        Self::with_roots(read_certificates(path)?)
    }

    /// Trusts further certificates as well: those that they have signed, and themselves as a server's.
    ///
    /// # Errors
    /// If one of them is no certificate.
    pub fn with_roots(extra: Vec<CertificateDer<'static>>) -> Result<Self, TlsError> {
        let provider = provider();
        let listed = extra.clone();
        let system = rustls_platform_verifier::Verifier::new(Arc::clone(&provider));
        let roots: Arc<dyn ServerCertVerifier> = match system {
            Ok(verifier) if extra.is_empty() => Arc::new(verifier),
            Ok(_) => Arc::new(rustls_platform_verifier::Verifier::new_with_extra_roots(extra, Arc::clone(&provider))?),
            Err(reason) => {
                tracing::debug!(%reason, "no system roots, using the built-in list");
                let mut store = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
                for certificate in extra {
                    store.add(certificate)?;
                }
                let built = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider)).build();
                built.map_err(|error| TlsError::Rustls(rustls::Error::General(error.to_string())))?
            }
        };
        let listed: Arc<dyn ServerCertVerifier> = Arc::new(ListedVerifier::new(&listed, roots, &provider));
        Ok(Self { roots: Some(listed), provider })
    }

    /// No TLS at all: relays are spoken to over plain HTTP. For tests and for links that are secured otherwise.
    #[must_use]
    pub fn plain() -> Self {
        Self { roots: None, provider: provider() }
    }

    /// Whether there is no TLS at all.
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        self.roots.is_none()
    }

    /// The configuration for one relay, demanding what the DERP map says of its certificate. No ALPN is offered: the
    /// connection has to be HTTP/1.1.
    ///
    /// # Errors
    /// If the map's demand makes no sense.
    pub fn for_node(&self, node: &DerpNode) -> Result<Arc<ClientConfig>, TlsError> {
        let verifier: Arc<dyn ServerCertVerifier> = match node.cert_check()? {
            CertCheck::Sha256(pin) => Arc::new(PinVerifier::new(pin, &self.provider)),
            CertCheck::Nothing => Arc::new(AnyVerifier::new(&self.provider)),
            CertCheck::Name(name) if name == node.host_name => self.trusted(),
            CertCheck::Name(name) => Arc::new(NamedVerifier::new(server_name(&name)?, self.trusted())),
        };
        let mut config = self.config(verifier, &[])?;
        let relay = Arc::make_mut(&mut config);
        // The stream takes the keys over. What this configuration could resume ends with it: it serves one connection.
        relay.enable_secret_extraction = true;
        relay.resumption = Resumption::disabled();
        Ok(config)
    }

    /// The configuration for an ordinary HTTPS server, verified by its name.
    ///
    /// # Errors
    /// If rustls refuses it.
    pub fn https(&self, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
        self.config(self.trusted(), alpn)
    }

    /// A configuration that accepts any certificate, for connections that are authenticated by what runs inside them.
    ///
    /// # Errors
    /// If rustls refuses it.
    pub fn unverified(&self) -> Result<Arc<ClientConfig>, TlsError> {
        self.config(Arc::new(AnyVerifier::new(&self.provider)), &[])
    }

    fn trusted(&self) -> Arc<dyn ServerCertVerifier> {
        // A plain configuration is only ever asked for TLS by a caller who overrides it: trust nobody then.
        self.roots.clone().unwrap_or_else(|| Arc::new(PinVerifier::new([0; 32], &self.provider)))
    }

    fn config(&self, verifier: Arc<dyn ServerCertVerifier>, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(config))
    }
}

/// A DNS name or an address as rustls wants it.
///
/// # Errors
/// If it is neither.
pub fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    ServerName::try_from(bare.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))
}

fn read_file(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    certificates_in(&read_file(path)?, path)
}

/// The certificates in `text`, which stands in `path`.
pub(crate) fn certificates_in(text: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let content = |reason: String| TlsError::Content { path: path.to_owned(), reason };
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|error| content(error.to_string()))?;
    if certificates.is_empty() {
        return Err(content("no certificate in it".to_owned()));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_cipher_comes_first_and_none_is_missing() {
        let (ours, usual) =
            (provider().cipher_suites.clone(), rustls::crypto::aws_lc_rs::default_provider().cipher_suites);
        assert_eq!(ours[0].suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert!(ours.len() == usual.len() && usual.iter().all(|suite| ours.contains(suite)));
    }
}
