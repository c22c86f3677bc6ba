//! What survives a restart.
//!
//! A store keeps one row for each record and one for each event. It takes batches of events in order and says when a
//! batch is durable; nothing is acknowledged to a client before that. All nodes live in memory, so reading happens once,
//! at the start.

pub mod sqlite;

use std::path::PathBuf;

use super::event::Event;
use super::record::TailnetId;
use super::state::{Counters, Records};

pub use sqlite::SqliteStore;

/// Why the store cannot do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process works on this state directory.
    #[error("another coordinator is running on {0}: stop it, or use another --state-dir")]
    Locked(PathBuf),
    /// The database was written by a later version of this program.
    #[error("{path} has schema {found}, this program knows {known}: use a newer version of it")]
    NewerSchema {
        /// The database.
        path: PathBuf,
        /// Its schema version.
        found: i64,
        /// The latest that this program knows.
        known: i64,
    },
    /// The state directory or a file in it cannot be used.
    #[error("cannot use {path}: {error}")]
    File {
        /// What was tried.
        path: PathBuf,
        /// Why it failed.
        error: std::io::Error,
    },
    /// The file is no database of ours. It is left as it is.
    #[error("cannot use {path}: {reason}; restore it from a backup, or move it away to start afresh")]
    Unusable {
        /// The database.
        path: PathBuf,
        /// What SQLite says.
        reason: String,
    },
    /// The database failed.
    #[error("database: {0}")]
    Database(String),
    /// A row cannot be read.
    #[error("damaged row in table {table}: {detail}")]
    Damaged {
        /// Its table.
        table: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// The writer has stopped after an earlier failure.
    #[error("the store has stopped after an earlier failure")]
    Stopped,
}

/// Events to make durable, all or none of them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The tailnet that they belong to.
    pub tailnet: TailnetId,
    /// The events, in order.
    pub events: Vec<Event>,
    /// The numbers given out once they are applied.
    pub counters: Counters,
}

/// Called once, on the writer's thread and in the order of the batches, with the batch's outcome.
pub type Done = Box<dyn FnOnce(Result<Batch, StoreError>) + Send>;

/// A place where events and the records they lead to are kept.
pub trait Store: Send + Sync + 'static {
    /// Reads a tailnet back; an empty one if it was never written.
    ///
    /// # Errors
    /// If the database fails or holds what cannot be read.
    fn load(&self, tailnet: TailnetId) -> Result<Records, StoreError>;

    /// Takes a batch and returns at once. `done` is called when it is durable, or cannot be.
    fn append(&self, batch: Batch, done: Done);
}
