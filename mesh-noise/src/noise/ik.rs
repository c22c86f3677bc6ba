//! The handshake of the control channel, and the cipher of its records.
//!
//! `Noise_IK_25519_ChaChaPoly_BLAKE2s`: the client knows the server's static key (from `GET /key`) and sends its own,
//! encrypted, in the first message. The prologue is `Tailscale Control Protocol v` and the client's protocol version
//! in decimal, so both sides agree on the version that stands in clear in the header. Integers are big-endian.
//!
//! | message | offset | size | content |
//! |---|---|---|---|
//! | initiation, 101 bytes | 0 | 2 | protocol version |
//! | | 2 | 1 | type, 1 |
//! | | 3 | 2 | length of what follows, 96 |
//! | | 5 | 32 | client's ephemeral public key |
//! | | 37 | 48 | machine public key, sealed |
//! | | 85 | 16 | tag over an empty payload |
//! | response, 51 bytes | 0 | 1 | type, 2 |
//! | | 1 | 2 | length of what follows, 48 |
//! | | 3 | 32 | server's ephemeral public key |
//! | | 35 | 16 | tag over an empty payload |
//!
//! After the split each direction counts its own nonces: four zero bytes and the counter **big-endian**. Noise itself
//! has it little-endian, and so a stock Noise transport agrees on record 0 only.
//!
//! ```
//! use mesh_noise::key::MachinePrivate;
//! use mesh_noise::noise::ik::{Initiator, Responder};
//! use mesh_noise::random::SeededRng;
//!
//! let mut rng = SeededRng::from_seed([1; 32]);
//! let (machine, control) = (MachinePrivate::generate(&mut rng), MachinePrivate::generate(&mut rng));
//!
//! let (initiator, initiation) = Initiator::start(130, &machine, &control.public(), &mut rng)?;
//! let (accepted, response) = Responder::accept(&control, &initiation, &mut rng)?;
//! assert_eq!((accepted.version, accepted.machine), (130, machine.public()));
//!
//! let mut client = initiator.finish(&response)?;
//! let mut server = accepted.split;
//! let mut record = Vec::new();
//! client.tx.seal(b"hello", &mut record)?;
//! assert_eq!(server.rx.open(&mut record)?, b"hello");
//! # Ok::<(), mesh_noise::noise::NoiseError>(())
//! ```

use std::fmt;
use std::sync::Arc;

use rand_core::CryptoRng;
use snow::{Builder, HandshakeState};
use zeroize::{Zeroize, Zeroizing};

use super::NoiseError;
use super::resolver::{Resolver, StaticKey};
use crate::aead::{Aead, Order};
use crate::key::{MachinePrivate, MachinePublic};

/// Length of the client's message in bytes.
pub const INITIATION_LEN: usize = 101;
/// Length of the server's message in bytes.
pub const RESPONSE_LEN: usize = 51;
/// Bytes that sealing a record adds.
pub const TAG_LEN: usize = crate::aead::TAG_LEN;

const PATTERN: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
const INITIATION_TYPE: u8 = 1;
const RESPONSE_TYPE: u8 = 2;
const INITIATION_HEADER: usize = 5;
const RESPONSE_HEADER: usize = 3;

/// What both sides have when the handshake is done.
#[derive(Debug)]
pub struct Split {
    /// Seals what this side sends.
    pub tx: CipherKey,
    /// Opens what this side receives.
    pub rx: CipherKey,
    /// The channel binding: equal on both sides, different for every handshake.
    pub handshake_hash: [u8; 32],
}

/// The client's half: sends the initiation, waits for the response.
pub struct Initiator(HandshakeState);

impl Initiator {
    /// Starts a handshake with the server whose key is `control`; the array is to be sent first.
    ///
    /// `version` is the capability version that the client speaks. One ephemeral is drawn from `rng`.
    ///
    /// # Errors
    /// [`NoiseError::LowOrder`] if `control` is no proper key.
    pub fn start(
        version: u16,
        machine: &MachinePrivate,
        control: &MachinePublic,
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> Result<(Self, [u8; INITIATION_LEN]), NoiseError> {
        let (resolver, statik) = resolver(machine, rng);
        let mut state = initiator(builder(resolver, &prologue(version), statik.bytes()), control);
        let mut message = [0; INITIATION_LEN];
        message[..2].copy_from_slice(&version.to_be_bytes());
        message[2] = INITIATION_TYPE;
        message[3..INITIATION_HEADER].copy_from_slice(&[0, 96]);
        state.write_message(&[], &mut message[INITIATION_HEADER..]).map_err(|error| NoiseError::from_snow(&error))?;
        Ok((Self(state), message))
    }

    /// Takes the server's response.
    ///
    /// # Errors
    /// Whatever is wrong with `response`; the connection is then of no use.
    pub fn finish(mut self, response: &[u8]) -> Result<Split, NoiseError> {
        check_length("response", response, RESPONSE_LEN)?;
        if response[0] != RESPONSE_TYPE {
            return Err(NoiseError::Header { what: "response", field: "type" });
        }
        if response[1..RESPONSE_HEADER] != [0, 48] {
            return Err(NoiseError::Header { what: "response", field: "length" });
        }
        self.0.read_message(&response[RESPONSE_HEADER..], &mut []).map_err(|error| NoiseError::from_snow(&error))?;
        Ok(split(&mut self.0))
    }
}

impl fmt::Debug for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Initiator(…)")
    }
}

/// The server's half.
#[derive(Debug)]
pub enum Responder {}

/// A client whose initiation was accepted.
///
/// That it holds the machine key is proven only once the first record opens.
#[derive(Debug)]
pub struct Accepted {
    /// The protocol version that the client named.
    pub version: u16,
    /// The client's machine key.
    pub machine: MachinePublic,
    /// The record ciphers.
    pub split: Split,
}

impl Responder {
    /// Answers an initiation; the array is to be sent back.
    ///
    /// # Errors
    /// Whatever is wrong with `initiation`: also when it was made for another server key.
    pub fn accept(
        control: &MachinePrivate,
        initiation: &[u8],
        rng: &mut (impl CryptoRng + ?Sized),
    ) -> Result<(Accepted, [u8; RESPONSE_LEN]), NoiseError> {
        check_length("initiation", initiation, INITIATION_LEN)?;
        if initiation[2] != INITIATION_TYPE {
            return Err(NoiseError::Header { what: "initiation", field: "type" });
        }
        if initiation[3..INITIATION_HEADER] != [0, 96] {
            return Err(NoiseError::Header { what: "initiation", field: "length" });
        }
        let version = u16::from_be_bytes([initiation[0], initiation[1]]);
        let (resolver, statik) = resolver(control, rng);
        let mut state = responder(builder(resolver, &prologue(version), statik.bytes()));
        state.read_message(&initiation[INITIATION_HEADER..], &mut []).map_err(|error| NoiseError::from_snow(&error))?;
        let machine = remote_static(&state);

        let mut message = [0; RESPONSE_LEN];
        message[0] = RESPONSE_TYPE;
        message[1..RESPONSE_HEADER].copy_from_slice(&[0, 48]);
        state.write_message(&[], &mut message[RESPONSE_HEADER..]).map_err(|error| NoiseError::from_snow(&error))?;
        let accepted = Accepted { version, machine, split: split(&mut state) };
        Ok((accepted, message))
    }
}

/// One direction's record cipher: a key and the counter of its next nonce.
///
/// Records have to be opened in the order in which they were sealed, each once. After an error the connection is dead.
pub struct CipherKey {
    aead: Aead,
    counter: u64,
}

impl CipherKey {
    fn new(key: &[u8; 32]) -> Self {
        Self { aead: Aead::new(key), counter: 0 }
    }

    /// The number of records sealed or opened so far.
    #[must_use]
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// Appends the ciphertext of `plaintext` and its tag to `out`.
    ///
    /// # Errors
    /// [`NoiseError::Exhausted`] after 2^64 - 1 records.
    pub fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        let start = out.len();
        out.reserve(plaintext.len() + TAG_LEN);
        out.extend_from_slice(plaintext);
        match self.seal_in_place(&mut out[start..]) {
            Ok(tag) => {
                out.extend_from_slice(&tag);
                Ok(())
            }
            Err(error) => {
                out.truncate(start);
                Err(error)
            }
        }
    }

    /// Encrypts `text` where it stands and returns the tag that has to follow it.
    ///
    /// # Errors
    /// [`NoiseError::Exhausted`] after 2^64 - 1 records; `text` is then as it was.
    pub fn seal_in_place(&mut self, text: &mut [u8]) -> Result<[u8; TAG_LEN], NoiseError> {
        let next = self.counter.checked_add(1).ok_or(NoiseError::Exhausted)?;
        let tag = self.aead.seal(self.counter, Order::Big, &[], text);
        self.counter = next;
        Ok(tag)
    }

    /// Decrypts ciphertext ‖ tag where it stands and returns the plaintext.
    ///
    /// # Errors
    /// [`NoiseError::Authentication`] if it is not the record that comes next; [`NoiseError::Exhausted`] after
    /// 2^64 - 1 records.
    pub fn open<'a>(&mut self, sealed: &'a mut [u8]) -> Result<&'a mut [u8], NoiseError> {
        let next = self.counter.checked_add(1).ok_or(NoiseError::Exhausted)?;
        let plaintext =
            self.aead.open(self.counter, Order::Big, &[], sealed).map_err(|_| NoiseError::Authentication)?;
        self.counter = next;
        Ok(plaintext)
    }
}

impl fmt::Debug for CipherKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CipherKey").field("counter", &self.counter).finish_non_exhaustive()
    }
}

fn check_length(what: &'static str, message: &[u8], expected: usize) -> Result<(), NoiseError> {
    if message.len() == expected { Ok(()) } else { Err(NoiseError::Length { what, expected, got: message.len() }) }
}

fn prologue(version: u16) -> String {
    format!("Tailscale Control Protocol v{version}")
}

fn resolver(private: &MachinePrivate, rng: &mut (impl CryptoRng + ?Sized)) -> (Resolver, Arc<StaticKey>) {
    let statik = Arc::new(StaticKey::new(private.expose_secret()));
    let mut ephemeral = Zeroizing::new([0; 32]);
    rng.fill_bytes(&mut *ephemeral);
    (Resolver { statik: Arc::clone(&statik), ephemeral }, statik)
}

fn builder<'a>(resolver: Resolver, prologue: &'a str, private: &'a [u8; 32]) -> Builder<'a> {
    Builder::with_resolver(PATTERN.parse().expect("the pattern is a constant"), Box::new(resolver))
        .prologue(prologue.as_bytes())
        .and_then(|builder| builder.local_private_key(private))
        .expect("each setting is given once")
}

fn initiator(builder: Builder<'_>, control: &MachinePublic) -> HandshakeState {
    builder
        .remote_public_key(control.as_bytes())
        .and_then(Builder::build_initiator)
        .expect("the pattern has all it needs")
}

fn responder(builder: Builder<'_>) -> HandshakeState {
    builder.build_responder().expect("the pattern has all it needs")
}

fn remote_static(state: &HandshakeState) -> MachinePublic {
    let mut key = [0; 32];
    key.copy_from_slice(state.get_remote_static().expect("the first message carries the static key"));
    MachinePublic::from_bytes(key)
}

fn split(state: &mut HandshakeState) -> Split {
    let mut handshake_hash = [0; 32];
    handshake_hash.copy_from_slice(state.get_handshake_hash());
    let (mut up, mut down) = state.dangerously_get_raw_split();
    let (client, server) = (CipherKey::new(&up), CipherKey::new(&down));
    up.zeroize();
    down.zeroize();
    if state.is_initiator() {
        Split { tx: client, rx: server, handshake_hash }
    } else {
        Split { tx: server, rx: client, handshake_hash }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SeededRng;
    use rand_core::{Infallible, TryCryptoRng, TryRng};

    /// Answers every draw with the same recorded bytes.
    struct Recorded([u8; 32]);

    impl TryRng for Recorded {
        type Error = Infallible;
        fn try_next_u32(&mut self) -> Result<u32, Infallible> {
            unreachable!("handshakes draw bytes")
        }
        fn try_next_u64(&mut self) -> Result<u64, Infallible> {
            unreachable!("handshakes draw bytes")
        }
        fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
            out.copy_from_slice(&self.0);
            Ok(())
        }
    }

    impl TryCryptoRng for Recorded {}

    fn bytes<const N: usize>(text: &str) -> [u8; N] {
        let mut out = [0; N];
        hex::decode_to_slice(text, &mut out).unwrap();
        out
    }

    fn counting(start: u8) -> [u8; 32] {
        std::array::from_fn(|at| start + u8::try_from(at).unwrap())
    }

    fn sealed(key: &mut CipherKey, text: &[u8]) -> String {
        let mut out = Vec::new();
        key.seal(text, &mut out).unwrap();
        hex::encode(out)
    }

    #[test]
    fn known_answers_come_out_byte_for_byte() {
        let machine: MachinePrivate =
            "privkey:40ab1b58e9076c7a4d9d07291f5edf9d1aa017eb949624ba683317f48a640369".parse().unwrap();
        let control = MachinePrivate::from_bytes(counting(0));
        let (initiator, initiation) =
            Initiator::start(138, &machine, &control.public(), &mut Recorded(counting(0x20))).unwrap();
        assert_eq!(
            hex::encode(initiation),
            "008a010060358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd16625474503362482d3bf856c3cbdf18ce\
             234af219fe728243e9bd51d5b73d0f8f864f5ad7f2968148008bfbe377be8921052b7efe2b8ecc40f825fa034bb288f8f192"
        );
        let (accepted, response) = Responder::accept(&control, &initiation, &mut Recorded(counting(0x40))).unwrap();
        assert_eq!(
            hex::encode(response),
            "02003079a631eede1bf9c98f12032cdeadd0e7a079398fc786b88cc846ec89af85a51a8c9ea42197a72c2b6e7bf9805272bbda"
        );
        assert_eq!(accepted.machine, machine.public());
        let (mut client, mut server) = (initiator.finish(&response).unwrap(), accepted.split);
        assert_eq!(client.handshake_hash, server.handshake_hash);
        assert_eq!(client.handshake_hash, bytes("b53fb4e3836342ff009a8836cf95348f57bdbe83ef2e94e18e52aaca79d90d25"));
        assert_eq!(sealed(&mut client.tx, b"hello"), "0ef4b5e404a13949137f39f86830c4e9ffac1210a4");
        assert_eq!(sealed(&mut client.tx, b"hello"), "8a88dbf397354089495ecef196b9bd076e48d7e1c3");
        client.tx.counter = 256;
        assert_eq!(sealed(&mut client.tx, b"hello"), "8f7e88d8001e789919796fdbf55785f9c7719e5441");
        assert_eq!(sealed(&mut server.tx, b"world"), "3d25aaedba7a6c3b24b63ea6f4aa1826e10342884d");
        assert_eq!(sealed(&mut server.tx, b"world"), "9360d7af7865284d3919a66f2179be246bc710856c");
    }

    #[test]
    fn recorded_clients_are_answered_byte_for_byte() {
        for recording in [
            include_str!("../../tests/data/noise-go-1.90.9.json"),
            include_str!("../../tests/data/noise-rust-0.6.1.json"),
        ] {
            let recording: serde_json::Value = serde_json::from_str(recording).unwrap();
            let text = |name: &str| recording[name].as_str().unwrap().to_owned();
            let control = MachinePrivate::from_bytes(bytes(&text("control_static_private")));
            assert_eq!(hex::encode(control.public().as_bytes()), text("control_static_public"));
            let initiation: [u8; INITIATION_LEN] = bytes(&text("init_hex"));
            let mut rng = Recorded(bytes(&text("server_ephemeral_private")));
            let (accepted, response) = Responder::accept(&control, &initiation, &mut rng).unwrap();
            assert_eq!(Some(u64::from(accepted.version)), recording["protocol_version"].as_u64());
            assert_eq!(hex::encode(accepted.machine.as_bytes()), text("machine_public"));
            assert_eq!(hex::encode(response), text("response_hex"));
            let mut split = accepted.split;
            assert_eq!(hex::encode(split.handshake_hash), text("handshake_hash"));
            let records = recording["records"].as_array().unwrap();
            assert!(records.len() > 4);
            for record in records {
                let frame = hex::decode(record["frame_hex"].as_str().unwrap()).unwrap();
                let plaintext = hex::decode(record["plaintext_hex"].as_str().unwrap()).unwrap();
                let mut body = frame[3..].to_vec();
                if record["dir"] == "c2s" {
                    assert_eq!(record["n"].as_u64(), Some(split.rx.counter()));
                    assert_eq!(split.rx.open(&mut body).unwrap(), plaintext);
                } else {
                    assert_eq!(sealed(&mut split.tx, &plaintext), hex::encode(body));
                }
            }
        }
    }

    #[test]
    fn low_order_points_are_refused_on_both_sides() {
        let mut rng = SeededRng::from_seed([3; 32]);
        let (machine, control) = (MachinePrivate::generate(&mut rng), MachinePrivate::generate(&mut rng));
        for point in [[0; 32], counting_one(), order_eight()] {
            let start = Initiator::start(130, &machine, &MachinePublic::from_bytes(point), &mut rng);
            assert_eq!(start.err(), Some(NoiseError::LowOrder));
            let (initiator, mut initiation) = Initiator::start(130, &machine, &control.public(), &mut rng).unwrap();
            let (_, mut response) = Responder::accept(&control, &initiation, &mut rng).unwrap();
            initiation[INITIATION_HEADER..][..32].copy_from_slice(&point);
            assert_eq!(Responder::accept(&control, &initiation, &mut rng).err(), Some(NoiseError::LowOrder));
            response[RESPONSE_HEADER..][..32].copy_from_slice(&point);
            assert_eq!(initiator.finish(&response).err(), Some(NoiseError::LowOrder));
        }
    }

    fn counting_one() -> [u8; 32] {
        std::array::from_fn(|at| u8::from(at == 0))
    }

    fn order_eight() -> [u8; 32] {
        bytes("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
    }

    #[test]
    fn another_server_key_and_changed_bytes_are_refused() {
        let mut rng = SeededRng::from_seed([4; 32]);
        let (machine, control, other) = (
            MachinePrivate::generate(&mut rng),
            MachinePrivate::generate(&mut rng),
            MachinePrivate::generate(&mut rng),
        );
        let (initiator, initiation) = Initiator::start(130, &machine, &control.public(), &mut rng).unwrap();
        assert_eq!(Responder::accept(&other, &initiation, &mut rng).err(), Some(NoiseError::Authentication));
        let mut newer = initiation;
        newer[1] += 1;
        assert_eq!(
            Responder::accept(&control, &newer, &mut rng).err(),
            Some(NoiseError::Authentication),
            "the version is part of the prologue"
        );
        assert!(matches!(
            Responder::accept(&control, &initiation[..100], &mut rng),
            Err(NoiseError::Length { expected: 101, got: 100, .. })
        ));
        let (_, mut response) = Responder::accept(&control, &initiation, &mut rng).unwrap();
        response[50] ^= 1;
        assert_eq!(initiator.finish(&response).err(), Some(NoiseError::Authentication));
    }

    #[test]
    fn the_last_counter_is_never_used() {
        let mut key = CipherKey::new(&[9; 32]);
        key.counter = u64::MAX;
        let mut out = vec![1];
        assert_eq!(key.seal(b"x", &mut out), Err(NoiseError::Exhausted));
        assert_eq!(out, [1]);
        assert_eq!(key.open(&mut [0; 40]).err(), Some(NoiseError::Exhausted));
    }
}
