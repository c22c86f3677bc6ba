//! Who may use a relay.

use std::collections::BTreeSet;
use std::fmt;
use std::future::{Future, ready};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use mesh_noise::key::NodePublic;

mod file;
#[cfg(feature = "verify")]
mod verify;

pub use file::{AllowListFile, BadAllowList};
#[cfg(feature = "verify")]
pub use verify::{BadVerifyUrl, Unreachable, Verify};

/// A client that has proved its key and waits to be let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Applicant {
    /// Its node key.
    pub node: NodePublic,
    /// Where it connects from.
    pub address: IpAddr,
}

/// What is decided about an applicant, and how. The relay counts each apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may use the relay.
    Admit,
    /// It may not.
    Refuse,
    /// Whoever knows could not be asked, and it is let in all the same.
    AdmitUnasked,
    /// Whoever knows could not be asked, and it is turned away.
    RefuseUnasked,
    /// Whoever knows gave an answer that makes no sense; it is turned away.
    RefuseMalformed,
}

impl Verdict {
    /// Whether the applicant is let in.
    #[must_use]
    pub const fn admits(self) -> bool {
        matches!(self, Self::Admit | Self::AdmitUnasked)
    }
}

impl From<bool> for Verdict {
    fn from(admit: bool) -> Self {
        if admit { Self::Admit } else { Self::Refuse }
    }
}

/// What [`Admission::decide`] returns.
pub type Deciding<'a> = Pin<Box<dyn Future<Output = Verdict> + Send + 'a>>;

/// Decides who may use a relay. A client that is turned away sees its connection closed, and nothing else. Other relays of
/// the region are not asked about.
pub trait Admission: Send + Sync + fmt::Debug + 'static {
    /// Whether to let it in. May take its time, and has to bound it.
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>>;

    /// The same, and how that was decided, which the relay counts. Calls [`Admission::admit`] unless it is provided.
    fn decide(&self, applicant: Applicant) -> Deciding<'_> {
        Box::pin(async move { self.admit(applicant).await.into() })
    }
}

/// Everybody may.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllowAll;

impl Admission for AllowAll {
    fn admit(&self, _applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(ready(true))
    }
}

/// Who may according to each of these, asked in this order until one refuses.
#[derive(Debug, Default)]
pub struct AllOf(pub Vec<Arc<dyn Admission>>);

impl Admission for AllOf {
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(async move { self.decide(applicant).await.admits() })
    }

    fn decide(&self, applicant: Applicant) -> Deciding<'_> {
        Box::pin(async move {
            let mut verdict = Verdict::Admit;
            for admission in &self.0 {
                let next = admission.decide(applicant).await;
                if !next.admits() {
                    return next;
                }
                if next == Verdict::AdmitUnasked {
                    verdict = next;
                }
            }
            verdict
        })
    }
}

/// The nodes of a list may. It can be changed while the relay runs; who is already connected stays so until
/// [`RelayServer::disconnect`](super::RelayServer::disconnect).
#[derive(Debug, Default)]
pub struct AllowList(RwLock<BTreeSet<NodePublic>>);

impl AllowList {
    /// A list of these nodes.
    #[must_use]
    pub fn new(nodes: impl IntoIterator<Item = NodePublic>) -> Self {
        Self(RwLock::new(nodes.into_iter().collect()))
    }

    /// Lets a node in from now on.
    pub fn allow(&self, node: NodePublic) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(node);
    }

    /// Turns a node away from now on.
    pub fn deny(&self, node: &NodePublic) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(node);
    }

    /// Replaces the whole list.
    pub fn replace(&self, nodes: impl IntoIterator<Item = NodePublic>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = nodes.into_iter().collect();
    }

    /// Whether a node is on it.
    #[must_use]
    pub fn contains(&self, node: &NodePublic) -> bool {
        self.nodes().contains(node)
    }

    fn nodes(&self) -> RwLockReadGuard<'_, BTreeSet<NodePublic>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission for AllowList {
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(ready(self.contains(&applicant.node)))
    }
}
