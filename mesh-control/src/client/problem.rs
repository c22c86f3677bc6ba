//! What can go wrong between a node and its control server, in words that say what to do.

use std::time::Duration;

use mesh_noise::key::MachinePublic;

use crate::channel::ChannelError;
use crate::wire::WireError;

/// Why the control server cannot be used, now or at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// No connection: name resolution, routing, refusal, or a connection that broke.
    #[error("cannot reach the coordinator at {url}: {reason}; check that it runs and that this address is right")]
    Unreachable {
        /// Its URL.
        url: String,
        /// What the system said.
        reason: String,
    },
    /// The server's certificate is not accepted.
    #[error("the coordinator at {url} shows a certificate that is not accepted: {reason}{}", clock_hint(reason))]
    Certificate {
        /// Its URL.
        url: String,
        /// What the verifier said.
        reason: String,
    },
    /// Something answers, but it is no control server.
    #[error("{url} does not answer like a coordinator: {reason}; check the login server's address")]
    NotACoordinator {
        /// Its URL.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The server's key is not the one this node joined with.
    #[error(
        "the coordinator at {url} shows another key ({}) than the one this node joined with ({}); if it was set up anew, \
         log out and join again, otherwise somebody is impersonating it", got.short(), expected.short()
    )]
    WrongServerKey {
        /// Its URL.
        url: String,
        /// The key from when this node joined.
        expected: MachinePublic,
        /// The key that it shows now.
        got: MachinePublic,
    },
    /// The secure channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A request was answered with an HTTP status other than 200.
    #[error("the coordinator answered {path} with status {status}: {text}")]
    Status {
        /// What was asked.
        path: String,
        /// The status.
        status: u16,
        /// The beginning of the answer's text.
        text: String,
        /// How long the server wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// An answer or a map message cannot be read.
    #[error("the coordinator sent something unreadable: {0}")]
    Wire(#[from] WireError),
    /// The server refuses to register this node.
    #[error("the coordinator refuses this node: {0}")]
    Refused(String),
    /// The server asked for a new node key and does not take it.
    #[error("the coordinator calls a node key expired that was made a moment ago; check both clocks")]
    FreshKeyExpired,
    /// The first map of a stream lacks this node.
    #[error("the coordinator's first map does not contain this node")]
    NoNode,
    /// The map stream ended.
    #[error("the coordinator closed the map stream")]
    MapEnded,
    /// Nothing came for too long.
    #[error("nothing came from the coordinator for {} seconds", .0.as_secs())]
    Stalled(Duration),
}

impl Problem {
    /// Whether trying again will not help until somebody does something: `up` may give up on it.
    ///
    /// A node that is running keeps trying all the same (except after [`Problem::Refused`] for an auth key), because
    /// that somebody may be the server's administrator.
    #[must_use]
    pub fn needs_attention(&self) -> bool {
        match self {
            Self::WrongServerKey { .. } | Self::Refused(_) | Self::Certificate { .. } | Self::FreshKeyExpired => true,
            Self::Status { status, .. } => matches!(status, 400 | 403),
            Self::Unreachable { .. }
            | Self::NotACoordinator { .. }
            | Self::Channel(_)
            | Self::Wire(_)
            | Self::NoNode
            | Self::MapEnded
            | Self::Stalled(_) => false,
        }
    }

    /// How long the server wants to be left alone, if it said so.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        if let Self::Status { retry_after, .. } = self { *retry_after } else { None }
    }
}

/// Certificates that are "not yet" or "no longer" valid are most often a clock that is off.
fn clock_hint(reason: &str) -> &'static str {
    let reason = reason.to_ascii_lowercase();
    if reason.contains("notvalidyet") || reason.contains("not valid yet") || reason.contains("expired") {
        "; check this machine's clock"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_out_of_time_hints_at_the_clock() {
        let problem =
            |reason: &str| Problem::Certificate { url: "https://c".into(), reason: reason.into() }.to_string();
        assert!(problem("certificate expired").ends_with("check this machine's clock"));
        assert!(!problem("UnknownIssuer").contains("clock"));
    }

    #[test]
    fn refusals_need_attention_and_outages_do_not() {
        assert!(Problem::Refused("no such key".into()).needs_attention());
        assert!(!Problem::MapEnded.needs_attention());
        let status =
            |status| Problem::Status { path: "/machine/map".into(), status, text: String::new(), retry_after: None };
        assert!(status(400).needs_attention() && !status(502).needs_attention());
    }
}
