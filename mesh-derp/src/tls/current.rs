//! The certificate that a listener shows now.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use mesh_noise::key::RelayPublic;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::server::meta_certificate;
#[cfg(feature = "acme")]
use super::validation::{ACME_TLS, Validations, is_validation};
use super::{ServerTls, TlsError, provider};
use crate::driver::wall_clock;

/// How far from the middle of its sixty days a meta-certificate is replaced.
const META_AGE: Duration = Duration::from_secs(10 * 24 * 60 * 60);

/// A certificate that can be replaced while it is shown: handshakes that begin afterwards show the new one, and
/// connections that stand notice nothing. What replaces it is in [`driver::certificates`](crate::driver::certificates).
///
/// With a relay's key, the [meta-certificate](crate::x509) that carries it is appended to whatever is shown.
#[derive(Debug)]
pub struct CurrentCertificate {
    relay: Option<RelayPublic>,
    state: RwLock<State>,
    #[cfg(feature = "acme")]
    validations: Option<Validations>,
}

#[derive(Debug)]
struct State {
    tls: ServerTls,
    shown: Arc<CertifiedKey>,
    made: SystemTime,
}

impl State {
    fn new(tls: ServerTls, relay: Option<&RelayPublic>, now: SystemTime) -> Result<Self, TlsError> {
        let meta = relay.map(|relay| meta_certificate(relay, now)).transpose()?;
        let shown = Arc::new(tls.certified(meta)?);
        Ok(Self { tls, shown, made: now })
    }
}

impl CurrentCertificate {
    /// Shows `tls`, and with `relay` the meta-certificate that carries that key.
    ///
    /// # Errors
    /// If the key does not fit the certificate.
    pub fn new(tls: ServerTls, relay: Option<RelayPublic>) -> Result<Self, TlsError> {
        Ok(Self {
            state: RwLock::new(State::new(tls, relay.as_ref(), wall_clock())?),
            relay,
            #[cfg(feature = "acme")]
            validations: None,
        })
    }

    /// The same, and ready to answer an authority that validates names ([`crate::acme`]).
    #[cfg(feature = "acme")]
    #[must_use]
    pub fn answering_validations(self) -> Self {
        Self { validations: Some(Validations::default()), ..self }
    }

    /// What it answers to authorities, if it does.
    #[cfg(feature = "acme")]
    pub(crate) const fn validations(&self) -> Option<&Validations> {
        self.validations.as_ref()
    }

    /// The configuration of a listener that shows whatever is current.
    ///
    /// ALPN is offered only where authorities may ask for `acme-tls/1`; HTTP/1.1 stands beside it then, for the clients
    /// that insist on a protocol.
    ///
    /// # Errors
    /// If rustls refuses it.
    pub fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let resolver: Arc<dyn ResolvesServerCert> = Arc::<Self>::clone(self);
        #[cfg_attr(not(feature = "acme"), expect(unused_mut, reason = "ALPN is for authorities alone"))]
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        #[cfg(feature = "acme")]
        if self.validations.is_some() {
            config.alpn_protocols = vec![ACME_TLS.to_vec(), b"http/1.1".to_vec()];
        }
        Ok(Arc::new(config))
    }

    /// Shows `tls` from now on.
    ///
    /// # Errors
    /// If the key does not fit the certificate; nothing has changed then.
    pub fn replace(&self, tls: ServerTls) -> Result<(), TlsError> {
        let next = State::new(tls, self.relay.as_ref(), wall_clock())?;
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }

    /// Appends a new meta-certificate if the one that is shown is ten days old, or from ten days ahead: clocks are set
    /// right after a start.
    pub(crate) fn refresh_meta(&self, now: SystemTime) {
        if self.relay.is_none() || !self.read(|state| meta_is_due(state.made, now)) {
            return;
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let made = self.relay.as_ref().map(|relay| meta_certificate(relay, now)).transpose();
        match made.and_then(|meta| state.tls.certified(meta)) {
            Ok(shown) => (state.shown, state.made) = (Arc::new(shown), now),
            Err(error) => tracing::error!(%error, "the meta-certificate stays as it was"),
        }
    }

    /// Whether that is what is shown.
    pub(crate) fn shows(&self, tls: &ServerTls) -> bool {
        self.read(|state| state.tls.chain() == tls.chain())
    }

    /// How long the certificate is still valid.
    pub(crate) fn left(&self, now: SystemTime) -> Duration {
        self.read(|state| state.tls.left(now))
    }

    /// The chain, leaf first, and the key of its leaf, as the next handshake shows them.
    #[must_use]
    pub fn shown(&self) -> Arc<CertifiedKey> {
        self.read(|state| Arc::clone(&state.shown))
    }

    fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for CurrentCertificate {
    #[cfg_attr(not(feature = "acme"), expect(unused_variables, reason = "who asks matters to authorities alone"))]
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        #[cfg(feature = "acme")]
        if let Some(validations) = &self.validations
            && is_validation(hello.alpn())
        {
            return validations.certificate(hello.server_name()?);
        }
        Some(self.shown())
    }
}

fn meta_is_due(made: SystemTime, now: SystemTime) -> bool {
    let age = now.duration_since(made).unwrap_or_else(|ahead| ahead.duration());
    age >= META_AGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x509;

    fn made(name: &str) -> ServerTls {
        ServerTls::generate(&[name.to_owned()]).unwrap()
    }

    #[test]
    fn the_meta_certificate_outlives_its_thirty_days_and_a_clock_that_was_wrong() {
        let relay = RelayPublic::from_bytes([7; 32]);
        let current = CurrentCertificate::new(made("relay.example"), Some(relay)).unwrap();
        let (leaf, mut now) = (current.shown().cert[0].clone(), wall_clock());
        let day = Duration::from_secs(24 * 60 * 60);
        let check = |now: SystemTime| {
            current.refresh_meta(now);
            let shown = current.shown();
            let meta = x509::validity(&shown.cert[1]).unwrap();
            assert!(meta.left(now) > 10 * day && meta.not_before < now, "{meta:?} at {now:?}");
            assert_eq!((shown.cert.len(), &shown.cert[0]), (2, &leaf));
            assert_eq!(x509::meta(&shown.cert[1]), Some((relay, 2)));
            shown.cert[1].clone()
        };
        let first = check(now);
        assert_eq!(check(now + 9 * day), first, "made anew without need");
        for _ in 0..9 {
            now += 9 * day;
            check(now);
        }
        check(SystemTime::UNIX_EPOCH + 40 * day);
    }

    #[test]
    fn a_replaced_certificate_keeps_the_meta_certificate() {
        let relay = RelayPublic::from_bytes([7; 32]);
        let current = CurrentCertificate::new(made("one.example"), Some(relay)).unwrap();
        let next = made("two.example");
        let leaf = next.leaf().clone();
        current.replace(next).unwrap();
        let shown = current.shown();
        assert_eq!((&shown.cert[0], x509::meta(&shown.cert[1])), (&leaf, Some((relay, 2))));
    }
}
