//! Asks one server for our address, until it answers or patience ends (RFC 8489 §6.2.1).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand_core::CryptoRng;

use super::message::{Response, StunError, TransactionId, request};

/// Wait before the first repetition; it doubles each time. Shorter than the RFC's, since the answer gates a start.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Requests in all. The last one is given as long as all the others together.
const TRIES: u32 = 4;

/// How the question ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The server sees us at this address.
    Mapped {
        /// Our reflexive address.
        address: SocketAddr,
        /// Time from the latest request to its response.
        latency: Duration,
    },
    /// No answer within 3 s.
    TimedOut,
}

/// A question to one server. Every request repeats the same transaction.
#[derive(Debug)]
pub struct Binding {
    server: SocketAddr,
    tx: TransactionId,
    sent: Instant,
    tries: u32,
    deadline: Option<Instant>,
    outgoing: bool,
    events: VecDeque<Event>,
}

impl Binding {
    /// Starts asking `server`; the first request is ready to transmit.
    pub fn new(now: Instant, server: SocketAddr, rng: &mut (impl CryptoRng + ?Sized)) -> Self {
        Self {
            server,
            tx: TransactionId::generate(rng),
            sent: now,
            tries: 1,
            deadline: Some(now + FIRST_WAIT),
            outgoing: true,
            events: VecDeque::new(),
        }
    }

    /// Takes a datagram that arrived at `now`.
    ///
    /// # Errors
    /// Says why it is not the awaited response; nothing has changed then.
    pub fn handle_datagram(&mut self, now: Instant, datagram: &[u8]) -> Result<(), StunError> {
        let response = Response::decode(datagram)?;
        if response.tx != self.tx || self.deadline.is_none() {
            return Err(StunError::UnknownTransaction);
        }
        self.deadline = None;
        self.outgoing = false;
        self.events
            .push_back(Event::Mapped { address: response.mapped, latency: now.saturating_duration_since(self.sent) });
        Ok(())
    }

    /// Asks again, or gives up, if that is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        if self.tries == TRIES {
            self.deadline = None;
            self.events.push_back(Event::TimedOut);
            return;
        }
        self.deadline = Some(now + FIRST_WAIT * 2u32.pow(self.tries));
        self.tries += 1;
        self.sent = now;
        self.outgoing = true;
    }

    /// The request to send now, and where to.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        std::mem::take(&mut self.outgoing).then(|| (self.server, request(self.tx)))
    }

    /// How it ended, once.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Self::handle_timeout`]; `None` once it is over.
    #[must_use]
    pub const fn poll_timeout(&self) -> Option<Instant> {
        self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::{Request, response};
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn start() -> (Instant, Binding) {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        (now, Binding::new(now, "192.0.2.1:3478".parse().unwrap(), &mut StdRng::seed_from_u64(1)))
    }

    #[test]
    fn a_lost_request_is_repeated_and_its_answer_taken() {
        let (now, mut binding) = start();
        let (server, first) = binding.poll_transmit().unwrap();
        assert_eq!(binding.poll_transmit(), None);
        let later = binding.poll_timeout().unwrap();
        binding.handle_timeout(later);
        assert_eq!(binding.poll_transmit(), Some((server, first.clone())));

        let mapped = "203.0.113.5:1234".parse().unwrap();
        let answer = response(Request::decode(&first).unwrap().tx, mapped);
        let latency = Duration::from_millis(30);
        binding.handle_datagram(later + latency, &answer).unwrap();
        assert_eq!(binding.poll_event(), Some(Event::Mapped { address: mapped, latency }));
        assert_eq!(binding.poll_timeout(), None);
        assert_eq!(binding.handle_datagram(now, &answer), Err(StunError::UnknownTransaction));
    }

    #[test]
    fn silence_ends_after_three_seconds() {
        let (now, mut binding) = start();
        let mut last = now;
        while let Some(deadline) = binding.poll_timeout() {
            last = deadline;
            binding.handle_timeout(deadline);
        }
        assert_eq!(binding.poll_event(), Some(Event::TimedOut));
        assert_eq!(last - now, Duration::from_secs(3));
    }
}
