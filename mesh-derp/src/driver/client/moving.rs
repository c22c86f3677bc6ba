//! Moving from one relay of a region to another without a gap.
//!
//! A second connection is made beside one that works, which is given up once the second has been let in, in two cases:
//! - The relay says that it will restart. It is obeyed at the time it names, which spreads its clients out, and another
//!   relay of the region is preferred. Should the relay be gone before that, the client waits for that time all the same.
//! - The connection is to another relay than the region's first. That one is tried after 30 s, then ever less often.
//!
//! The older connection is read for a second more, since packets may be on their way through it, and not written to.

use std::time::{Duration, Instant};

use super::open::Open;
use super::{Dialling, RelayClient, RelayEvent, State, jittered};
use crate::client::dialling::ideal;
use crate::driver::now;

/// A connection in the making, beside one that works.
pub(super) enum Next {
    Dialling(Dialling),
    LoggingIn(Box<Open>),
}

/// A connection that has been replaced.
pub(super) struct Former {
    pub(super) open: Box<Open>,
    pub(super) until: tokio::time::Instant,
}

/// What a relay has said about its restart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Restart {
    /// When to connect anew.
    pub(super) at: Instant,
    /// Until when to try again quickly.
    pub(super) until: Instant,
}

/// How long a connection that has been replaced is still read.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// The longest time for which a relay that restarts may keep its clients waiting, and trying in a hurry.
const RESTART_LIMIT: Duration = Duration::from_secs(30);
/// Between attempts at a relay that restarts, before jitter.
pub(super) const RESTART_RETRY: Duration = Duration::from_millis(200);

impl RelayClient {
    /// The relay has said that it will restart.
    pub(super) fn note_restart(&mut self, reconnect_in: Duration, try_for: Duration) {
        let reconnect_in = reconnect_in.min(RESTART_LIMIT);
        tracing::info!(region = %self.reach.region.id, ?reconnect_in, "relay is about to restart");
        let at = now() + reconnect_in;
        self.restart = Some(Restart { at, until: at + try_for.min(RESTART_LIMIT) });
        if let State::Connected(open) = &self.state {
            self.history.note_failed(now(), &self.reach.region.nodes[open.node].name);
        }
        self.events.push_back(RelayEvent::Restarting { reconnect_in });
    }

    /// When to make another connection beside the present one.
    pub(super) fn move_at(&self) -> Option<Instant> {
        if self.next.is_some() || self.connected_at.is_none() {
            return None;
        }
        self.restart.map(|restart| restart.at).or(self.return_at)
    }

    pub(super) fn begin_move(&mut self) {
        let order = if self.restart.is_some() {
            self.history.order(now(), &self.reach.region)
        } else {
            self.history.note_return();
            ideal(&self.reach.region).into_iter().collect()
        };
        self.next = Some(Next::Dialling(self.dial(order)));
    }

    pub(super) fn move_failed(&mut self, reason: &str) {
        tracing::debug!(region = %self.reach.region.id, %reason, "no better relay connection yet");
        self.next = None;
        match &mut self.restart {
            Some(restart) if now() < restart.until => restart.at = now() + jittered(RESTART_RETRY),
            _ => {
                self.restart = None;
                self.return_at = Some(now() + jittered(self.history.return_after()));
            }
        }
    }

    /// Replaces the present connection by the next one, if that has been let in.
    pub(super) fn finish_move(&mut self) {
        let Some(Next::LoggingIn(open)) = self.next.take_if(|next| match next {
            Next::LoggingIn(open) => open.core.is_open(),
            Next::Dialling(_) => false,
        }) else {
            return;
        };
        self.forget_health();
        let before = std::mem::replace(&mut self.state, State::Connected(open));
        if let State::Connected(open) = before {
            self.former = Some(Former { open, until: tokio::time::Instant::now() + LINGER });
        }
        self.handle_events();
    }
}
