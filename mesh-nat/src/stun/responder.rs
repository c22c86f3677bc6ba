//! Answers binding requests. Keeps nothing about who asked.

use std::net::SocketAddr;

use super::message::{Request, StunError, response};

/// Whom a [`Responder`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Audience {
    /// Requests with SOFTWARE "tailnode" and a right fingerprint, as deployed relays do. The default: scanners that
    /// look for open STUN servers hear nothing.
    #[default]
    Members,
    /// Every well-formed request.
    Anyone,
}

/// How many requests were answered and refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Requests answered.
    pub answered: u64,
    /// Datagrams refused, for whatever reason.
    pub rejected: u64,
}

/// Answers binding requests with the address that they came from.
#[derive(Debug, Default)]
pub struct Responder {
    audience: Audience,
    counters: Counters,
}

impl Responder {
    /// A responder for `audience`.
    #[must_use]
    pub fn new(audience: Audience) -> Self {
        Self { audience, counters: Counters::default() }
    }

    /// The response to send back to `source`.
    ///
    /// # Errors
    /// Says why there is none. The caller stays silent then.
    pub fn handle_datagram(&mut self, source: SocketAddr, datagram: &[u8]) -> Result<Vec<u8>, StunError> {
        let answer = self.answer(source, datagram);
        match &answer {
            Ok(_) => self.counters.answered += 1,
            Err(_) => self.counters.rejected += 1,
        }
        answer
    }

    /// What happened so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    fn answer(&self, source: SocketAddr, datagram: &[u8]) -> Result<Vec<u8>, StunError> {
        let request = Request::decode(datagram)?;
        match self.audience {
            Audience::Members if !request.member => Err(StunError::Stranger),
            Audience::Members | Audience::Anyone => Ok(response(request.tx, source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::{Response, TransactionId, request};
    use super::*;

    #[test]
    fn members_learn_their_address() {
        let mut responder = Responder::default();
        let tx = TransactionId([3; 12]);
        let mapped = "203.0.113.5:1234".parse().unwrap();
        let answer = responder.handle_datagram(mapped, &request(tx)).unwrap();
        assert_eq!(Response::decode(&answer), Ok(Response { tx, mapped }));
        assert!(answer.len() < request(tx).len(), "an answer must not amplify");
    }

    #[test]
    fn strangers_are_answered_only_on_request() {
        let source = "203.0.113.5:1234".parse().unwrap();
        let bare = [&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &[3; 12]].concat();
        let mut closed = Responder::default();
        assert_eq!(closed.handle_datagram(source, &bare), Err(StunError::Stranger));
        assert_eq!(closed.counters(), Counters { answered: 0, rejected: 1 });
        assert!(Responder::new(Audience::Anyone).handle_datagram(source, &bare).is_ok());
    }
}
