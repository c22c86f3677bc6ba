//! The embedded store: SQLite in WAL mode, one writer thread, commits grouped.
//!
//! The state directory holds `coordinator.db` (0600) and `coordinator.lock`, which the kernel locks for the life of the
//! process. While one commit is on its way to the disk, batches gather; the next commit takes all of them. So a burst of
//! a thousand joins costs a handful of syncs. After a failed commit the writer stops: memory is ahead of the disk then,
//! and only a restart makes them one again.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Batch, Done, Store, StoreError};
use crate::server::address::Cursor;
use crate::server::event::{Change, Event, EventId};
use crate::server::record::{Node, TailnetId};
use crate::server::state::{Counters, Records};

/// The schema, step by step. A step, once released, never changes.
const MIGRATIONS: [(i64, &str); 1] = [(1, include_str!("migrations/0001_first.sql"))];

/// How many events of a tailnet are kept when the store is opened.
const EVENTS_KEPT: i64 = 100_000;

/// The largest number of batches that one commit takes.
const GROUP: usize = 1024;

/// A store in a state directory.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    // Taken when the store is dropped, so that the writer sees the channel close.
    queue: Option<mpsc::Sender<(Batch, Done)>>,
    writer: Option<JoinHandle<()>>,
    reader: Mutex<Connection>,
    _lock: File,
}

impl SqliteStore {
    /// Opens the store in `state_dir`, which is created (0700) if need be, and brings its schema up to date.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another process uses the directory, [`StoreError::NewerSchema`] if a later version of
    /// this program wrote it, [`StoreError::File`] and [`StoreError::Database`] as the system has it.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let file = |path: &Path, error| StoreError::File { path: path.to_owned(), error };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(|error| file(state_dir, error))?;
        let private = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(path).map_err(|error| file(path, error))
        };
        let lock_path = state_dir.join("coordinator.lock");
        let lock = private(&lock_path)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StoreError::Locked(state_dir.to_owned()),
            TryLockError::Error(error) => file(&lock_path, error),
        })?;
        let path = state_dir.join("coordinator.db");
        // SQLite gives its journal files the mode of the database, so making that private is enough.
        drop(private(&path)?);
        let named = |error| {
            if let StoreError::Database(reason) = error {
                return StoreError::Unusable { path: path.clone(), reason };
            }
            error
        };
        let mut connection = connect(&path).map_err(named)?;
        migrate(&mut connection, &path).map_err(named)?;
        prune(&connection).map_err(named)?;
        let reader = connect(&path).map_err(named)?;
        let (queue, jobs) = mpsc::channel();
        let writer = std::thread::Builder::new()
            .name("mesh-store".to_owned())
            .spawn(move || write_all(connection, &jobs))
            .map_err(|error| file(&path, error))?;
        Ok(Self { path, queue: Some(queue), writer: Some(writer), reader: Mutex::new(reader), _lock: lock })
    }

    /// The database file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SqliteStore {
    /// Waits until everything that was appended is written.
    fn drop(&mut self) {
        self.queue.take();
        if let Some(writer) = self.writer.take()
            && writer.thread().id() != std::thread::current().id()
        {
            // A writer that panicked has nothing left to write.
            let _ = writer.join();
        }
    }
}

impl Store for SqliteStore {
    fn load(&self, tailnet: TailnetId) -> Result<Records, StoreError> {
        let connection = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Records {
            counters: counters(&connection, tailnet)?,
            users: rows(&connection, "users", tailnet)?,
            keys: rows(&connection, "auth_keys", tailnet)?,
            codes: rows(&connection, "codes", tailnet)?,
            logins: rows(&connection, "logins", tailnet)?,
            nodes: rows(&connection, "nodes", tailnet)?,
        })
    }

    fn append(&self, batch: Batch, done: Done) {
        let refused = match &self.queue {
            Some(queue) => queue.send((batch, done)).err().map(|refused| refused.0.1),
            None => Some(done),
        };
        if let Some(done) = refused {
            done(Err(StoreError::Stopped));
        }
    }
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(path).map_err(database)?;
    connection.busy_timeout(Duration::from_secs(10)).map_err(database)?;
    connection.pragma_update(None, "journal_mode", "wal").map_err(database)?;
    // In WAL mode, FULL syncs the log at each commit: what was acknowledged survives a power cut.
    connection.pragma_update(None, "synchronous", "full").map_err(database)?;
    Ok(connection)
}

fn database(error: rusqlite::Error) -> StoreError {
    StoreError::Database(error.to_string())
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let transaction = connection.transaction().map_err(database)?;
    transaction
        .execute_batch("CREATE TABLE IF NOT EXISTS schema_migrations (version BIGINT NOT NULL PRIMARY KEY)")
        .map_err(database)?;
    let found: i64 = transaction
        .query_row("SELECT COALESCE(MAX(version), 0) FROM schema_migrations", [], |row| row.get(0))
        .map_err(database)?;
    let known = MIGRATIONS.iter().map(|(version, _)| *version).max().unwrap_or(0);
    if found > known {
        return Err(StoreError::NewerSchema { path: path.to_owned(), found, known });
    }
    for (version, sql) in MIGRATIONS.iter().filter(|(version, _)| *version > found) {
        transaction.execute_batch(sql).map_err(database)?;
        transaction.execute("INSERT INTO schema_migrations (version) VALUES ($1)", [version]).map_err(database)?;
    }
    transaction.commit().map_err(database)
}

/// Drops the oldest events: the log is for looking back, the records are what counts.
fn prune(connection: &Connection) -> Result<(), StoreError> {
    connection
        .execute(
            "DELETE FROM events WHERE id <= (SELECT last_event FROM tailnets WHERE tailnets.tailnet = events.tailnet) - $1",
            [EVENTS_KEPT],
        )
        .map_err(database)?;
    Ok(())
}

fn counters(connection: &Connection, tailnet: TailnetId) -> Result<Counters, StoreError> {
    let row = connection
        .query_row(
            "SELECT last_event, last_user, last_key, last_node, last_address FROM tailnets WHERE tailnet = $1",
            [number(tailnet.0)],
            |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get::<_, i64>(4)?]),
        )
        .optional()
        .map_err(database)?;
    let Some([event, user, key, node, address]) = row else { return Ok(Counters::default()) };
    let damaged = || StoreError::Damaged { table: "tailnets", detail: "a counter is out of range".to_owned() };
    let count = |number: i64| u64::try_from(number).map_err(|_| damaged());
    Ok(Counters {
        event: EventId(count(event)?),
        user: count(user)?,
        key: count(key)?,
        node: count(node)?,
        address: Cursor::from_offset(u32::try_from(address).map_err(|_| damaged())?),
    })
}

fn rows<T: DeserializeOwned>(
    connection: &Connection,
    table: &'static str,
    tailnet: TailnetId,
) -> Result<Vec<T>, StoreError> {
    let sql = format!("SELECT body FROM {table} WHERE tailnet = $1 ORDER BY id");
    let mut statement = connection.prepare(&sql).map_err(database)?;
    let bodies = statement.query_map([number(tailnet.0)], |row| row.get::<_, String>(0)).map_err(database)?;
    bodies
        .map(|body| {
            let body = body.map_err(database)?;
            serde_json::from_str(&body).map_err(|error| StoreError::Damaged { table, detail: error.to_string() })
        })
        .collect()
}

/// The writer: takes what has gathered, commits it as one transaction, tells everyone in order.
fn write_all(mut connection: Connection, jobs: &mpsc::Receiver<(Batch, Done)>) {
    while let Ok(first) = jobs.recv() {
        let mut group = vec![first];
        while group.len() < GROUP
            && let Ok(next) = jobs.try_recv()
        {
            group.push(next);
        }
        let outcome = commit(&mut connection, group.iter().map(|(batch, _)| batch));
        let failed = outcome.as_ref().err().map(ToString::to_string);
        for (batch, done) in group {
            done(match &failed {
                None => Ok(batch),
                Some(text) => Err(StoreError::Database(text.clone())),
            });
        }
        if let Some(text) = failed {
            tracing::error!(error = text, "the store has failed; restart the coordinator");
            return;
        }
    }
}

fn commit<'a>(connection: &mut Connection, batches: impl Iterator<Item = &'a Batch>) -> Result<(), StoreError> {
    let transaction = connection.transaction().map_err(database)?;
    for batch in batches {
        for event in &batch.events {
            record(&transaction, batch.tailnet, event)?;
        }
        let counters = &batch.counters;
        transaction
            .prepare_cached(
                "INSERT INTO tailnets (tailnet, last_event, last_user, last_key, last_node, last_address) \
                 VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (tailnet) DO UPDATE SET \
                 last_event = excluded.last_event, last_user = excluded.last_user, last_key = excluded.last_key, \
                 last_node = excluded.last_node, last_address = excluded.last_address",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    number(batch.tailnet.0),
                    number(counters.event.0),
                    number(counters.user),
                    number(counters.key),
                    number(counters.node),
                    counters.address.offset(),
                ])
            })
            .map_err(database)?;
    }
    transaction.commit().map_err(database)
}

/// Writes one event and the row that it leads to.
fn record(transaction: &Transaction<'_>, tailnet: TailnetId, event: &Event) -> Result<(), StoreError> {
    let tailnet = number(tailnet.0);
    let run = |sql: &str, values: &[&dyn rusqlite::ToSql]| -> Result<(), StoreError> {
        transaction.prepare_cached(sql).and_then(|mut statement| statement.execute(values)).map_err(database)?;
        Ok(())
    };
    run(
        "INSERT INTO events (tailnet, id, at, kind, body) VALUES ($1, $2, $3, $4, $5)",
        &[&tailnet, &number(event.id.0), &number(event.at.millis()), &event.change.kind(), &json(event)?],
    )?;
    match &event.change {
        Change::UserCreated(user) => run(
            "INSERT INTO users (tailnet, id, name, body) VALUES ($1, $2, $3, $4)",
            &[&tailnet, &number(user.id.0), &user.name, &json(user)?],
        ),
        Change::KeyCreated(key) | Change::KeyUsed(key) => run(
            "INSERT INTO auth_keys (tailnet, id, body) VALUES ($1, $2, $3) \
             ON CONFLICT (tailnet, id) DO UPDATE SET body = excluded.body",
            &[&tailnet, &number(key.id.0), &json(key)?],
        ),
        Change::CodePut(code) => run(
            "INSERT INTO codes (tailnet, id, body) VALUES ($1, $2, $3) \
             ON CONFLICT (tailnet, id) DO UPDATE SET body = excluded.body",
            &[&tailnet, &code.id.0, &json(code)?],
        ),
        Change::CodeRemoved(id) => run("DELETE FROM codes WHERE tailnet = $1 AND id = $2", &[&tailnet, &id.0]),
        Change::LoginPut(login) => run(
            "INSERT INTO logins (tailnet, id, body) VALUES ($1, $2, $3) \
             ON CONFLICT (tailnet, id) DO UPDATE SET body = excluded.body",
            &[&tailnet, &login.id.0, &json(login)?],
        ),
        Change::LoginRemoved(id) => run("DELETE FROM logins WHERE tailnet = $1 AND id = $2", &[&tailnet, &id.0]),
        Change::NodePut { node, .. } => run(
            "INSERT INTO nodes (tailnet, id, machine_key, node_key, address, name, body) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) \
             ON CONFLICT (tailnet, id) DO UPDATE SET node_key = excluded.node_key, name = excluded.name, \
             body = excluded.body",
            &[
                &tailnet,
                &number(node.id.0),
                &node.machine.to_string(),
                &node.node_key.to_string(),
                &node.addresses.v4.to_string(),
                &node.name,
                &json::<Node>(node)?,
            ],
        ),
        Change::NodeRemoved(node) => {
            run("DELETE FROM nodes WHERE tailnet = $1 AND id = $2", &[&tailnet, &number(node.id.0)])
        }
    }
}

fn json<T: Serialize>(record: &T) -> Result<String, StoreError> {
    serde_json::to_string(record).map_err(|error| StoreError::Database(error.to_string()))
}

/// SQL numbers are signed; ours stay far below 2⁶³.
fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
