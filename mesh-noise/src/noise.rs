//! The Noise handshakes: [`ik`] towards the control server, and the one inside [`wireguard`](crate::wireguard).
//!
//! The [Noise framework](https://noiseprotocol.org/noise.html) (revision 34) is run by `snow`; curve, cipher and
//! randomness come from a resolver of our own. It computes on aws-lc, refuses low-order points (Noise leaves that
//! to the application), wipes its keys, and hands out exactly one ephemeral, drawn beforehand from the caller's
//! generator, so that a run can be repeated byte for byte.

pub mod ik;
pub(crate) mod ikpsk2;
pub(crate) mod resolver;

/// Why a handshake or a record was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoiseError {
    /// A message has the wrong length or type.
    #[error("malformed {what}: expected {expected} bytes, got {got}")]
    Length {
        /// Which message.
        what: &'static str,
        /// How long it has to be.
        expected: usize,
        /// How long it was.
        got: usize,
    },
    /// A message header holds a byte or a length that does not belong there.
    #[error("malformed {what}: wrong {field} in the header")]
    Header {
        /// Which message.
        what: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// The other side does not hold the key that it should, or the bytes changed on the way.
    #[error("authentication failed: the other side holds another key, or the message was changed")]
    Authentication,
    /// A public key with which every agreement gives the same result.
    #[error("a public key is a low-order point")]
    LowOrder,
    /// Every nonce of this key has been used.
    #[error("the cipher key is exhausted")]
    Exhausted,
}

impl NoiseError {
    /// What `snow` reports while it reads or writes a message that has the right length.
    pub(crate) fn from_snow(error: &snow::Error) -> Self {
        if matches!(error, snow::Error::Dh) { Self::LowOrder } else { Self::Authentication }
    }
}
