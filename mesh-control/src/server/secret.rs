//! Secrets that people carry: auth keys and approval codes. Only their SHA-256 is ever stored.
//!
//! | secret | text | random bits |
//! |---|---|---|
//! | auth key | `mesh-auth-<number>-<32 characters>` | 160 |
//! | approval code | `XXXX-XXXX-XXXX`, the first group names the code | 20 + 40 |
//! | login id | 16 characters, in the URL | 80 |
//!
//! Characters are RFC 4648 §6 base32, which has no `0`, `1` or `8` to misread.

use std::fmt;

use rand_core::CryptoRng;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::record::{AuthKeyId, CodeId, LoginId};

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const AUTH_KEY_PREFIX: &str = "mesh-auth-";

/// SHA-256 of a secret. Compared in constant time.
#[derive(Clone, Copy)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// Hashes a secret.
    #[must_use]
    pub fn of(secret: &str) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, secret.as_bytes());
        let mut hash = [0; 32];
        hash.copy_from_slice(digest.as_ref());
        Self(hash)
    }
}

impl PartialEq for SecretHash {
    fn eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for SecretHash {}

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

impl Serialize for SecretHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.0))
    }
}

impl<'de> Deserialize<'de> for SecretHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut hash = [0; 32];
        hex::decode_to_slice(text, &mut hash).map_err(serde::de::Error::custom)?;
        Ok(Self(hash))
    }
}

/// Draws `count` characters.
fn draw(rng: &mut (impl CryptoRng + ?Sized), count: usize) -> String {
    let mut bytes = vec![0; count];
    rng.fill_bytes(&mut bytes);
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte & 31)])).collect()
}

/// Makes an auth key's text and what to store of it.
pub fn new_auth_key(rng: &mut (impl CryptoRng + ?Sized), id: AuthKeyId) -> (String, SecretHash) {
    let secret = draw(rng, 32);
    (format!("{AUTH_KEY_PREFIX}{id}-{secret}"), SecretHash::of(&secret))
}

/// Reads an auth key's number and the hash of its secret. `None` if the text cannot be one of ours.
#[must_use]
pub fn parse_auth_key(text: &str) -> Option<(AuthKeyId, SecretHash)> {
    let (id, secret) = text.trim().strip_prefix(AUTH_KEY_PREFIX)?.split_once('-')?;
    Some((AuthKeyId(id.parse().ok()?), SecretHash::of(secret)))
}

/// Makes an approval code's text, its id and what to store of it.
pub fn new_code(rng: &mut (impl CryptoRng + ?Sized)) -> (String, CodeId, SecretHash) {
    let (id, secret) = (draw(rng, 4), draw(rng, 8));
    let text = format!("{id}-{}-{}", &secret[..4], &secret[4..]).to_ascii_uppercase();
    (text, CodeId(id), SecretHash::of(&secret))
}

/// Reads an approval code as typed: case, spaces and dashes do not matter. `None` if it cannot be one.
#[must_use]
pub fn parse_code(text: &str) -> Option<(CodeId, SecretHash)> {
    if text.len() > 64 {
        return None;
    }
    let plain: String = text.chars().filter(|c| c.is_ascii_alphanumeric()).map(|c| c.to_ascii_lowercase()).collect();
    (plain.len() == 12).then(|| (CodeId(plain[..4].to_owned()), SecretHash::of(&plain[4..])))
}

/// Draws a login id.
pub fn new_login_id(rng: &mut (impl CryptoRng + ?Sized)) -> LoginId {
    LoginId(draw(rng, 16))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn an_auth_key_is_recognised_by_its_hash_alone() {
        let (text, hash) = new_auth_key(&mut StdRng::seed_from_u64(1), AuthKeyId(7));
        assert!(text.starts_with("mesh-auth-7-") && text.len() == 44, "{text}");
        assert_eq!(parse_auth_key(&format!(" {text}\n")), Some((AuthKeyId(7), hash)));
        assert_ne!(parse_auth_key(&format!("{text}a")), Some((AuthKeyId(7), hash)));
        assert_eq!(parse_auth_key("tskey-auth-test"), None);
        assert_eq!(parse_auth_key("mesh-auth--"), None);
    }

    #[test]
    fn a_code_is_read_as_people_type_it() {
        let (text, id, hash) = new_code(&mut StdRng::seed_from_u64(2));
        assert_eq!(parse_code(&text), Some((id.clone(), hash)));
        assert_eq!(parse_code(&text.to_ascii_lowercase().replace('-', " ")), Some((id, hash)));
        assert_eq!(parse_code("AAAA"), None);
        assert_eq!(parse_code(&"A".repeat(100)), None);
    }

    #[test]
    fn hashes_round_trip_and_do_not_print() {
        let hash = SecretHash::of("abc");
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(json, "\"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\"");
        assert_eq!(serde_json::from_str::<SecretHash>(&json).unwrap(), hash);
        assert_eq!(format!("{hash:?}"), "SecretHash(…)");
    }
}
