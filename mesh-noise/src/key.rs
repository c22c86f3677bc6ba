//! Keys: one type per role, so that a machine key can never be used where a node key belongs.
//!
//! All are Curve25519 keys of 32 bytes. The text form is a prefix that names the role followed by 64 lower-case
//! hexadecimal digits (`nodekey:…`); parsers also take upper-case digits. The all-zero public key means "absent".
//! Private halves are wiped when dropped and never printed; their text form (`privkey:…`) has to be asked for.
//!
//! | role | public text | who holds the private half |
//! |---|---|---|
//! | node | `nodekey:` | a node; its WireGuard identity and its name at relays; rotates |
//! | machine | `mkey:` | a device; its Noise identity towards the control server; permanent |
//! | disco | `discokey:` | a running node; seals path probes; new at every start |
//! | challenge | `chalpub:` | the control server, one per connection |
//! | relay | none, bare digits | a DERP relay |
//!
//! [`SharedBox`] is the NaCl `crypto_box` (X25519, XSalsa20-Poly1305) between two keys, computed once per pair.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crypto_box::SalsaBox;
use crypto_box::aead::AeadInPlace;
use rand_core::CryptoRng;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Length of every key in bytes.
pub const KEY_LEN: usize = 32;

/// Why a text is not a key. Never contains the text itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The prefix that names the role is missing or another role's.
    #[error("expected a key that begins with \"{expected}\"")]
    Prefix {
        /// The prefix that belongs there.
        expected: &'static str,
    },
    /// What follows the prefix is not 64 hexadecimal digits.
    #[error("expected 64 hexadecimal digits after \"{prefix}\"")]
    Digits {
        /// The prefix that was read.
        prefix: &'static str,
    },
}

fn parse(text: &str, prefix: &'static str) -> Result<[u8; KEY_LEN], KeyError> {
    let digits = text.strip_prefix(prefix).ok_or(KeyError::Prefix { expected: prefix })?;
    let mut bytes = [0; KEY_LEN];
    hex::decode_to_slice(digits, &mut bytes).map_err(|_| KeyError::Digits { prefix })?;
    Ok(bytes)
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// The all-zero key, which means "absent".
            pub const ZERO: Self = Self([0; KEY_LEN]);
            /// The text before the digits.
            pub const PREFIX: &'static str = $prefix;

            /// Takes the 32 raw bytes as they stand on the wire.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(bytes)
            }

            /// The 32 raw bytes as they stand on the wire.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// Whether this is the all-zero key.
            #[must_use]
            pub fn is_zero(&self) -> bool {
                self.0 == [0; KEY_LEN]
            }

            /// The first 8 hexadecimal digits, for people and logs.
            #[must_use]
            pub fn short(&self) -> String {
                hex::encode(&self.0[..4])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}{}", $prefix, hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                parse(text, $prefix).map(Self)
            }
        }

        #[cfg(feature = "serde")]
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        #[cfg(feature = "serde")]
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! private_key {
    ($(#[$doc:meta])* $name:ident, $public:ident) => {
        $(#[$doc])*
        #[derive(Clone, Zeroize, ZeroizeOnDrop)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// Draws a new key, clamped as RFC 7748 §5 has it.
            pub fn generate(rng: &mut (impl CryptoRng + ?Sized)) -> Self {
                let mut bytes = [0; KEY_LEN];
                rng.fill_bytes(&mut bytes);
                bytes[0] &= 248;
                bytes[31] = (bytes[31] & 127) | 64;
                Self(bytes)
            }

            /// Takes 32 raw bytes, as they stand.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(bytes)
            }

            /// The secret itself. Whoever calls this answers for where it goes.
            #[must_use]
            pub const fn expose_secret(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// The secret as `privkey:` and 64 digits, for a key file.
            #[must_use]
            pub fn to_secret_text(&self) -> Zeroizing<String> {
                Zeroizing::new(format!("privkey:{}", hex::encode(self.0)))
            }

            /// The public half. Costs one scalar multiplication.
            #[must_use]
            pub fn public(&self) -> $public {
                $public(*self.secret().public_key().as_bytes())
            }

            fn secret(&self) -> crypto_box::SecretKey {
                crypto_box::SecretKey::from_bytes(self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(…)"))
            }
        }

        impl FromStr for $name {
            type Err = KeyError;

            fn from_str(text: &str) -> Result<Self, KeyError> {
                parse(text, "privkey:").map(Self)
            }
        }
    };
}

public_key!(
    /// A node's public key: its WireGuard identity and its address at relays.
    NodePublic,
    "nodekey:"
);
public_key!(
    /// A machine's public key: its Noise identity towards control, and control's own.
    MachinePublic,
    "mkey:"
);
public_key!(
    /// The key that a node's path probes are sealed with.
    DiscoPublic,
    "discokey:"
);
public_key!(
    /// The control server's per-connection challenge.
    ChallengePublic,
    "chalpub:"
);
public_key!(
    /// A DERP relay's public key. Its text form has no prefix.
    RelayPublic,
    ""
);
private_key!(
    /// A node's private key. Rotates when its owner signs in again.
    NodePrivate,
    NodePublic
);
private_key!(
    /// A machine's private key; also the control server's. Stays for the life of an installation.
    MachinePrivate,
    MachinePublic
);
private_key!(
    /// A disco private key. Never stored: a new one at every start.
    DiscoPrivate,
    DiscoPublic
);
private_key!(
    /// A DERP relay's private key.
    RelayPrivate,
    RelayPublic
);

impl NodePrivate {
    /// The box between this node and a relay (DERP ClientInfo and ServerInfo).
    #[must_use]
    pub fn box_with_relay(&self, relay: &RelayPublic) -> SharedBox {
        SharedBox::between(&self.secret(), relay.as_bytes())
    }
}

impl RelayPrivate {
    /// The box between this relay and a node.
    #[must_use]
    pub fn box_with_node(&self, node: &NodePublic) -> SharedBox {
        SharedBox::between(&self.secret(), node.as_bytes())
    }
}

impl DiscoPrivate {
    /// The box between two nodes' disco keys; both sides compute the same one.
    #[must_use]
    pub fn box_with(&self, peer: &DiscoPublic) -> SharedBox {
        SharedBox::between(&self.secret(), peer.as_bytes())
    }
}

/// A WireGuard preshared key, mixed into the handshake (whitepaper §5.2). All zero means none.
#[derive(Clone, Zeroize, ZeroizeOnDrop, Default)]
pub struct PresharedKey([u8; KEY_LEN]);

impl PresharedKey {
    /// Takes the 32 raw bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// The secret itself. Whoever calls this answers for where it goes.
    #[must_use]
    pub const fn expose_secret(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(…)")
    }
}

/// Length of a box's nonce in bytes.
pub const NONCE_LEN: usize = 24;
/// Bytes that [`SharedBox::seal`] adds: nonce and tag.
pub const BOX_OVERHEAD: usize = NONCE_LEN + 16;

/// A NaCl `crypto_box` between two keys: X25519, HSalsa20, XSalsa20-Poly1305.
///
/// The sealed form is nonce (24 bytes) ‖ tag (16) ‖ ciphertext. Clones share the computed key.
#[derive(Clone)]
pub struct SharedBox(Arc<SalsaBox>);

impl SharedBox {
    fn between(secret: &crypto_box::SecretKey, public: &[u8; KEY_LEN]) -> Self {
        Self(Arc::new(SalsaBox::new(&crypto_box::PublicKey::from_bytes(*public), secret)))
    }

    /// Appends nonce, tag and ciphertext of `plaintext` to `out`. The nonce is drawn from `rng`.
    ///
    /// # Panics
    /// If `plaintext` is longer than the cipher can take, 256 GiB.
    pub fn seal(&self, rng: &mut (impl CryptoRng + ?Sized), plaintext: &[u8], out: &mut Vec<u8>) {
        let mut nonce = [0; NONCE_LEN];
        rng.fill_bytes(&mut nonce);
        let start = out.len();
        out.reserve(BOX_OVERHEAD + plaintext.len());
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&[0; 16]);
        out.extend_from_slice(plaintext);
        let body = &mut out[start + BOX_OVERHEAD..];
        let tag = self
            .0
            .encrypt_in_place_detached(&nonce.into(), b"", body)
            .expect("a message in memory is shorter than 256 GiB");
        out[start + NONCE_LEN..start + BOX_OVERHEAD].copy_from_slice(&tag);
    }

    /// Opens nonce ‖ tag ‖ ciphertext. `None` if it is too short or was not sealed by the other side.
    #[must_use]
    pub fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let (tag, body) = rest.split_first_chunk::<16>()?;
        let mut plaintext = body.to_vec();
        self.0.decrypt_in_place_detached(&(*nonce).into(), b"", &mut plaintext, &(*tag).into()).ok()?;
        Some(plaintext)
    }
}

impl fmt::Debug for SharedBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedBox(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn text_forms_round_trip_and_keep_roles_apart() {
        let private = NodePrivate::generate(&mut StdRng::seed_from_u64(1));
        let text = private.public().to_string();
        assert_eq!(text.parse::<NodePublic>(), Ok(private.public()));
        assert_eq!(text.parse::<DiscoPublic>(), Err(KeyError::Prefix { expected: "discokey:" }));
        assert_eq!("nodekey:12".parse::<NodePublic>(), Err(KeyError::Digits { prefix: "nodekey:" }));
        let again: NodePrivate = private.to_secret_text().parse().unwrap();
        assert_eq!(again.public(), private.public());
    }

    #[test]
    fn private_keys_do_not_print() {
        let private = MachinePrivate::generate(&mut StdRng::seed_from_u64(2));
        let shown = format!("{private:?}");
        assert!(!shown.contains(&hex::encode(&private.expose_secret()[..4])), "{shown}");
    }

    #[test]
    fn a_box_opens_for_the_other_side_only() {
        let mut rng = StdRng::seed_from_u64(3);
        let (a, b, c) =
            (DiscoPrivate::generate(&mut rng), DiscoPrivate::generate(&mut rng), DiscoPrivate::generate(&mut rng));
        let mut sealed = Vec::new();
        a.box_with(&b.public()).seal(&mut rng, b"ping", &mut sealed);
        assert_eq!(b.box_with(&a.public()).open(&sealed).as_deref(), Some(&b"ping"[..]));
        assert_eq!(c.box_with(&a.public()).open(&sealed), None);
        sealed[30] ^= 1;
        assert_eq!(b.box_with(&a.public()).open(&sealed), None);
        assert_eq!(b.box_with(&a.public()).open(&sealed[..20]), None);
    }
}
