//! The handshake's messages as bytes: Noise inside, indices around it, MACs at the end (whitepaper §5.4.2, §5.4.3).

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::Reject;
use super::cookie::Stamper;
use super::message::{INITIATION_LEN, Initiation, RESPONSE_LEN, Response};
use super::timestamp::Timestamp;
use crate::key::{NodePrivate, NodePublic, PresharedKey};
use crate::noise::NoiseError;
use crate::noise::ikpsk2::{Initiator, Responder, TransportKeys};
use crate::noise::resolver::StaticKey;

/// The interface's own key, with what is computed from it once.
pub(crate) struct Identity {
    statik: Arc<StaticKey>,
    public: NodePublic,
}

impl Identity {
    pub(crate) fn new(private: &NodePrivate) -> Self {
        let statik = Arc::new(StaticKey::new(private.expose_secret()));
        let public = NodePublic::from_bytes(*statik.public());
        Self { statik, public }
    }

    pub(crate) fn public(&self) -> &NodePublic {
        &self.public
    }

    /// A handshake with this peer was authentic: its next ones may cost one agreement less.
    pub(crate) fn remember(&self, peer: &NodePublic) {
        self.statik.keep_agreement(peer.as_bytes());
    }

    /// The peer is gone.
    pub(crate) fn forget(&self, peer: &NodePublic) {
        self.statik.forget_agreement(peer.as_bytes());
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.public).finish()
    }
}

impl From<NoiseError> for Reject {
    fn from(error: NoiseError) -> Self {
        if error == NoiseError::LowOrder { Self::LowOrder } else { Self::Authentication }
    }
}

/// An initiation of ours that waits for its response.
pub(crate) struct InFlight {
    pub(crate) index: u32,
    noise: Initiator,
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight").field("index", &self.index).finish_non_exhaustive()
    }
}

/// What one initiation is made of, beside the keys.
pub(crate) struct Ingredients {
    pub(crate) now: Instant,
    pub(crate) index: u32,
    pub(crate) timestamp: Timestamp,
    pub(crate) ephemeral: [u8; 32],
}

impl InFlight {
    pub(crate) fn start(
        identity: &Identity,
        peer: &NodePublic,
        stamper: &mut Stamper,
        with: Ingredients,
    ) -> Result<(Self, [u8; INITIATION_LEN]), NoiseError> {
        let (noise, message) = Initiator::start(&identity.statik, peer, &with.timestamp.to_bytes(), with.ephemeral)?;
        let mut datagram = Initiation { sender: with.index, noise: message }.to_bytes();
        stamper.stamp(with.now, peer, &mut datagram);
        Ok((Self { index: with.index, noise }, datagram))
    }

    pub(crate) fn finish(&mut self, psk: &PresharedKey, response: &Response) -> Result<TransportKeys, Reject> {
        Ok(self.noise.finish(psk, &response.noise)?)
    }
}

/// An initiation that opened: it comes from `peer`, if it is not a replay.
pub(crate) struct Asked {
    pub(crate) peer: NodePublic,
    pub(crate) timestamp: Timestamp,
    pub(crate) sender: u32,
    noise: Responder,
}

impl Asked {
    pub(crate) fn read(identity: &Identity, message: &Initiation, ephemeral: [u8; 32]) -> Result<Self, Reject> {
        let (noise, peer, payload) = Responder::read(&identity.statik, &message.noise, ephemeral)?;
        Ok(Self { peer, timestamp: Timestamp::from_bytes(payload), sender: message.sender, noise })
    }

    pub(crate) fn answer(
        self,
        now: Instant,
        psk: &PresharedKey,
        index: u32,
        stamper: &mut Stamper,
    ) -> Result<([u8; RESPONSE_LEN], TransportKeys), Reject> {
        let Self { peer, sender, noise, .. } = self;
        let (noise, keys) = noise.respond(psk)?;
        let mut datagram = Response { sender: index, receiver: sender, noise }.to_bytes();
        stamper.stamp(now, &peer, &mut datagram);
        Ok((datagram, keys))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wireguard::cookie::Checker;
    use crate::wireguard::interface::tests::start;

    #[test]
    fn low_order_points_are_refused_in_either_message_and_as_a_peers_key() {
        let privates = [1, 2].map(|seed| NodePrivate::from_bytes([seed; 32]));
        let [us, them] = [Identity::new(&privates[0]), Identity::new(&privates[1])];
        let with =
            || Ingredients { now: start(), index: 7, timestamp: Timestamp::from_bytes([1; 12]), ephemeral: [9; 32] };
        for point in [[0; 32], std::array::from_fn(|at| u8::from(at == 0)), ORDER_EIGHT] {
            let nobody = NodePublic::from_bytes(point);
            let refused = InFlight::start(&us, &nobody, &mut Stamper::default(), with());
            assert_eq!(refused.err(), Some(NoiseError::LowOrder));

            let mut stamper = Stamper::default();
            let (mut in_flight, datagram) = InFlight::start(&us, them.public(), &mut stamper, with()).unwrap();
            let mut initiation = Initiation::parse(&datagram).unwrap();
            let asked = Asked::read(&them, &initiation, [3; 32]).unwrap();
            initiation.noise[..32].copy_from_slice(&point);
            assert_eq!(Asked::read(&them, &initiation, [3; 32]).err(), Some(Reject::LowOrder));

            let psk = PresharedKey::default();
            let (answer, _) = asked.answer(start(), &psk, 8, &mut Stamper::default()).unwrap();
            let sound = Response::parse(&answer).unwrap();
            let mut response = sound;
            response.noise[..32].copy_from_slice(&point);
            assert_eq!(in_flight.finish(&psk, &response).err(), Some(Reject::LowOrder));
            assert!(in_flight.finish(&psk, &sound).is_ok(), "a forged answer does not spoil the real one");
        }
    }

    /// A point whose multiples are only eight, as published with Curve25519.
    const ORDER_EIGHT: [u8; 32] = [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ];

    #[test]
    fn initiations_of_real_clients_open_to_what_they_said() {
        let recorded = include_str!("../../tests/data/wireguard-initiations.json");
        let recorded: serde_json::Value = serde_json::from_str(recorded).unwrap();
        let bytes = |value: &serde_json::Value| hex::decode(value.as_str().unwrap()).unwrap();
        let private = NodePrivate::from_bytes(bytes(&recorded["responder_private"]).try_into().unwrap());
        let identity = Identity::new(&private);
        assert_eq!(*identity.public(), private.public());
        let mut checker = Checker::new(identity.public(), 500);
        let mut rng = crate::random::SeededRng::from_seed([1; 32]);
        let initiations = recorded["initiations"].as_array().unwrap();
        assert!(initiations.len() > 5);
        for recorded in initiations {
            let datagram = bytes(&recorded["packet_hex"]);
            assert_eq!(checker.check(start(), None, &datagram, &mut rng), Ok(()));
            let message = Initiation::parse(&datagram).unwrap();
            assert_eq!(Some(u64::from(message.sender)), recorded["sender_index_le"].as_u64());
            let asked = Asked::read(&identity, &message, [1; 32]).unwrap();
            assert_eq!(asked.peer.as_bytes()[..], bytes(&recorded["initiator_static_public"]));
            assert_eq!(asked.timestamp.to_bytes()[..], bytes(&recorded["tai64n_hex"]));
            let mut stamper = Stamper::default();
            assert!(asked.answer(start(), &PresharedKey::default(), 1, &mut stamper).is_ok());
        }
    }
}
