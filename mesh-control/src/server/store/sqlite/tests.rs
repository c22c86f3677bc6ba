use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc;

use super::*;
use crate::server::record::Moment;
use crate::server::state::{Context, Rules, State};
use crate::server::{Actor, Decision};

const TAILNET: TailnetId = TailnetId(1);

fn context() -> Context {
    Context { now: Moment::from_millis(1_000), by: Actor::Operator { uid: 0 } }
}

/// Seals a decision and waits until the store has it.
fn commit_now<T>(store: &SqliteStore, state: &mut State, decision: Decision<T>) -> T {
    let (events, reply) = state.seal(&context(), decision);
    let (tell, told) = mpsc::channel();
    let batch = Batch { tailnet: TAILNET, events, counters: state.counters() };
    store.append(batch, Box::new(move |outcome| tell.send(outcome.map(drop)).unwrap()));
    told.recv().unwrap().unwrap();
    reply
}

#[test]
fn what_was_acknowledged_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = State::new(TAILNET, Rules::default());
    {
        let store = SqliteStore::open(dir.path()).unwrap();
        assert_eq!(store.load(TAILNET).unwrap(), Records::default());
        let decision = state.create_user(&context(), "alice").unwrap();
        commit_now(&store, &mut state, decision);
    }
    let store = SqliteStore::open(dir.path()).unwrap();
    assert_eq!(State::load(TAILNET, Rules::default(), store.load(TAILNET).unwrap()), state);
    assert_eq!(store.load(TailnetId(2)).unwrap(), Records::default());
}

#[test]
fn files_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(&dir.path().join("new")).unwrap();
    let mut state = State::new(TAILNET, Rules::default());
    let decision = state.create_user(&context(), "alice").unwrap();
    commit_now(&store, &mut state, decision);
    for entry in std::fs::read_dir(dir.path().join("new")).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", entry.path());
    }
}

#[test]
fn a_second_store_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = SqliteStore::open(dir.path()).unwrap();
    let error = SqliteStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Locked(_)), "{error}");
    assert!(error.to_string().contains("another coordinator is running"), "{error}");
}

#[test]
fn a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(SqliteStore::open(dir.path()).unwrap());
    let connection = Connection::open(dir.path().join("coordinator.db")).unwrap();
    connection.execute("INSERT INTO schema_migrations (version) VALUES (99)", []).unwrap();
    drop(connection);
    let error = SqliteStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::NewerSchema { found: 99, known: 1, .. }), "{error}");
}

#[test]
fn a_failed_commit_is_reported_and_stops_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    let mut state = State::new(TAILNET, Rules::default());
    let decision = state.create_user(&context(), "alice").unwrap();
    let (events, _) = state.seal(&context(), decision);
    let batch = Batch { tailnet: TAILNET, events, counters: state.counters() };
    let (tell, told) = mpsc::channel();
    for _ in 0..2 {
        // The same event twice: the second breaks the primary key.
        let tell = tell.clone();
        store.append(batch.clone(), Box::new(move |outcome| tell.send(outcome.is_ok()).unwrap()));
        // Not in one group with the next.
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!((told.recv().unwrap(), told.recv().unwrap()), (true, false));
}
