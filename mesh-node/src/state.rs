//! The state directory: keys and preferences that survive a restart.
//!
//! | file | holds | written |
//! |---|---|---|
//! | `lock` | the process that uses the directory, locked with `flock(2)` | at start |
//! | `machine.key` | the machine private key, `privkey:…` | once |
//! | `control.key` | the coordinator's public key, `mkey:…`, from when the node joined | when it joins |
//! | `node.key` | the node private key, `privkey:…` | at every registration with a new key |
//! | `prefs.json` | [`Prefs`] | when a preference changes |
//!
//! The directory is 0700, its files 0600. A write goes to a temporary file, is flushed to the disk, renamed over the old
//! file, and the directory is flushed too: a crash leaves the old content or the new, never a mixture.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mesh_noise::key::{MachinePrivate, MachinePublic, NodePrivate};
use rand_core::CryptoRng;
use rustix::fs::{FlockOperation, flock};
use zeroize::Zeroizing;

use crate::prefs::Prefs;

const LOCK: &str = "lock";
const MACHINE_KEY: &str = "machine.key";
const NODE_KEY: &str = "node.key";
const CONTROL_KEY: &str = "control.key";
const PREFS: &str = "prefs.json";

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another process uses it.
    #[error("state directory {} is in use by {holder}; stop that one first, or choose another directory", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process, as far as it could be found out.
        holder: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why the system refused.
        source: io::Error,
    },
    /// A file holds something else than it should. It is left as it is.
    #[error("{} is damaged ({reason}); restore it, or remove it to start afresh", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never its content.
        reason: String,
    },
}

/// An opened state directory. As long as it lives, no other process opens the same one.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: File,
    _temporary: Option<tempfile::TempDir>,
}

impl StateDir {
    /// Opens `path`, making it if it is missing, and takes its lock.
    ///
    /// # Errors
    /// [`StateError::InUse`] if another process has it; [`StateError::Io`] if the system refuses.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StateError> {
        let path = path.into();
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(io_error("make", &path))?;
        let lock = take_lock(&path)?;
        Ok(Self { path, _lock: lock, _temporary: None })
    }

    /// Makes a directory that is removed again when this value is dropped.
    ///
    /// # Errors
    /// [`StateError::Io`] if the system has no room for temporary files.
    pub fn ephemeral() -> Result<Self, StateError> {
        let temporary =
            tempfile::Builder::new().prefix("mesh-").tempdir().map_err(io_error("make", &std::env::temp_dir()))?;
        let opened = Self::open(temporary.path())?;
        Ok(Self { _temporary: Some(temporary), ..opened })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The machine key, drawn and stored at the first call.
    ///
    /// # Errors
    /// [`StateError::Damaged`] if the file holds no key.
    pub fn machine_key(&self, rng: &mut impl CryptoRng) -> Result<MachinePrivate, StateError> {
        if let Some(key) = self.read_key(MACHINE_KEY)? {
            return Ok(key);
        }
        let key = MachinePrivate::generate(rng);
        self.write(MACHINE_KEY, key.to_secret_text().as_bytes())?;
        Ok(key)
    }

    /// The node key of the last registration, if there was one.
    ///
    /// # Errors
    /// [`StateError::Damaged`] if the file holds no key.
    pub fn node_key(&self) -> Result<Option<NodePrivate>, StateError> {
        self.read_key(NODE_KEY)
    }

    /// Stores the node key that the coordinator has accepted.
    ///
    /// # Errors
    /// [`StateError::Io`]; the old key is then still there.
    pub fn set_node_key(&self, key: &NodePrivate) -> Result<(), StateError> {
        self.write(NODE_KEY, key.to_secret_text().as_bytes())
    }

    /// The key of the coordinator that the node has joined, if it has joined one.
    ///
    /// # Errors
    /// [`StateError::Damaged`] if the file holds no key.
    pub fn control_key(&self) -> Result<Option<MachinePublic>, StateError> {
        self.read_key(CONTROL_KEY)
    }

    /// Stores the coordinator's key: another one is refused from now on.
    ///
    /// # Errors
    /// [`StateError::Io`]; the old key is then still there.
    pub fn set_control_key(&self, key: &MachinePublic) -> Result<(), StateError> {
        self.write(CONTROL_KEY, key.to_string().as_bytes())
    }

    /// Forgets the node key and the coordinator's, so that the next registration starts afresh.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn forget_registration(&self) -> Result<(), StateError> {
        self.remove(NODE_KEY)?;
        self.remove(CONTROL_KEY)
    }

    fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", &path)(error)),
        }
    }

    /// The stored preferences, or the defaults.
    ///
    /// # Errors
    /// [`StateError::Damaged`] if the file is not what [`set_prefs`](Self::set_prefs) writes.
    pub fn prefs(&self) -> Result<Prefs, StateError> {
        let Some(bytes) = self.read(PREFS)? else { return Ok(Prefs::default()) };
        serde_json::from_slice(&bytes)
            .map_err(|error| StateError::Damaged { path: self.path.join(PREFS), reason: error.to_string() })
    }

    /// Stores the preferences.
    ///
    /// # Errors
    /// [`StateError::Io`]; the old ones are then still there.
    pub fn set_prefs(&self, prefs: &Prefs) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(prefs)
            .map_err(|error| StateError::Damaged { path: self.path.join(PREFS), reason: error.to_string() })?;
        self.write(PREFS, &text)
    }

    /// Reads a file of the directory; `None` if there is none.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        let path = self.path.join(name);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        let mode = file.metadata().map_err(io_error("read", &path))?.permissions().mode();
        if mode & 0o077 != 0 {
            tracing::warn!(path = %path.display(), "others could read this file; its mode is now 0600");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(io_error("protect", &path))?;
        }
        let mut bytes = Zeroizing::new(Vec::new());
        file.read_to_end(&mut bytes).map_err(io_error("read", &path))?;
        Ok(Some(bytes))
    }

    /// Replaces a file of the directory as a whole, durably.
    ///
    /// # Errors
    /// [`StateError::Io`]; the old content is then still there.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let target = self.path.join(name);
        let temporary = self.path.join(format!(".{name}.new"));
        let store = || -> io::Result<()> {
            match fs::remove_file(&temporary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &target)?;
            File::open(&self.path)?.sync_all()
        };
        store().map_err(io_error("write", &target))
    }

    fn read_key<K: std::str::FromStr<Err = mesh_noise::key::KeyError>>(
        &self,
        name: &str,
    ) -> Result<Option<K>, StateError> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let damaged = |reason: String| StateError::Damaged { path: self.path.join(name), reason };
        let text = std::str::from_utf8(&bytes).map_err(|error| damaged(error.to_string()))?;
        text.trim().parse().map(Some).map_err(|error: mesh_noise::key::KeyError| damaged(error.to_string()))
    }
}

fn take_lock(directory: &Path) -> Result<File, StateError> {
    let path = directory.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(error) if error == rustix::io::Errno::WOULDBLOCK => {
            let mut holder = String::new();
            let holder = match file.read_to_string(&mut holder) {
                Ok(_) if !holder.trim().is_empty() => format!("process {}", holder.trim()),
                Ok(_) | Err(_) => "another process".to_owned(),
            };
            return Err(StateError::InUse { path: directory.to_owned(), holder });
        }
        Err(error) => return Err(io_error("lock", &path)(error.into())),
    }
    let mut name = || -> io::Result<()> {
        file.set_len(0)?;
        file.write_all(std::process::id().to_string().as_bytes())
    };
    // The number only makes a message friendlier; the lock is what counts.
    if let Err(error) = name() {
        tracing::debug!(%error, "cannot note the process in the lock file");
    }
    Ok(file)
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError + use<> {
    let path = path.to_owned();
    move |source| StateError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn keys_survive_reopening_and_only_their_owner_reads_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let mut rng = StdRng::seed_from_u64(1);
        let node = NodePrivate::generate(&mut rng);
        let machine = {
            let state = StateDir::open(&path).unwrap();
            assert!(state.node_key().unwrap().is_none());
            state.set_node_key(&node).unwrap();
            state.machine_key(&mut rng).unwrap().public()
        };
        let state = StateDir::open(&path).unwrap();
        assert_eq!(state.machine_key(&mut rng).unwrap().public(), machine);
        assert_eq!(state.node_key().unwrap().unwrap().public(), node.public());
        let mode = |name: &str| fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("machine.key"), mode("node.key"), mode(".")), (0o600, 0o600, 0o700));
        let control = MachinePrivate::generate(&mut rng).public();
        state.set_control_key(&control).unwrap();
        assert_eq!(state.control_key().unwrap(), Some(control));
        state.forget_registration().unwrap();
        state.forget_registration().unwrap();
        assert!(state.node_key().unwrap().is_none() && state.control_key().unwrap().is_none());
    }

    #[test]
    fn a_second_process_on_the_same_directory_gets_one_clear_line() {
        let directory = tempfile::tempdir().unwrap();
        let first = StateDir::open(directory.path()).unwrap();
        let error = StateDir::open(directory.path()).unwrap_err();
        let line = error.to_string();
        assert!(matches!(error, StateError::InUse { .. }), "{line}");
        assert!(line.contains(&format!("in use by process {}", std::process::id())), "{line}");
        assert!(!line.contains('\n'));
        drop(first);
        StateDir::open(directory.path()).unwrap();
    }

    #[test]
    fn a_damaged_key_is_reported_without_its_content_and_left_alone() {
        let state = StateDir::ephemeral().unwrap();
        state.write("machine.key", b"privkey:secret").unwrap();
        let error = state.machine_key(&mut StdRng::seed_from_u64(1)).unwrap_err().to_string();
        assert!(error.contains("damaged") && !error.contains("secret"), "{error}");
        assert_eq!(state.read("machine.key").unwrap().unwrap().as_slice(), b"privkey:secret");
    }

    #[test]
    fn readable_files_are_tightened() {
        let state = StateDir::ephemeral().unwrap();
        state.write("prefs.json", b"{}").unwrap();
        let path = state.path().join("prefs.json");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(state.prefs().unwrap(), Prefs::default());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn an_interrupted_write_does_not_block_the_next() {
        let state = StateDir::ephemeral().unwrap();
        fs::write(state.path().join(".prefs.json.new"), b"half").unwrap();
        let prefs = Prefs { hostname: Some("one".into()), ..Prefs::default() };
        state.set_prefs(&prefs).unwrap();
        assert_eq!(state.prefs().unwrap(), prefs);
    }

    #[test]
    fn an_ephemeral_directory_goes_away() {
        let state = StateDir::ephemeral().unwrap();
        let path = state.path().to_owned();
        drop(state);
        assert!(!path.exists());
    }
}
