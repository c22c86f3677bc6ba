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
    paired: bool,
    counters: Counters,
}

/// An answer to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The response.
    pub datagram: Vec<u8>,
    /// Whether it is to leave from the other port of the pair.
    pub from_other_port: bool,
}

impl Responder {
    /// A responder for `audience`.
    #[must_use]
    pub fn new(audience: Audience) -> Self {
        Self { audience, paired: false, counters: Counters::default() }
    }

    /// The same responder with a second port, from which it answers those who ask for it: that shows a client whether
    /// its NAT filters by port (RFC 5780 §4.4).
    #[must_use]
    pub const fn paired(mut self) -> Self {
        self.paired = true;
        self
    }

    /// The answer to send back to `source`.
    ///
    /// # Errors
    /// Says why there is none. The caller stays silent then.
    pub fn handle_datagram(&mut self, source: SocketAddr, datagram: &[u8]) -> Result<Answer, StunError> {
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

    fn answer(&self, source: SocketAddr, datagram: &[u8]) -> Result<Answer, StunError> {
        let request = Request::decode(datagram)?;
        match self.audience {
            Audience::Members if !request.member => Err(StunError::Stranger),
            Audience::Members | Audience::Anyone => Ok(Answer {
                datagram: response(request.tx, source),
                from_other_port: self.paired && request.from_other_port,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::{Response, TransactionId, request, request_from_other_port};
    use super::*;

    #[test]
    fn members_learn_their_address() {
        let mut responder = Responder::default();
        let tx = TransactionId([3; 12]);
        let mapped = "203.0.113.5:1234".parse().unwrap();
        let answer = responder.handle_datagram(mapped, &request(tx)).unwrap().datagram;
        assert_eq!(Response::decode(&answer), Ok(Response { tx, mapped }));
        assert!(answer.len() < request(tx).len(), "an answer must not amplify");
    }

    #[test]
    fn an_answer_leaves_from_the_other_port_only_where_there_is_one_and_it_was_asked_for() {
        let source = "203.0.113.5:1234".parse().unwrap();
        let (plain, wish) = (request(TransactionId([3; 12])), request_from_other_port(TransactionId([3; 12])));
        let elsewhere = |responder: Responder, datagram: &[u8]| {
            let mut responder = responder;
            responder.handle_datagram(source, datagram).unwrap().from_other_port
        };
        assert!(!elsewhere(Responder::default(), &wish));
        assert!(!elsewhere(Responder::default().paired(), &plain));
        assert!(elsewhere(Responder::default().paired(), &wish));
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
