//! Proof of address without memory: a MAC over who asks for what from where, under a secret that is renewed.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use blake2::Blake2sMac256;
use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use rand_core::CryptoRng;

use crate::disco::message::Binding;

/// How long a secret is used. The one before is accepted for as long again.
pub(super) const SECRET_LIFE: Duration = Duration::from_secs(120);

type Secret = [u8; 32];

pub(super) struct Secrets {
    current: Secret,
    former: Option<Secret>,
    since: Instant,
}

impl Secrets {
    pub(super) fn new(now: Instant, rng: &mut impl CryptoRng) -> Self {
        Self { current: draw(rng), former: None, since: now }
    }

    /// Renews what is too old.
    pub(super) fn tick(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        let age = now.saturating_duration_since(self.since);
        if age >= SECRET_LIFE {
            self.former = (age < SECRET_LIFE * 2).then_some(self.current);
            self.current = draw(rng);
            self.since = now;
        }
    }

    pub(super) fn challenge(&self, binding: &Binding, source: SocketAddr) -> [u8; 32] {
        mac(&self.current, binding, source).finalize_fixed().into()
    }

    /// Whether `binding` carries the challenge for itself and `source`.
    pub(super) fn accept(&self, binding: &Binding, source: SocketAddr) -> bool {
        let mut secrets = std::iter::once(&self.current).chain(&self.former);
        secrets.any(|secret| mac(secret, binding, source).verify_slice(&binding.challenge).is_ok())
    }
}

fn draw(rng: &mut impl CryptoRng) -> Secret {
    let mut secret = Secret::default();
    rng.fill_bytes(&mut secret);
    secret
}

fn mac(secret: &Secret, binding: &Binding, source: SocketAddr) -> Blake2sMac256 {
    let ip = match source.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    <Blake2sMac256 as KeyInit>::new(secret.into())
        .chain(binding.vni.get().to_be_bytes())
        .chain(binding.generation.to_be_bytes())
        .chain(binding.remote.as_bytes())
        .chain(ip.octets())
        .chain(source.port().to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::Vni;
    use mesh_noise::key::DiscoPublic;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn setup() -> (Instant, StdRng, Secrets, Binding, SocketAddr) {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut rng = StdRng::seed_from_u64(1);
        let secrets = Secrets::new(now, &mut rng);
        let remote = DiscoPublic::from_bytes([3; 32]);
        let binding = Binding { vni: Vni::new(7).unwrap(), generation: 1, remote, challenge: [0; 32] };
        (now, rng, secrets, binding, SocketAddr::from(([192, 0, 2, 1], 5)))
    }

    #[test]
    fn a_challenge_is_for_one_binding_from_one_address() {
        let (_, _, secrets, mut binding, source) = setup();
        binding.challenge = secrets.challenge(&binding, source);
        assert!(secrets.accept(&binding, source));
        assert!(!secrets.accept(&binding, SocketAddr::from(([192, 0, 2, 1], 6))));
        assert!(!secrets.accept(&binding, SocketAddr::from(([192, 0, 2, 2], 5))));
        assert!(!secrets.accept(&Binding { generation: 2, ..binding.clone() }, source));
        assert!(!secrets.accept(&Binding { vni: Vni::new(8).unwrap(), ..binding.clone() }, source));
        assert!(!secrets.accept(&Binding { challenge: [0; 32], ..binding }, source));
    }

    #[test]
    fn a_challenge_outlives_one_renewal_of_the_secret() {
        let (now, mut rng, mut secrets, mut binding, source) = setup();
        binding.challenge = secrets.challenge(&binding, source);
        secrets.tick(now + SECRET_LIFE, &mut rng);
        assert!(secrets.accept(&binding, source));
        assert_ne!(secrets.challenge(&binding, source), binding.challenge);
        secrets.tick(now + SECRET_LIFE * 2, &mut rng);
        assert!(!secrets.accept(&binding, source));
    }

    #[test]
    fn a_secret_that_lay_idle_too_long_is_not_accepted() {
        let (now, mut rng, mut secrets, mut binding, source) = setup();
        binding.challenge = secrets.challenge(&binding, source);
        secrets.tick(now + SECRET_LIFE * 2, &mut rng);
        assert!(!secrets.accept(&binding, source));
    }
}
