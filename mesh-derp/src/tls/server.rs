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
use rustls::sign::CertifiedKey;

use super::verify::fingerprint;
use super::{CurrentCertificate, TlsError, certificates_in, provider, read_file, server_name};
use crate::driver::wall_clock;
use crate::frame::PROTOCOL_VERSION;
use crate::map::PIN_PREFIX;
use crate::x509::{self, META_PREFIX};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long before the end of a kept certificate it is said that it ends.
const WARNING: Duration = Duration::from_secs(365 * 24 * 60 * 60);
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
    /// What is made here never ends (RFC 5280 §4.1.2.5): it is the pin that clients trust, and another certificate means
    /// another pin, which everybody has to be told. A kept certificate that does end is used up to then, with a warning
    /// in its last year, and replaced by the first start after that, when no client accepts it any longer.
    ///
    /// # Errors
    /// If the directory cannot be used or what is kept in it is damaged.
    pub fn load_or_generate(state_dir: &Path, names: &[String]) -> Result<Self, TlsError> {
        let path = state_dir.join(FILE_NAME);
        if path.exists() {
            let kept = Self::from_pem_files(&path, &path)?;
            let left = kept.left(wall_clock());
            if !kept.is_valid_for(names) {
                tracing::info!(file = %path.display(), "the kept certificate does not have all names, making a new one");
            } else if left.is_zero() {
                tracing::warn!(file = %path.display(), "the kept certificate has expired, making a new one: publish its pin");
            } else {
                if left < WARNING {
                    let days = left.as_secs() / DAY.as_secs();
                    tracing::warn!(file = %path.display(), days, "the kept certificate ends: remove it and start again \
                        for one that does not end, and publish its pin");
                }
                return Ok(kept);
            }
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
        params.not_after = rcgen::date_time_ymd(9999, 12, 31) + (DAY - Duration::from_secs(1));
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
        Self::from_pem((&read_file(certificates)?, certificates), (&read_file(key)?, key))
    }

    /// The same for texts that were read, or are to be written, with the files' names.
    pub(crate) fn from_pem(certificates: (&[u8], &Path), key: (&[u8], &Path)) -> Result<Self, TlsError> {
        let chain = certificates_in(certificates.0, certificates.1)?;
        let damaged = |reason: String| TlsError::Content { path: key.1.to_owned(), reason };
        let parsed =
            PrivateKeyDer::from_pem_slice(key.0).map_err(|error| damaged(format!("no private key: {error}")))?;
        let read = Self { chain, key: parsed };
        match read.certified(None) {
            Err(TlsError::Rustls(rustls::Error::InconsistentKeys(_))) => {
                Err(damaged(format!("this key does not belong to the certificate in {}", certificates.1.display())))
            }
            Err(TlsError::Rustls(error)) => Err(damaged(format!("the key cannot be used: {error}"))),
            Err(error) => Err(error),
            Ok(_) => Ok(read),
        }
    }

    /// The certificate itself, without key.
    #[must_use]
    pub fn leaf(&self) -> &CertificateDer<'static> {
        &self.chain[0]
    }

    /// The certificate and those between it and its authority's.
    pub(super) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// What stands as `CertName` in a DERP map so that exactly this certificate is accepted: `sha256-raw:` and 64 digits.
    #[must_use]
    pub fn pin(&self) -> String {
        format!("{PIN_PREFIX}{}", hex::encode(fingerprint(self.leaf())))
    }

    /// The configuration of a listener that shows this certificate for ever, with the meta-certificate that carries
    /// `relay` if there is one. A [`CurrentCertificate`] is what may change.
    ///
    /// No ALPN is offered: everything here is HTTP/1.1.
    ///
    /// # Errors
    /// If the key does not fit the certificate.
    pub fn config(&self, relay: Option<&RelayPublic>) -> Result<Arc<ServerConfig>, TlsError> {
        let same = Self { chain: self.chain.clone(), key: self.key.clone_key() };
        Arc::new(CurrentCertificate::new(same, relay.copied())?).config()
    }

    /// Chain and key as rustls shows them, `meta` appended.
    pub(super) fn certified(&self, meta: Option<CertificateDer<'static>>) -> Result<CertifiedKey, TlsError> {
        let chain = self.chain.iter().cloned().chain(meta).collect();
        Ok(CertifiedKey::from_der(chain, self.key.clone_key(), &provider())?)
    }

    /// How long it is still valid. Zero if it cannot be read.
    pub(crate) fn left(&self, now: SystemTime) -> Duration {
        x509::validity(self.leaf()).map_or(Duration::ZERO, |validity| validity.left(now))
    }

    /// Whether all of the names, DNS names or addresses, stand in it.
    pub(crate) fn is_valid_for(&self, names: &[String]) -> bool {
        let Ok(parsed) = ParsedCertificate::try_from(self.leaf()) else { return false };
        names
            .iter()
            .all(|name| server_name(name).is_ok_and(|name| rustls::client::verify_server_name(&parsed, &name).is_ok()))
    }
}

/// A meta-certificate that is valid for 30 days before and after `now`.
pub(super) fn meta_certificate(relay: &RelayPublic, now: SystemTime) -> Result<CertificateDer<'static>, TlsError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(generate_error)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("{META_PREFIX}{relay}"));
    params.serial_number = Some(SerialNumber::from_slice(&PROTOCOL_VERSION.to_be_bytes()[3..]));
    params.is_ca = IsCa::ExplicitNoCa;
    params.not_before = (now - 30 * DAY).into();
    params.not_after = (now + 30 * DAY).into();
    Ok(params.self_signed(&key).map_err(generate_error)?.der().clone())
}

pub(super) fn generate_error(error: rcgen::Error) -> TlsError {
    TlsError::Generate(error.to_string())
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
        let meta = meta_certificate(&relay, SystemTime::UNIX_EPOCH + 20_000 * DAY).unwrap();
        let own = ServerTls::generate(&names(&["relay.example"])).unwrap();
        assert_eq!((x509::meta(&meta), x509::meta(own.leaf())), (Some((relay, 2)), None));
        assert!(x509::looks_like_meta(&meta) && !x509::looks_like_meta(own.leaf()));
        let facts = x509::facts(&meta).unwrap();
        let day = |seconds| seconds / (24 * 60 * 60);
        assert_eq!((day(facts.not_before), day(facts.not_after)), (19_970, 20_030));
    }

    #[test]
    fn a_certificate_of_our_own_never_ends_and_one_that_has_ended_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = names(&["relay.example"]);
        let made = ServerTls::load_or_generate(dir.path(), &wanted).unwrap();
        assert_eq!(x509::facts(made.leaf()).unwrap().not_after, 253_402_300_799, "9999-12-31T23:59:59Z");

        let mut params = CertificateParams::new(wanted.clone()).unwrap();
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let key = KeyPair::generate().unwrap();
        let ended = params.self_signed(&key).unwrap();
        fs::write(dir.path().join(FILE_NAME), ended.pem() + &key.serialize_pem()).unwrap();
        let next = ServerTls::load_or_generate(dir.path(), &wanted).unwrap();
        assert!(next.leaf() != ended.der() && !next.left(wall_clock()).is_zero());
        assert_eq!(ServerTls::load_or_generate(dir.path(), &wanted).unwrap().pin(), next.pin());
    }

    #[test]
    fn a_key_of_another_certificate_is_refused_with_both_files_named() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        for dir in [&one, &other] {
            ServerTls::load_or_generate(dir, &names(&["relay.example"])).unwrap();
        }
        let (one, other) = (one.join(FILE_NAME), other.join(FILE_NAME));
        let line = ServerTls::from_pem_files(&one, &other).unwrap_err().to_string();
        assert!(line.contains("other/tls.pem: this key does not belong to the certificate in "), "{line}");
        assert!(line.ends_with("one/tls.pem"), "{line}");
    }
}
