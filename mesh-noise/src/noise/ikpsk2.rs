//! `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s` with WireGuard's prologue (whitepaper §5.4).
//!
//! Message one carries 12 bytes of payload (a timestamp), message two none. The responder learns who is asking
//! from message one, before it needs the preshared key that belongs to that peer.

use std::sync::{Arc, OnceLock};

use snow::params::NoiseParams;
use snow::{Builder, HandshakeState};
use zeroize::{Zeroize, Zeroizing};

use super::NoiseError;
use super::resolver::{Resolver, StaticKey};
use crate::key::{NodePublic, PresharedKey};

/// Ephemeral (32), sealed static key (48), sealed timestamp (28).
pub(crate) const MESSAGE_ONE_LEN: usize = 108;
/// Ephemeral (32), tag over nothing (16).
pub(crate) const MESSAGE_TWO_LEN: usize = 48;
/// Length of message one's payload.
pub(crate) const PAYLOAD_LEN: usize = 12;

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
const PSK_AT: usize = 2;

/// The two keys of a session, as this side uses them. Wiped when dropped.
pub(crate) struct TransportKeys {
    pub(crate) send: Zeroizing<[u8; 32]>,
    pub(crate) receive: Zeroizing<[u8; 32]>,
}

/// The initiating side, between message one and message two.
pub(crate) struct Initiator(HandshakeState);

/// The responding side, between message one and message two.
pub(crate) struct Responder(HandshakeState);

impl Initiator {
    pub(crate) fn start(
        statik: &Arc<StaticKey>,
        peer: &NodePublic,
        payload: &[u8; PAYLOAD_LEN],
        ephemeral: [u8; 32],
    ) -> Result<(Self, [u8; MESSAGE_ONE_LEN]), NoiseError> {
        let mut state = builder(statik, ephemeral)
            .remote_public_key(peer.as_bytes())
            .and_then(Builder::build_initiator)
            .expect("the pattern has all it needs");
        let mut message = [0; MESSAGE_ONE_LEN];
        state.write_message(payload, &mut message).map_err(|error| NoiseError::from_snow(&error))?;
        Ok((Self(state), message))
    }

    /// A message that does not fit leaves the state as it was, so that a forged one cannot spoil the real one.
    pub(crate) fn finish(
        &mut self,
        psk: &PresharedKey,
        message: &[u8; MESSAGE_TWO_LEN],
    ) -> Result<TransportKeys, NoiseError> {
        self.0.set_psk(PSK_AT, psk.expose_secret()).expect("a preshared key is 32 bytes");
        self.0.read_message(message, &mut []).map_err(|error| NoiseError::from_snow(&error))?;
        Ok(keys(&mut self.0))
    }
}

impl Responder {
    /// Reads message one: who asks, and the payload.
    pub(crate) fn read(
        statik: &Arc<StaticKey>,
        message: &[u8; MESSAGE_ONE_LEN],
        ephemeral: [u8; 32],
    ) -> Result<(Self, NodePublic, [u8; PAYLOAD_LEN]), NoiseError> {
        let mut state = builder(statik, ephemeral).build_responder().expect("the pattern has all it needs");
        let mut payload = [0; PAYLOAD_LEN];
        state.read_message(message, &mut payload).map_err(|error| NoiseError::from_snow(&error))?;
        let mut peer = [0; 32];
        peer.copy_from_slice(state.get_remote_static().expect("message one carries the static key"));
        Ok((Self(state), NodePublic::from_bytes(peer), payload))
    }

    pub(crate) fn respond(mut self, psk: &PresharedKey) -> Result<([u8; MESSAGE_TWO_LEN], TransportKeys), NoiseError> {
        self.0.set_psk(PSK_AT, psk.expose_secret()).expect("a preshared key is 32 bytes");
        let mut message = [0; MESSAGE_TWO_LEN];
        self.0.write_message(&[], &mut message).map_err(|error| NoiseError::from_snow(&error))?;
        Ok((message, keys(&mut self.0)))
    }
}

fn builder(statik: &Arc<StaticKey>, ephemeral: [u8; 32]) -> Builder<'_> {
    let resolver = Resolver { statik: Arc::clone(statik), ephemeral: Zeroizing::new(ephemeral) };
    static PARAMS: OnceLock<NoiseParams> = OnceLock::new();
    let params = PARAMS.get_or_init(|| PATTERN.parse().expect("the pattern is a constant"));
    Builder::with_resolver(params.clone(), Box::new(resolver))
        .prologue(PROLOGUE)
        .and_then(|builder| builder.local_private_key(statik.bytes()))
        .expect("each setting is given once")
}

fn keys(state: &mut HandshakeState) -> TransportKeys {
    let (mut up, mut down) = state.dangerously_get_raw_split();
    let (first, second) = (Zeroizing::new(up), Zeroizing::new(down));
    up.zeroize();
    down.zeroize();
    if state.is_initiator() {
        TransportKeys { send: first, receive: second }
    } else {
        TransportKeys { send: second, receive: first }
    }
}
