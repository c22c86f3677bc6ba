//! The certificate a server shows.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_noise::key::RelayPublic;
use rcgen::{CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, SerialNumber};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ParsedCertificate;

use super::verify::fingerprint;
use super::{TlsError, provider, read_certificates, read_file, server_name};
use crate::frame::PROTOCOL_VERSION;
use crate::map::PIN_PREFIX;
use crate::x509::META_PREFIX;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// A pinned certificate is trusted for its hash, not for its age: changing it means publishing a new pin.
const VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// The file in the state directory that holds the generated certificate and its key.
const FILE_NAME: &str = "tls.pem";

/// A server's certificate chain and private key. The key is never printed.
pub struct ServerTls {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").field("pin", &self.pin()).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Takes the certificate kept in `state_dir`, or makes a self-signed one for `names` and keeps it there.
    ///
    /// The file (`tls.pem`, certificate and key) is readable by its owner only and replaced as a whole. A kept
    /// certificate that is not valid for all `names` (DNS names or addresses) is replaced; its pin changes then.
    ///
    /// # Errors
    /// If the directory cannot be used or what is kept in it is damaged.
    pub fn load_or_generate(state_dir: &Path, names: &[String]) -> Result<Self, TlsError> {
        let path = state_dir.join(FILE_NAME);
        if path.exists() {
            let kept = Self::from_pem_files(&path, &path)?;
            if kept.is_valid_for(names) {
                return Ok(kept);
            }
            tracing::info!(file = %path.display(), "the kept certificate does not have all names, making a new one");
        }
        let (made, pem) = Self::generate_pem(names)?;
        crate::driver::write_private_file(&path, pem.as_bytes())
            .map_err(|source| TlsError::File { path: path.clone(), source })?;
        Ok(made)
    }

    /// Makes a self-signed ECDSA P-256 certificate for `names`, kept nowhere.
    ///
    /// # Errors
    /// If a name cannot stand in a certificate.
    pub fn generate(names: &[String]) -> Result<Self, TlsError> {
        Self::generate_pem(names).map(|(made, _)| made)
    }

    fn generate_pem(names: &[String]) -> Result<(Self, String), TlsError> {
        let key = KeyPair::generate().map_err(generate_error)?;
        let mut params = CertificateParams::new(names.to_vec()).map_err(generate_error)?;
        // Long ago: it is the pin that clients check, and one whose clock is behind ours shall find it valid too.
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = (now() + VALIDITY).into();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, names.first().map_or("mesh relay", String::as_str));
        let certificate = params.self_signed(&key).map_err(generate_error)?;
        let pem = format!("{}{}", certificate.pem(), key.serialize_pem());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((Self { chain: vec![certificate.der().clone()], key }, pem))
    }

    /// Takes a certificate chain, leaf first, and its key from PEM files; both may be the same file.
    ///
    /// # Errors
    /// If a file cannot be read or does not hold what it should.
    pub fn from_pem_files(certificates: &Path, key: &Path) -> Result<Self, TlsError> {
        let chain = read_certificates(certificates)?;
        let text = read_file(key)?;
        let parsed = PrivateKeyDer::from_pem_slice(&text)
            .map_err(|error| TlsError::Content { path: key.to_owned(), reason: format!("no private key: {error}") })?;
        Ok(Self { chain, key: parsed })
    }

    /// The certificate itself, without key.
    #[must_use]
    pub fn leaf(&self) -> &CertificateDer<'static> {
        &self.chain[0]
    }

    /// What stands as `CertName` in a DERP map so that exactly this certificate is accepted: `sha256-raw:` and 64 digits.
    #[must_use]
    pub fn pin(&self) -> String {
        format!("{PIN_PREFIX}{}", hex::encode(fingerprint(self.leaf())))
    }

    /// The configuration of a listener. With `relay`, the meta-certificate that carries that key is appended.
    ///
    /// No ALPN is offered: everything here is HTTP/1.1.
    ///
    /// # Errors
    /// If the key does not fit the certificate.
    pub fn config(&self, relay: Option<&RelayPublic>) -> Result<Arc<ServerConfig>, TlsError> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(self.chain_with_meta(relay)?, self.key.clone_key())?;
        Ok(Arc::new(config))
    }

    pub(super) fn chain_with_meta(
        &self,
        relay: Option<&RelayPublic>,
    ) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let mut chain = self.chain.clone();
        if let Some(relay) = relay {
            chain.push(meta_certificate(relay)?);
        }
        Ok(chain)
    }

    fn is_valid_for(&self, names: &[String]) -> bool {
        let Ok(parsed) = ParsedCertificate::try_from(self.leaf()) else { return false };
        names
            .iter()
            .all(|name| server_name(name).is_ok_and(|name| rustls::client::verify_server_name(&parsed, &name).is_ok()))
    }
}

fn meta_certificate(relay: &RelayPublic) -> Result<CertificateDer<'static>, TlsError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(generate_error)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("{META_PREFIX}{relay}"));
    params.serial_number = Some(SerialNumber::from_slice(&PROTOCOL_VERSION.to_be_bytes()[3..]));
    params.is_ca = IsCa::ExplicitNoCa;
    let now = now();
    params.not_before = (now - 30 * DAY).into();
    params.not_after = (now + 30 * DAY).into();
    Ok(params.self_signed(&key).map_err(generate_error)?.der().clone())
}

fn generate_error(error: rcgen::Error) -> TlsError {
    TlsError::Generate(error.to_string())
}

#[expect(clippy::disallowed_methods, reason = "a certificate's validity begins now")]
fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x509;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_certificate_is_kept_privately_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let both = names(&["relay.example", "127.0.0.1"]);
        let made = ServerTls::load_or_generate(dir.path(), &both).unwrap();
        let mode = fs::metadata(dir.path().join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let kept = ServerTls::load_or_generate(dir.path(), &both[..1]).unwrap();
        assert_eq!(kept.pin(), made.pin());
        let other = ServerTls::load_or_generate(dir.path(), &names(&["other.example"])).unwrap();
        assert_ne!(other.pin(), made.pin());
        fs::write(dir.path().join(FILE_NAME), "damaged").unwrap();
        let error = ServerTls::load_or_generate(dir.path(), &both).unwrap_err();
        assert!(error.to_string().contains("no certificate in it"), "{error}");
    }

    #[test]
    fn the_meta_certificate_carries_the_key_and_the_version() {
        let relay = RelayPublic::from_bytes([0x5c; 32]);
        let tls = ServerTls::generate(&names(&["relay.example"])).unwrap();
        let chain = tls.chain_with_meta(Some(&relay)).unwrap();
        assert_eq!(chain.len(), 2);
        assert_eq!((x509::meta(&chain[1]), x509::meta(&chain[0])), (Some((relay, 2)), None));
        assert!(x509::looks_like_meta(&chain[1]) && !x509::looks_like_meta(&chain[0]));
        let facts = x509::facts(&chain[1]).unwrap();
        assert_eq!(facts.not_after - facts.not_before, 60 * 24 * 60 * 60);
        assert!(tls.config(Some(&relay)).is_ok());
    }
}
