//! Pings in flight, what their answers say about a path's round trip, and how many may be sent.

use std::collections::VecDeque;
use std::mem::discriminant;
use std::time::{Duration, Instant};

use super::Path;
use crate::agent::PingId;
use crate::disco::message::TxId;

/// What a ping is for, besides proving an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Nothing.
    Proof,
    /// A user's ping.
    User(PingId),
    /// Whether a datagram of so many bytes passes.
    Length(usize),
    /// It went to an address that may be the peer's and may be anybody's.
    Guess,
}

/// A ping that waits for its pong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probe {
    pub(crate) tx: TxId,
    pub(crate) path: Path,
    pub(crate) sent: Instant,
    pub(crate) purpose: Purpose,
}

/// The pings to one peer that wait for their pongs, in the order in which they left. All may take equally long, so the
/// first is the first to be given up. Mostly there is one, and a hundred now and then.
#[derive(Debug, Default)]
pub(crate) struct Flight(VecDeque<Probe>);

impl Flight {
    pub(crate) fn push(&mut self, probe: Probe) {
        self.0.push_back(probe);
    }

    /// Takes the ping that a pong answers which has come by `path`. The address is not compared: a pong may come from
    /// another one than was pinged. The kind of path is, since a pong through a relay proves nothing about UDP.
    pub(crate) fn answered(&mut self, tx: &TxId, path: &Path) -> Option<Probe> {
        let answers = |probe: &Probe| probe.tx == *tx && discriminant(&probe.path) == discriminant(path);
        let probe = self.0.remove(self.0.iter().rposition(answers)?);
        self.shrink();
        probe
    }

    /// Gives up what left at `latest` or before.
    pub(crate) fn give_up(&mut self, latest: Instant) {
        while self.0.front().is_some_and(|probe| probe.sent <= latest) {
            self.0.pop_front();
        }
        self.shrink();
    }

    /// Gives up what `keep` does not want.
    pub(crate) fn retain(&mut self, keep: impl FnMut(&Probe) -> bool) {
        self.0.retain(keep);
        self.shrink();
    }

    /// When the oldest left.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.0.front().map(|probe| probe.sent)
    }

    // A search leaves room for many, and a heartbeat needs it for one.
    fn shrink(&mut self) {
        if self.0.is_empty() && self.0.capacity() > 1 {
            self.0.shrink_to(1);
        }
    }
}

/// Smoothed round trip and its variation (RFC 6298 §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoundTrip {
    smoothed: Duration,
    variation: Duration,
}

impl RoundTrip {
    pub(crate) fn first(sample: Duration) -> Self {
        Self { smoothed: sample, variation: sample / 2 }
    }

    pub(crate) fn update(&mut self, sample: Duration) {
        let off = self.smoothed.abs_diff(sample);
        self.variation = (self.variation * 3 + off) / 4;
        self.smoothed = (self.smoothed * 7 + sample) / 8;
    }

    pub(crate) const fn smoothed(&self) -> Duration {
        self.smoothed
    }

    /// After this long, an answer is not coming any more.
    pub(crate) fn patience(&self) -> Duration {
        self.smoothed + self.variation * 4
    }
}

/// How much a [`Budget`] allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// At once.
    burst: u32,
    /// Until one more is allowed.
    refill: Duration,
}

impl Rate {
    /// Pings towards one peer, heartbeats and user pings not counted: every candidate once, and some.
    const PEER: Self = Self { burst: 128, refill: Duration::from_millis(40) };
    /// Searches for peers of one node.
    pub(crate) const SEARCHES: Self = Self { burst: 64, refill: Duration::from_millis(2) };
}

/// A token bucket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    tokens: u32,
    refilled: Instant,
}

impl Budget {
    /// For pings towards one peer.
    pub(crate) const fn full(now: Instant) -> Self {
        Self::full_of(now, Rate::PEER)
    }

    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.take_of(now, Rate::PEER)
    }

    /// For whatever `rate` is for, as in each [`Self::take_of`] that follows.
    pub(crate) const fn full_of(now: Instant, rate: Rate) -> Self {
        Self { tokens: rate.burst, refilled: now }
    }

    pub(crate) fn take_of(&mut self, now: Instant, rate: Rate) -> bool {
        let gained = now.saturating_duration_since(self.refilled).as_millis() / rate.refill.as_millis();
        let room = rate.burst - self.tokens;
        match u32::try_from(gained) {
            Ok(gained) if gained < room => {
                self.tokens += gained;
                self.refilled += rate.refill * gained;
            }
            Ok(_) | Err(_) => *self = Self::full_of(now, rate),
        }
        let taken = self.tokens > 0;
        self.tokens -= u32::from(taken);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::SocketId;
    use mesh_derp::map::RegionId;

    #[test]
    fn one_lucky_sample_moves_the_round_trip_by_an_eighth() {
        let mut round_trip = RoundTrip::first(Duration::from_millis(80));
        round_trip.update(Duration::from_millis(8));
        assert_eq!(round_trip.smoothed(), Duration::from_millis(71));
        assert!(round_trip.patience() > Duration::from_millis(200));
    }

    #[test]
    fn a_pong_answers_one_ping_by_the_same_kind_of_path_before_it_is_given_up() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let direct = Path::Direct { socket: SocketId(0), remote: ([192, 0, 2, 1], 1).into() };
        let elsewhere = Path::Direct { socket: SocketId(0), remote: ([192, 0, 2, 2], 1).into() };
        let relay = Path::Relay { region: RegionId::new(1).unwrap() };
        let mut flight = Flight::default();
        for second in 0..4 {
            let (tx, sent) = (TxId([second; 12]), now + Duration::from_secs(second.into()));
            flight.push(Probe { tx, path: direct, sent, purpose: Purpose::Proof });
        }
        assert!(flight.answered(&TxId([1; 12]), &relay).is_none());
        assert!(flight.answered(&TxId([1; 12]), &elsewhere).is_some_and(|probe| probe.path == direct));
        assert!(flight.answered(&TxId([1; 12]), &direct).is_none());
        flight.give_up(now + Duration::from_secs(2));
        assert_eq!(flight.oldest(), Some(now + Duration::from_secs(3)));
        flight.retain(|_| false);
        assert_eq!((flight.oldest(), flight.0.capacity()), (None, 1));
    }

    #[test]
    fn a_spent_budget_comes_back_at_25_a_second() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut budget = Budget::full(now);
        assert_eq!((0..1000).filter(|_| budget.take(now)).count(), 128);
        let later = now + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| budget.take(later)).count(), 25);
        let much_later = now + Duration::from_secs(1000);
        assert_eq!((0..1000).filter(|_| budget.take(much_later)).count(), 128);
    }
}
