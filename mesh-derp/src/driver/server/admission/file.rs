//! The nodes of a file may use the relay.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_noise::key::NodePublic;

use super::{Admission, AllowList, Applicant};
use crate::driver::server::RelayServer;

/// How often the file is looked at.
const PERIOD: Duration = Duration::from_secs(2);
/// The longest file that is read: some 800,000 nodes.
const MAX_LEN: u64 = 64 * 1024 * 1024;

/// Why a file is no list of nodes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadAllowList {
    /// It cannot be read.
    #[error("allow-list {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too long.
    #[error("allow-list {}: longer than 64 MiB", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A line is no node key.
    #[error("allow-list {} line {line}: expected nodekey: and 64 hexadecimal digits", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
}

/// Nodes listed in a file: one `nodekey:` a line; what follows `#` is a comment.
///
/// The file is looked at every 2 s while [`AllowListFile::follow`] runs. Nodes that have been removed from it are
/// disconnected. A file that is missing or wrong changes nothing, and says so in the log.
#[derive(Debug)]
pub struct AllowListFile {
    path: PathBuf,
    list: AllowList,
    seen: Mutex<Option<Seen>>,
}

/// What a file looks like from outside.
type Seen = (Option<SystemTime>, u64);

impl AllowListFile {
    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read or a line is no node key.
    pub fn load(path: impl Into<PathBuf>) -> Result<Self, BadAllowList> {
        let file = Self { path: path.into(), list: AllowList::default(), seen: Mutex::new(None) };
        file.reload()?;
        Ok(file)
    }

    /// Reads the file again, whether it seems to have changed or not. Who is connected stays so until
    /// [`AllowListFile::enforce`].
    ///
    /// # Errors
    /// As [`AllowListFile::load`]. The list stays as it was.
    pub fn reload(&self) -> Result<(), BadAllowList> {
        let failed = |source| BadAllowList::File { path: self.path.clone(), source };
        // Looked at before it is read: a change in between is then seen as one next time.
        let seen = look(&self.path).map_err(failed)?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
        if seen.1 > MAX_LEN {
            return Err(BadAllowList::TooLong { path: self.path.clone() });
        }
        let text = std::fs::read_to_string(&self.path).map_err(failed)?;
        self.list.replace(parse(&text).map_err(|line| BadAllowList::Line { path: self.path.clone(), line })?);
        Ok(())
    }

    /// Ends the connections of nodes that are not on the list.
    pub fn enforce(&self, relay: &RelayServer) {
        let nodes = self.list.nodes().clone();
        relay.retain(|node| nodes.contains(node));
    }

    /// Follows changes of the file for as long as the future lives.
    pub async fn follow(&self, relay: &RelayServer) -> Infallible {
        let mut again = false;
        loop {
            tokio::time::sleep(PERIOD).await;
            let before = *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let now = look(&self.path);
            let changed = now.as_ref().ok() != before.as_ref();
            if changed {
                match self.reload() {
                    Ok(()) => tracing::info!(path = %self.path.display(), "allow-list read again"),
                    Err(error) => {
                        // Said once for each change: a file that is gone is none any more.
                        if before.is_some() {
                            tracing::error!(%error, "the allow-list stays as it was");
                        }
                        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                        *seen = now.ok();
                    }
                }
            }
            // Once more after a change: a node may have been let in, but not been there yet, at the first time.
            if changed || again {
                self.enforce(relay);
            }
            again = changed;
        }
    }
}

fn look(path: &Path) -> io::Result<Seen> {
    let metadata = std::fs::metadata(path)?;
    Ok((metadata.modified().ok(), metadata.len()))
}

/// The nodes of a text, or the number of the first line that is wrong.
fn parse(text: &str) -> Result<Vec<NodePublic>, usize> {
    let mut nodes = Vec::new();
    for (number, line) in (1usize..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if !line.is_empty() {
            nodes.push(line.parse().map_err(|_| number)?);
        }
    }
    Ok(nodes)
}

impl Admission for AllowListFile {
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        self.list.admit(applicant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_is_a_key_and_the_rest_are_comments() {
        let key = NodePublic::from_bytes([7; 32]);
        let text = format!("# ours\n\n  {key}  # the printer\r\n{key}\n");
        assert_eq!(parse(&text), Ok(vec![key, key]));
        assert_eq!(parse(&format!("{key}\nnodekey:12\n")), Err(2));
        assert_eq!(parse(""), Ok(vec![]));
    }

    #[test]
    fn a_wrong_file_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("allowed");
        let key = NodePublic::from_bytes([7; 32]);
        assert!(matches!(AllowListFile::load(&path), Err(BadAllowList::File { .. })));
        std::fs::write(&path, key.to_string()).unwrap();
        let file = AllowListFile::load(&path).unwrap();
        std::fs::write(&path, "who?").unwrap();
        let error = file.reload().unwrap_err().to_string();
        assert!(error.ends_with("allowed line 1: expected nodekey: and 64 hexadecimal digits"), "{error}");
        assert!(file.list.contains(&key));
        std::fs::write(&path, "").unwrap();
        file.reload().unwrap();
        assert!(!file.list.contains(&key));
    }

    proptest! {
        #[test]
        fn any_text_is_a_list_or_has_a_wrong_line(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }
    }
}
