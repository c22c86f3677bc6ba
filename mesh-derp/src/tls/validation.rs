//! What a server answers to an authority that validates its names: the pending answers, and nothing else.
//!
//! | challenge | question | answer |
//! |---|---|---|
//! | TLS-ALPN-01 (RFC 8737) | a handshake for the name with ALPN `acme-tls/1` | a self-signed certificate for that name alone, with the hash of the key authorization in a critical extension |
//! | HTTP-01 (RFC 8555 §8.3) | `GET /.well-known/acme-challenge/TOKEN` | the key authorization |
//!
//! An address is asked for by its name in the reverse tree, and certified as the address (RFC 8738 §6).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use super::server::generate_error;
use super::{TlsError, provider};
use crate::acme::Name;
use crate::upgrade::{self, RequestHead};

/// The protocol that an authority negotiates (RFC 8737 §6.2).
pub(crate) const ACME_TLS: &[u8] = b"acme-tls/1";
/// Where an authority looks for the answer to HTTP-01.
const WELL_KNOWN: &str = "/.well-known/acme-challenge/";

/// Whether a handshake that offers, or has negotiated, `protocols` is an authority's.
pub(crate) fn is_validation<'a>(protocols: impl IntoIterator<Item: IntoIterator<Item = &'a [u8]>>) -> bool {
    protocols.into_iter().flatten().any(|protocol| protocol == ACME_TLS)
}

/// The answers that are being waited for.
#[derive(Debug, Default)]
pub(crate) struct Validations {
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    /// By the name that the handshake asks for.
    certificates: BTreeMap<String, Arc<CertifiedKey>>,
    /// By token.
    texts: BTreeMap<String, String>,
}

impl Validations {
    /// Answers TLS-ALPN-01 for `name`; `digest` is the SHA-256 of the key authorization.
    ///
    /// # Errors
    /// If no certificate can be made for the name.
    pub(crate) fn expect_tls(&self, name: &Name, digest: &[u8; 32]) -> Result<(), TlsError> {
        let certificate = Arc::new(challenge_certificate(name, digest)?);
        self.pending().certificates.insert(asked_name(name), certificate);
        Ok(())
    }

    /// Answers HTTP-01 for `token`.
    pub(crate) fn expect_http(&self, token: &str, authorization: &str) {
        self.pending().texts.insert(token.to_owned(), authorization.to_owned());
    }

    /// Answers nothing any longer.
    pub(crate) fn clear(&self) {
        *self.pending() = Pending::default();
    }

    /// What a validating handshake for `name` is shown. `None` ends the handshake.
    pub(crate) fn certificate(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        self.pending().certificates.get(&name.to_ascii_lowercase()).cloned()
    }

    /// The whole answer to a request, if it is an authority's question that is expected; with anything else the request
    /// is none of ours.
    pub(crate) fn http(&self, head: &RequestHead) -> Option<Vec<u8>> {
        let token = head.path().strip_prefix(WELL_KNOWN).filter(|_| matches!(head.method.as_str(), "GET" | "HEAD"))?;
        let text = self.pending().texts.get(token)?.clone();
        let headers = [("Content-Type", "application/octet-stream"), ("Connection", "close")];
        Some(upgrade::response(200, "OK", &headers, &text, head.method == "HEAD"))
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn challenge_certificate(name: &Name, digest: &[u8; 32]) -> Result<CertifiedKey, TlsError> {
    let key = KeyPair::generate().map_err(generate_error)?;
    let mut params = CertificateParams::new(vec![name.to_string()]).map_err(generate_error)?;
    params.distinguished_name = DistinguishedName::new();
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
    let certificate = params.self_signed(&key).map_err(generate_error)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    // Not by `from_der`, which stumbles over the critical extension.
    let key = provider().key_provider.load_private_key(key)?;
    Ok(CertifiedKey::new(vec![certificate.der().clone()], key))
}

/// What a validating handshake asks for: the name, or the address in the reverse tree.
fn asked_name(name: &Name) -> String {
    match name {
        Name::Dns(name) => name.clone(),
        Name::Address(IpAddr::V4(address)) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        Name::Address(IpAddr::V6(address)) => {
            let digits = address.octets().into_iter().rev().flat_map(|byte| [byte & 0xf, byte >> 4]);
            let labels: String = digits.map(|digit| format!("{digit:x}.")).collect();
            labels + "ip6.arpa"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_asked_for_in_the_reverse_tree() {
        assert_eq!(asked_name(&name("192.0.2.1")), "1.2.0.192.in-addr.arpa");
        let zeros = "0.".repeat(20);
        assert_eq!(
            asked_name(&name("2001:db8::567:89ab")),
            format!("b.a.9.8.7.6.5.0.{}8.b.d.0.1.0.0.2.ip6.arpa", &zeros[..32])
        );
        assert_eq!(asked_name(&name("Relay.Example")), "relay.example");
    }

    #[test]
    fn only_what_is_pending_is_answered() {
        let validations = Validations::default();
        validations.expect_tls(&name("relay.example"), &[7; 32]).unwrap();
        validations.expect_http("token", "token.thumb");
        let head = |line: &str| {
            upgrade::parse_request(format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap().unwrap().0
        };
        let answer =
            String::from_utf8(validations.http(&head("GET /.well-known/acme-challenge/token")).unwrap()).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\ntoken.thumb"), "{answer}");
        for other in ["GET /.well-known/acme-challenge/other", "POST /.well-known/acme-challenge/token", "GET /token"] {
            assert!(validations.http(&head(other)).is_none(), "{other}");
        }
        let shown = validations.certificate("RELAY.example").unwrap();
        // OID 1.3.6.1.5.5.7.1.31, critical, an OCTET STRING within one (RFC 8737 §3).
        let extension = [&[6, 8, 0x2b, 6, 1, 5, 5, 7, 1, 31, 1, 1, 0xff, 4, 34, 4, 32][..], &[7; 32]].concat();
        assert!(shown.cert[0].windows(extension.len()).any(|window| window == extension));
        assert!(validations.certificate("other.example").is_none());
        validations.clear();
        assert!(validations.certificate("relay.example").is_none());
        assert!(validations.http(&head("GET /.well-known/acme-challenge/token")).is_none());
    }

    #[test]
    fn an_authority_is_known_by_its_protocol() {
        assert!(is_validation([[ACME_TLS]]));
        assert!(!is_validation([[&b"h2"[..], b"http/1.1"]]) && !is_validation(None::<[&[u8]; 0]>));
    }
}
