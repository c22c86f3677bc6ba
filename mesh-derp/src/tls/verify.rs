//! The verifiers behind [`ClientTls`](super::ClientTls).

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, SignatureScheme};

use crate::x509;

macro_rules! verify_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(message, certificate, signed, &self.algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, certificate, signed, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

/// What a pinned relay did wrong.
#[derive(thiserror::Error)]
enum PinMismatch {
    #[error("the certificate shown is not the pinned one: its pin would be {}{}", crate::map::PIN_PREFIX, hex::encode(.0))]
    Hash([u8; 32]),
    #[error("a certificate other than the pinned one and the meta-certificate was shown")]
    Extra,
    #[error("the certificate cannot be read")]
    Unreadable,
}

impl fmt::Debug for PinMismatch {
    /// rustls prints nested errors this way, and people read them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<PinMismatch> for Error {
    fn from(mismatch: PinMismatch) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(mismatch))))
    }
}

/// SHA-256 of a certificate's DER form.
pub(super) fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate);
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    bytes
}

/// Demands one particular certificate, as the leaf, within its validity, and valid for the name if one was sent.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pin: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinVerifier {
    pub(super) fn new(pin: [u8; 32], provider: &CryptoProvider) -> Self {
        Self { pin, algorithms: provider.signature_verification_algorithms }
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let hash = fingerprint(leaf);
        if hash != self.pin {
            return Err(PinMismatch::Hash(hash).into());
        }
        if !others.iter().all(|other| x509::looks_like_meta(other)) {
            return Err(PinMismatch::Extra.into());
        }
        check_validity(leaf, now)?;
        // An address is not sent in the handshake, and the map's addresses need not stand in the certificate.
        if matches!(name, ServerName::DnsName(_)) {
            rustls::client::verify_server_name(&ParsedCertificate::try_from(leaf)?, name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    verify_signatures!();
}

fn check_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let facts = x509::facts(certificate).ok_or(PinMismatch::Unreadable)?;
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now < facts.not_before {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > facts.not_after {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

/// Accepts every certificate, but still wants proof of its key.
#[derive(Debug)]
pub(super) struct AnyVerifier {
    algorithms: WebPkiSupportedAlgorithms,
}

impl AnyVerifier {
    pub(super) fn new(provider: &CryptoProvider) -> Self {
        Self { algorithms: provider.signature_verification_algorithms }
    }
}

impl ServerCertVerifier for AnyVerifier {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _others: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    verify_signatures!();
}

/// Accepts certificates that were listed one by one, for what they name and as long as they are valid; asks `inner`
/// about all others.
///
/// Who makes a self-signed certificate with the usual tools gets one that is marked as an authority's, and webpki does
/// not take such a one for a server's, however much it is trusted.
#[derive(Debug)]
pub(super) struct ListedVerifier {
    listed: Vec<[u8; 32]>,
    inner: Arc<dyn ServerCertVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ListedVerifier {
    pub(super) fn new(
        listed: &[CertificateDer<'_>],
        inner: Arc<dyn ServerCertVerifier>,
        provider: &CryptoProvider,
    ) -> Self {
        let listed = listed.iter().map(|certificate| fingerprint(certificate)).collect();
        Self { listed, inner, algorithms: provider.signature_verification_algorithms }
    }
}

impl ServerCertVerifier for ListedVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if !self.listed.contains(&fingerprint(leaf)) {
            return self.inner.verify_server_cert(leaf, others, name, ocsp, now);
        }
        check_validity(leaf, now)?;
        // The parser behind `ParsedCertificate` is content with an authority's certificate.
        rustls::client::verify_server_name(&ParsedCertificate::try_from(leaf)?, name)?;
        Ok(ServerCertVerified::assertion())
    }

    verify_signatures!();
}

/// Verifies another name than the one that was sent.
pub(super) struct NamedVerifier {
    name: ServerName<'static>,
    inner: Arc<dyn ServerCertVerifier>,
}

impl NamedVerifier {
    pub(super) fn new(name: ServerName<'static>, inner: Arc<dyn ServerCertVerifier>) -> Self {
        Self { name, inner }
    }
}

impl fmt::Debug for NamedVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NamedVerifier").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for NamedVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _sent: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.inner.verify_server_cert(leaf, others, &self.name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(feature = "server")]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{ServerTls, provider, server_name};
    use mesh_noise::key::RelayPublic;
    use rustls::pki_types::UnixTime;
    use std::time::Duration;

    struct Shown {
        chain: Vec<CertificateDer<'static>>,
        not_before: u64,
        not_after: u64,
    }

    fn shown(name: &str) -> Shown {
        let tls = ServerTls::generate(&[name.to_owned()]).unwrap();
        let current = crate::tls::CurrentCertificate::new(tls, Some(RelayPublic::from_bytes([7; 32]))).unwrap();
        let chain = current.shown().cert.clone();
        let facts = x509::facts(&chain[0]).unwrap();
        let (not_before, not_after) = (facts.not_before as u64, facts.not_after as u64);
        Shown { chain, not_before, not_after }
    }

    fn check(chain: &[CertificateDer<'static>], pin: [u8; 32], name: &str, at: u64) -> Result<(), String> {
        let verifier = PinVerifier::new(pin, &provider());
        let (name, now) = (server_name(name).unwrap(), UnixTime::since_unix_epoch(Duration::from_secs(at)));
        let verified = verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], now);
        verified.map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_pinned_leaf_with_a_meta_certificate_is_accepted() {
        let Shown { chain, not_before, not_after } = shown("relay.example");
        let pin = fingerprint(&chain[0]);
        assert_eq!(check(&chain, pin, "relay.example", not_before), Ok(()));
        assert_eq!(check(&chain[..1], pin, "relay.example", not_after), Ok(()));
        assert_eq!(check(&chain, pin, "192.0.2.1", not_before), Ok(()));
    }

    #[test]
    fn the_pinned_certificate_has_to_be_the_leaf() {
        let (real, attacker) = (shown("relay.example"), shown("relay.example"));
        let pin = fingerprint(&real.chain[0]);
        let meta = &attacker.chain[1];
        let forged = [meta.clone(), real.chain[0].clone()];
        assert!(check(&forged, pin, "relay.example", real.not_before).unwrap_err().contains("not the pinned one"));
        let forged = [attacker.chain[0].clone(), real.chain[0].clone(), meta.clone()];
        assert!(check(&forged, pin, "relay.example", real.not_before).unwrap_err().contains("not the pinned one"));
        let padded = [real.chain[0].clone(), attacker.chain[0].clone()];
        assert!(check(&padded, pin, "relay.example", real.not_before).unwrap_err().contains("other than the pinned"));
    }

    #[test]
    fn a_self_signed_certificate_marked_as_an_authority_is_accepted_where_it_is_listed() {
        let mut params = rcgen::CertificateParams::new(vec!["coordinator.example".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let own = CertificateDer::from(params.self_signed(&key).unwrap().der().to_vec());
        let facts = x509::facts(&own).unwrap();
        let (not_before, not_after) = (facts.not_before as u64, facts.not_after as u64);
        let nobody: Arc<dyn ServerCertVerifier> = Arc::new(PinVerifier::new([0; 32], &provider()));
        let verifier = ListedVerifier::new(std::slice::from_ref(&own), nobody, &provider());
        let check = |leaf: &CertificateDer<'_>, name: &str, at: u64| {
            let (name, now) = (server_name(name).unwrap(), UnixTime::since_unix_epoch(Duration::from_secs(at)));
            verifier.verify_server_cert(leaf, &[], &name, &[], now).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(check(&own, "coordinator.example", not_before), Ok(()));
        assert!(check(&own, "other.example", not_before).is_err());
        assert!(check(&own, "coordinator.example", not_after + 1).unwrap_err().contains("Expired"));
        let stranger = shown("coordinator.example");
        assert!(check(&stranger.chain[0], "coordinator.example", stranger.not_before).is_err());
    }

    #[test]
    fn validity_and_name_still_count() {
        let Shown { chain, not_before, not_after } = shown("relay.example");
        let pin = fingerprint(&chain[0]);
        let error = |name, at| check(&chain, pin, name, at).unwrap_err();
        assert_eq!(error("relay.example", not_before - 1), "invalid peer certificate: NotValidYet");
        assert_eq!(error("relay.example", not_after + 1), "invalid peer certificate: Expired");
        assert!(error("other.example", not_before).contains("other.example"));
    }
}
