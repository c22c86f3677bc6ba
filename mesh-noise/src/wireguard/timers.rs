//! The timers of one peer, and the constants behind them (whitepaper §6).

use std::time::{Duration, Instant};

/// The protocol's constants, under the whitepaper's names (§6.1). The defaults are the protocol; change them in tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    /// `REKEY-AFTER-TIME`, 120 s: the initiator of a session starts a new one when it sends after this age.
    pub rekey_after: Duration,
    /// `REJECT-AFTER-TIME`, 180 s: a session of this age is gone.
    pub reject_after: Duration,
    /// `REKEY-ATTEMPT-TIME`, 90 s: how long a handshake is tried before it is given up.
    pub rekey_attempt: Duration,
    /// `REKEY-TIMEOUT`, 5 s: time between two initiations to one peer.
    pub rekey_timeout: Duration,
    /// What is added to `rekey_timeout` at random, less than this (333 ms), so that two sides that started together
    /// do not stay in step.
    pub rekey_jitter: Duration,
    /// `KEEPALIVE-TIMEOUT`, 10 s: data that was not answered within this time is answered by a keepalive.
    pub keepalive_timeout: Duration,
    /// `REKEY-AFTER-MESSAGES`, 2^60: a session that sent more is replaced.
    pub rekey_after_messages: u64,
    /// `REJECT-AFTER-MESSAGES`, 2^64 - 2^13 - 1: a session sends and accepts no counter from here on.
    pub reject_after_messages: u64,
    /// Initiations by one peer that follow each other faster than this (20 ms) are refused.
    pub initiation_spacing: Duration,
    /// Handshake messages per second (500) beyond which cookies are asked for.
    pub load_limit: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            rekey_after: Duration::from_secs(120),
            reject_after: Duration::from_secs(180),
            rekey_attempt: Duration::from_secs(90),
            rekey_timeout: Duration::from_secs(5),
            rekey_jitter: Duration::from_millis(333),
            keepalive_timeout: Duration::from_secs(10),
            rekey_after_messages: 1 << 60,
            reject_after_messages: u64::MAX - (1 << 13),
            initiation_spacing: Duration::from_millis(20),
            load_limit: 500,
        }
    }
}

impl Timing {
    /// The age from which *receiving* makes the initiator start a new session: 165 s (whitepaper §6.2).
    pub(crate) fn rekey_on_receive(&self) -> Duration {
        self.reject_after.saturating_sub(self.keepalive_timeout + self.rekey_timeout)
    }

    /// How long data may go unanswered before a handshake is started: 15 s (whitepaper §6.5).
    pub(crate) fn silence(&self) -> Duration {
        self.keepalive_timeout + self.rekey_timeout
    }
}

/// What can fall due for a peer, in the order in which simultaneous timers fire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// A session has reached its age limit.
    SessionEnd,
    /// The handshake has been tried long enough.
    GiveUp,
    /// Time for the next initiation.
    Retry,
    /// The session is old enough to be replaced if it is used.
    Rekey,
    /// What we sent went unanswered.
    Silence,
    /// What we received went unanswered.
    Keepalive,
    /// The persistent keepalive's interval is over.
    PersistentKeepalive,
}

const ALL: [Timer; 7] = [
    Timer::SessionEnd,
    Timer::GiveUp,
    Timer::Retry,
    Timer::Rekey,
    Timer::Silence,
    Timer::Keepalive,
    Timer::PersistentKeepalive,
];

/// One deadline for each timer that runs.
#[derive(Debug, Default)]
pub(crate) struct TimerTable([Option<Instant>; ALL.len()]);

impl TimerTable {
    /// Starts a timer, or brings its deadline forward.
    pub(crate) fn set(&mut self, timer: Timer, at: Instant) {
        let slot = &mut self.0[timer as usize];
        *slot = Some(slot.map_or(at, |earlier| earlier.min(at)));
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.0.iter().flatten().min().copied()
    }

    pub(crate) fn expired(&self, now: Instant) -> Option<Timer> {
        ALL.into_iter().find(|timer| self.0[*timer as usize].is_some_and(|at| at <= now))
    }
}
