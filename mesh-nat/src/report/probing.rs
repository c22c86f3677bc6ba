//! What one socket and many servers cannot tell: in which order a NAT hands out ports, whom it lets in, and whether two
//! hosts behind it reach each other by their outside addresses.
//!
//! ```text
//!  located ──► WantSockets ──► all ask one server, then another ──────────────► crossing ──► concluded
//!                 │ 50 ms without sockets                                        │
//!                 └──────────────────────────────────────────────────────────────┴──► at the latest 1.4 s after the start
//! ```
//!
//! In the crossing, sockets a, b and c were opened for this, and m is the node's own:
//!
//! - a sends to m's outside address. If that arrives, hairpinning works, and everyone is let in: nobody had sent to a.
//! - m sends to b's outside address, and b to m's. If b's arrives, hairpinning works: m had sent to b.
//! - c asks a server to answer from its other port (CHANGE-REQUEST, RFC 5780 §4.4). If that arrives, the NAT does not
//!   filter by port. If nothing does, it does. An answer from the same port comes from a server that does not know the
//!   question, and says nothing.
//!
//! Where outside ports depend on the destination, nobody can send to m but the servers; then only the last one counts.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::run::{Run, Sent};
use super::types::Transmit;
use crate::behaviour::Filtering;
use crate::path::{Family, SocketId};
use crate::stun::message::{TransactionId, request, request_from_other_port};

/// Sockets that are opened: with two servers each, a dozen mappings, which the smallest blocks of carriers can spare.
pub(super) const SOCKETS: usize = 6;
/// How long the caller has to open them.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long an answer is waited for, beyond what the slower server took before.
const GRACE: Duration = Duration::from_millis(100);
/// When the question that may stay unanswered is asked again.
const REPEAT: Duration = Duration::from_millis(30);

/// How far it is.
#[derive(Debug)]
pub(super) enum Stage {
    /// Waits for sockets.
    Wanted,
    /// The sockets ask servers.
    Asking,
    /// The sockets send to one another.
    Crossing,
}

/// The questions that need sockets of their own.
#[derive(Debug)]
pub(super) struct Probing {
    pub(super) stage: Stage,
    /// When this stage is over at the latest.
    pub(super) until: Instant,
    /// The node's own socket.
    main: SocketId,
    servers: Vec<SocketAddr>,
    extra: Vec<(SocketId, u16)>,
    pending: BTreeSet<TransactionId>,
    /// From a socket that nobody sent to.
    unasked: Option<TransactionId>,
    /// From a socket that was sent to.
    mutual: Option<TransactionId>,
    /// The questions to be answered from another port.
    change: BTreeSet<TransactionId>,
    repeat: Option<Instant>,
    /// Whether silence after a mutual sending is the NAT's doing.
    certain: bool,
    unasked_arrived: bool,
    mutual_arrived: bool,
    /// Whether the answer came from the other port.
    changed: Option<bool>,
}

impl Probing {
    pub(super) fn new(now: Instant, main: SocketId, servers: Vec<SocketAddr>) -> Self {
        Self {
            stage: Stage::Wanted,
            until: now + PATIENCE,
            main,
            servers,
            extra: Vec::new(),
            pending: BTreeSet::new(),
            unasked: None,
            mutual: None,
            change: BTreeSet::new(),
            repeat: None,
            certain: false,
            unasked_arrived: false,
            mutual_arrived: false,
            changed: None,
        }
    }

    /// When to look again.
    pub(super) fn next(&self) -> Instant {
        self.repeat.map_or(self.until, |repeat| repeat.min(self.until))
    }

    /// The port of a socket that was opened for this.
    pub(super) fn own(&self, socket: SocketId) -> Option<u16> {
        self.extra.iter().find(|(extra, _)| *extra == socket).map(|(_, port)| *port)
    }

    /// Whether nothing more can come.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let settled = match self.stage {
            Stage::Wanted => false,
            Stage::Asking => self.pending.is_empty(),
            Stage::Crossing => {
                let crossed = self.mutual.is_none() || self.mutual_arrived;
                let filtered = self.change.is_empty() || self.changed.is_some();
                crossed && filtered && (self.unasked.is_none() || self.unasked_arrived)
            }
        };
        settled || now >= self.until
    }

    fn wait(&self, run: &Run) -> Duration {
        let slowest = self.servers.iter().map(|server| run.latency(*server)).max().unwrap_or_default();
        slowest.saturating_add(GRACE)
    }

    /// Takes the sockets and lets each ask the servers.
    pub(super) fn open(
        &mut self,
        now: Instant,
        run: &mut Run,
        sockets: &[(SocketId, SocketAddr)],
        mut draw: impl FnMut() -> TransactionId,
    ) -> Vec<Transmit> {
        self.stage = Stage::Asking;
        self.extra = sockets.iter().map(|(socket, bound)| (*socket, bound.port())).collect();
        self.until = now + self.wait(run);
        let mut transmits = Vec::new();
        let last = self.extra.last().map(|(socket, _)| *socket);
        // One server after the other: a NAT that keeps ports while they are free gives the next one to a socket's second
        // mapping, and a host whose sockets have ports in order would find it taken.
        for (index, server) in self.servers.iter().copied().enumerate() {
            for (socket, own) in self.extra.iter().copied() {
                // The last one must not have sent to a server's other port: it finds out whether that one is let in.
                if index > 0 && Some(socket) == last {
                    continue;
                }
                let tx = draw();
                run.count(socket, server);
                run.sent.insert(tx, Sent { region: None, socket, own, server, at: now });
                self.pending.insert(tx);
                transmits.push(Transmit { socket, remote: server, datagram: request(tx) });
            }
        }
        transmits
    }

    /// An answer that was waited for has come.
    pub(super) fn told(&mut self, tx: TransactionId) {
        self.pending.remove(&tx);
    }

    /// Lets the sockets send to one another, and ask for an answer from elsewhere.
    pub(super) fn cross(&mut self, now: Instant, run: &Run, mut draw: impl FnMut() -> TransactionId) -> Vec<Transmit> {
        self.stage = Stage::Crossing;
        self.until = now + self.wait(run);
        let Some(first) = self.servers.first().copied() else { return Vec::new() };
        let outside = |socket| run.sightings.mapped(socket, first);
        let mut transmits = Vec::new();
        let send = |transmits: &mut Vec<Transmit>, socket, remote, tx| {
            transmits.push(Transmit { socket, remote, datagram: request(tx) });
        };
        let easy = run.sightings.behaviour(Family::V4).is_easy();
        self.certain = easy == Some(true);
        let translated = run.sightings.translated(Family::V4) != Some(false);
        let mut seen = self.extra.iter().filter_map(|(socket, _)| Some((*socket, outside(*socket)?)));
        let (a, b) = (seen.next(), seen.next());
        if let (true, Some(main), Some((a, _)), Some((b, outside_b))) =
            (easy != Some(false) && translated, outside(self.main), a, b)
        {
            let (unasked, opening, mutual) = (draw(), draw(), draw());
            send(&mut transmits, a, main, unasked);
            send(&mut transmits, self.main, outside_b, opening);
            send(&mut transmits, b, main, mutual);
            (self.unasked, self.mutual) = (Some(unasked), Some(mutual));
        }
        if run.answers_elsewhere(first) {
            transmits.extend(self.ask_for_change(draw));
            self.repeat = Some(now + REPEAT);
        }
        transmits
    }

    /// Asks again what may have been lost.
    pub(super) fn repeat(&mut self, now: Instant, draw: impl FnMut() -> TransactionId) -> Option<Transmit> {
        self.repeat = self.repeat.filter(|repeat| *repeat > now);
        if self.repeat.is_some() || self.changed.is_some() || self.change.len() != 1 {
            return None;
        }
        self.ask_for_change(draw)
    }

    fn ask_for_change(&mut self, mut draw: impl FnMut() -> TransactionId) -> Option<Transmit> {
        let (socket, _) = *self.extra.last()?;
        let remote = *self.servers.first()?;
        let tx = draw();
        self.change.insert(tx);
        Some(Transmit { socket, remote, datagram: request_from_other_port(tx) })
    }

    /// Takes a request that one of our own sockets has sent. Returns whether it is one.
    pub(super) fn crossed(&mut self, tx: TransactionId) -> bool {
        let (unasked, mutual) = (self.unasked == Some(tx), self.mutual == Some(tx));
        self.unasked_arrived |= unasked;
        self.mutual_arrived |= mutual;
        unasked || mutual
    }

    /// Takes an answer to the question for an answer from elsewhere. Returns whether it is one.
    pub(super) fn changed(&mut self, source: SocketAddr, tx: TransactionId) -> bool {
        let ours = self.change.contains(&tx);
        if ours {
            let elsewhere = self.servers.first() != Some(&source);
            self.changed = Some(elsewhere || self.changed == Some(true));
        }
        ours
    }

    /// Whether two hosts behind the NAT reach each other by their outside addresses.
    pub(super) fn hairpin(&self) -> Option<bool> {
        self.mutual?;
        if self.mutual_arrived || self.unasked_arrived { Some(true) } else { self.certain.then_some(false) }
    }

    /// Whom the NAT lets in, if that can be told.
    pub(super) fn filtering(&self) -> Option<Filtering> {
        let by_port = match (self.changed, self.change.len()) {
            (Some(true), _) => false,
            // Twice no answer is hardly loss.
            (None, 2..) => true,
            (Some(false), _) | (None, _) => return None,
        };
        match (by_port, self.unasked_arrived, self.mutual_arrived) {
            (true, ..) => Some(Filtering::AddressAndPortDependent),
            (false, true, _) => Some(Filtering::EndpointIndependent),
            (false, false, true) => Some(Filtering::AddressDependent),
            // Whether other addresses are let in, no other address has tried.
            (false, false, false) => None,
        }
    }
}
