//! When to ask for a certificate, and by which challenge.

use std::time::{Duration, SystemTime};

use super::Challenge;
use crate::x509::Validity;

/// After a failure that is not of the authority's making: it cannot be reached, or has trouble itself.
const FIRST_AFTER_TROUBLE: Duration = Duration::from_secs(60);
/// After a refusal. Let's Encrypt counts five failed validations of a name an hour, and then refuses for longer.
const FIRST_AFTER_REFUSAL: Duration = Duration::from_secs(20 * 60);
/// Never less often than that.
const LONGEST: Duration = Duration::from_secs(6 * 60 * 60);
/// Before the other challenge is tried.
const BETWEEN_CHALLENGES: Duration = Duration::from_secs(5);

/// What kind of failure ended an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The authority could not be reached, or has failed itself.
    Trouble,
    /// The authority has refused.
    Refused,
    /// The authority could not validate a name by the challenge that was tried.
    Validation,
}

/// Decides when the next order is due and which challenge it tries. A core without I/O: the calendar's time and chance
/// (from 0 up to, but not including, 1) are handed in.
///
/// ```text
///            two thirds of its lifetime, up to 1/30 less
///   issued ──────────────────────────────────────────────► due ──► order ──► issued
///                                                           ▲        │
///      trouble: 1 min, then twice as long, up to 6 h        ├────────┤
///      refused: 20 min, then twice as long, up to 6 h       ├────────┤
///      not validated: 5 s, with the other challenge;        ├────────┘
///                     as refused when both have been tried ─┘
/// ```
///
/// Every wait after a failure is up to a quarter longer by chance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    challenges: Vec<Challenge>,
    /// Which of them is next.
    turn: usize,
    /// How many rounds have failed since the last success.
    failures: u32,
    due: SystemTime,
}

impl Renewal {
    /// Starts with a kept certificate's validity, or `None` if there is none that may be shown: then an order is due at
    /// once. Of `challenges` the first is tried first; none means TLS-ALPN-01.
    #[must_use]
    pub fn new(now: SystemTime, kept: Option<Validity>, challenges: Vec<Challenge>, chance: f64) -> Self {
        let challenges = if challenges.is_empty() { vec![Challenge::TlsAlpn01] } else { challenges };
        let due = kept.map_or(now, |kept| renewal_of(kept, chance));
        Self { challenges, turn: 0, failures: 0, due }
    }

    /// When the next order is due.
    #[must_use]
    pub const fn poll_timeout(&self) -> SystemTime {
        self.due
    }

    /// The challenge that it tries.
    #[must_use]
    pub fn challenge(&self) -> Challenge {
        self.challenges[self.turn]
    }

    /// A certificate was issued. The challenge that has worked is tried first from now on.
    pub fn handle_issued(&mut self, now: SystemTime, issued: Validity, chance: f64) {
        self.challenges.rotate_left(self.turn);
        (self.turn, self.failures) = (0, 0);
        // A clock that is ahead must not have us ask again and again: what it takes for old was issued just now.
        let left = issued.left(now);
        let earliest = now + if left.is_zero() { LONGEST } else { left / 4 };
        self.due = renewal_of(issued, chance).max(earliest);
    }

    /// An order has failed. Returns how long to wait.
    pub fn handle_failure(&mut self, now: SystemTime, failure: Failure, chance: f64) -> Duration {
        let another = failure == Failure::Validation && self.turn + 1 < self.challenges.len();
        let wait = if another {
            self.turn += 1;
            BETWEEN_CHALLENGES
        } else {
            if failure == Failure::Validation {
                self.turn = 0;
            }
            let first = if failure == Failure::Trouble { FIRST_AFTER_TROUBLE } else { FIRST_AFTER_REFUSAL };
            let doubled = first.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
            self.failures += 1;
            doubled.mul_f64(1.0 + chance / 4.0)
        };
        self.due = now + wait;
        wait
    }

    /// Somebody asks for it: what waits after a failure is due at once.
    pub fn handle_request(&mut self, now: SystemTime) {
        if self.failures > 0 {
            self.due = self.due.min(now);
        }
    }
}

fn renewal_of(validity: Validity, chance: f64) -> SystemTime {
    let lifetime = validity.not_after.duration_since(validity.not_before).unwrap_or_default();
    validity.not_before + lifetime * 2 / 3 - lifetime.mul_f64(chance / 30.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const HOUR: Duration = Duration::from_secs(60 * 60);
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const BOTH: [Challenge; 2] = [Challenge::TlsAlpn01, Challenge::Http01];

    fn start() -> SystemTime {
        SystemTime::UNIX_EPOCH + 20_000 * DAY
    }

    fn valid_for(lifetime: Duration) -> Validity {
        Validity { not_before: start(), not_after: start() + lifetime }
    }

    #[test]
    fn a_certificate_is_renewed_at_two_thirds_of_its_lifetime_or_a_little_earlier() {
        for (days, latest, earliest) in [(90, 60 * DAY, 57 * DAY), (6, 4 * DAY, 4 * DAY - DAY / 5)] {
            let due = |chance| {
                let kept = Some(valid_for(days * DAY));
                Renewal::new(start() + HOUR, kept, BOTH.to_vec(), chance).poll_timeout()
            };
            assert_eq!((due(0.0), due(1.0)), (start() + latest, start() + earliest), "{days} days");
        }
    }

    #[test]
    fn without_a_certificate_an_order_is_due_at_once() {
        let renewal = Renewal::new(start(), None, Vec::new(), 0.5);
        assert_eq!((renewal.poll_timeout(), renewal.challenge()), (start(), Challenge::TlsAlpn01));
    }

    #[test]
    fn a_challenge_that_fails_gives_way_to_the_other_and_the_one_that_works_is_kept() {
        let mut renewal = Renewal::new(start(), None, BOTH.to_vec(), 0.0);
        assert_eq!(renewal.handle_failure(start(), Failure::Validation, 0.9), BETWEEN_CHALLENGES);
        assert_eq!(renewal.challenge(), Challenge::Http01);
        renewal.handle_issued(start(), valid_for(90 * DAY), 0.0);
        assert_eq!((renewal.challenge(), renewal.poll_timeout()), (Challenge::Http01, start() + 60 * DAY));
        renewal.handle_failure(start(), Failure::Validation, 0.0);
        assert_eq!(renewal.challenge(), Challenge::TlsAlpn01);
    }

    #[test]
    fn a_clock_that_is_ahead_does_not_ask_again_and_again() {
        let mut renewal = Renewal::new(start(), None, BOTH.to_vec(), 0.0);
        for (days, wait) in [(85, 5 * DAY / 4), (3650, LONGEST)] {
            let now = start() + days * DAY;
            renewal.handle_issued(now, valid_for(90 * DAY), 0.0);
            assert_eq!(renewal.poll_timeout(), now + wait, "{days} days ahead");
        }
    }

    #[test]
    fn an_hour_of_failing_validations_stays_within_what_authorities_count() {
        let mut renewal = Renewal::new(start(), None, BOTH.to_vec(), 0.0);
        let (mut now, mut orders) = (start(), 0);
        while now < start() + HOUR {
            orders += 1;
            renewal.handle_failure(now, Failure::Validation, 0.0);
            now = renewal.poll_timeout();
        }
        assert!(orders <= 4, "{orders} failed validations in an hour");
    }

    #[test]
    fn waits_double_up_to_six_hours_and_start_again_after_a_success() {
        let mut renewal = Renewal::new(start(), None, BOTH.to_vec(), 0.0);
        let waits: Vec<Duration> = (0..40).map(|_| renewal.handle_failure(start(), Failure::Trouble, 0.0)).collect();
        assert_eq!(waits[..4], [MINUTE, 2 * MINUTE, 4 * MINUTE, 8 * MINUTE]);
        assert_eq!((waits[9], waits[39]), (LONGEST, LONGEST));
        assert_eq!(renewal.handle_failure(start(), Failure::Refused, 0.8), LONGEST.mul_f64(1.2));
        assert_eq!(renewal.challenge(), Challenge::TlsAlpn01, "trouble says nothing of a challenge");
        renewal.handle_issued(start(), valid_for(90 * DAY), 0.0);
        assert_eq!(renewal.handle_failure(start(), Failure::Refused, 0.0), 20 * MINUTE);
    }

    #[test]
    fn a_request_ends_a_wait_after_a_failure_and_brings_no_renewal_forward() {
        let mut renewal = Renewal::new(start(), Some(valid_for(90 * DAY)), BOTH.to_vec(), 0.0);
        renewal.handle_request(start());
        assert_eq!(renewal.poll_timeout(), start() + 60 * DAY);
        renewal.handle_failure(start() + 60 * DAY, Failure::Refused, 0.0);
        renewal.handle_request(start() + 60 * DAY + MINUTE);
        assert_eq!(renewal.poll_timeout(), start() + 60 * DAY + MINUTE);
    }
}
