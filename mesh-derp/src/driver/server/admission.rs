//! Who may use a relay.

use std::collections::BTreeSet;
use std::fmt;
use std::future::{Future, ready};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{PoisonError, RwLock};

use mesh_noise::key::NodePublic;

/// A client that has proved its key and waits to be let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applicant {
    /// Its node key.
    pub node: NodePublic,
    /// Where it connects from.
    pub address: IpAddr,
}

/// Decides who may use a relay. A client that is turned away sees its connection closed, and nothing else.
pub trait Admission: Send + Sync + fmt::Debug + 'static {
    /// Whether to let it in. May take its time, and has to bound it.
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>>;
}

/// Everybody may.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllowAll;

impl Admission for AllowAll {
    fn admit(&self, _applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(ready(true))
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
}

impl Admission for AllowList {
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        let listed = self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&applicant.node);
        Box::pin(ready(listed))
    }
}
