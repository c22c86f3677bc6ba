//! Giving up root, for a process that has what only root could get: ports below 1024.
//!
//! Rust's standard library cannot change a running process's user, and the kernel changes one thread at a time. So this
//! happens before there is a second thread, and refuses to otherwise; threads that are started later are like the first.
//!
//! What the process needs afterwards has to be the new user's: the state directory is handed over here. Certificate files
//! are not touched. They have to be readable for the user, best by a group of theirs, or they could not be read again when
//! they are renewed; [`check_readable`] says so at the start and not three months later.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::{Path, PathBuf};

use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread as calls;

use crate::error::Error;

/// Whom a process can become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    name: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl User {
    /// Finds a user of this host in `/etc/passwd`, with the groups that `/etc/group` has for it. `UID:GID` names one that
    /// stands nowhere.
    ///
    /// # Errors
    /// If there is no such user, or it is root.
    pub fn find(name: &str) -> Result<Self, Error> {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self::find_in(name, &read("/etc/passwd"), &read("/etc/group"))
    }

    fn find_in(name: &str, passwd: &str, group: &str) -> Result<Self, Error> {
        let user = match name.split_once(':').map(|(uid, gid)| (uid.parse(), gid.parse())) {
            Some((Ok(uid), Ok(gid))) => Self { name: name.to_owned(), uid, gid, groups: vec![gid] },
            Some(_) => return Err(Error::Setting(format!("--user {name}: expected a name, or UID:GID"))),
            None => Self::from_files(name, passwd, group).ok_or_else(|| {
                Error::Setting(format!("--user {name}: no such user in /etc/passwd; name one that is"))
            })?,
        };
        // All ones mean "leave it as it is" to the kernel.
        if user.uid == u32::MAX || user.gid == u32::MAX {
            return Err(Error::Setting(format!("--user {name}: no user has such a number")));
        }
        if user.uid == 0 || user.gid == 0 {
            return Err(Error::Setting(format!("--user {name}: that is root; name a user without privileges")));
        }
        Ok(user)
    }

    fn from_files(name: &str, passwd: &str, group: &str) -> Option<Self> {
        let mut fields = passwd
            .lines()
            .map(|line| line.split(':'))
            .find_map(|mut fields| (fields.next() == Some(name)).then_some(fields))?;
        let (_password, uid, gid) = (fields.next()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let mut groups = vec![gid];
        for line in group.lines() {
            let mut fields = line.split(':').skip(2);
            let (Some(Ok(id)), Some(members)) = (fields.next().map(str::parse::<u32>), fields.next()) else { continue };
            if id != gid && members.split(',').any(|member| member == name) {
                groups.push(id);
            }
        }
        Some(Self { name: name.to_owned(), uid, gid, groups })
    }

    /// Hands over a directory and the files in it, as far as they are root's: what somebody else owns is theirs, and links
    /// are left alone.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn take_over(&self, directory: &Path) -> Result<(), Error> {
        let failed = |source| Error::System { what: "handing over the state directory", source };
        crate::listen::state_dir(directory)?;
        let entries = fs::read_dir(directory).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed)?;
        let paths = entries.iter().map(fs::DirEntry::path).chain([directory.to_owned()]);
        for path in paths {
            let about = fs::symlink_metadata(&path).map_err(failed)?;
            let plain = about.is_dir() || (about.is_file() && about.nlink() == 1);
            if about.uid() == 0 && plain {
                lchown(&path, Some(self.uid), Some(self.gid)).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Becomes this user for good.
    ///
    /// # Errors
    /// If the process is not root's, has several threads already, or the system refuses.
    pub fn become_this(&self) -> Result<(), Error> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::Setting(format!(
                "--user {}: only root can become somebody else; start it as root",
                self.name
            )));
        }
        alone()?;
        let failed = |source: rustix::io::Errno| Error::System { what: "changing the user", source: source.into() };
        let groups: Vec<Gid> = self.groups.iter().map(|id| Gid::from_raw(*id)).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        calls::set_thread_groups(&groups).map_err(failed)?;
        calls::set_thread_res_gid(gid, gid, gid).map_err(failed)?;
        calls::set_thread_res_uid(uid, uid, uid).map_err(failed)?;
        if calls::set_thread_uid(Uid::ROOT).is_ok() {
            let source = io::Error::other("the system lets this process become root again");
            return Err(Error::System { what: "changing the user", source });
        }
        Ok(())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Makes sure that this process has one thread.
///
/// # Errors
/// If it has more, or the system does not tell.
pub(crate) fn alone() -> Result<(), Error> {
    let threads = fs::read_dir("/proc/self/task").map(Iterator::count);
    let source = match threads {
        Ok(1) => return Ok(()),
        Ok(more) => io::Error::other(format!("the process has {more} threads already")),
        Err(error) => error,
    };
    Err(Error::System { what: "restricting the whole process", source })
}

/// Makes sure that files can be read by whom the process is now.
///
/// # Errors
/// Names the first that cannot, and what to do.
pub fn check_readable(files: &[PathBuf]) -> Result<(), Error> {
    for file in files {
        if let Err(error) = fs::File::open(file) {
            let (path, parent) = (file.display(), file.parent().unwrap_or(Path::new("/")).display());
            return Err(Error::Setting(format!(
                "cannot read {path} as the relay's user ({error}): let a group of that user read it (chgrp, chmod g+r, and \
                 g+x for {parent}), so that it can be read again when it is renewed"
            )));
        }
    }
    Ok(())
}

/// Lets the process have as many open files as the system allows it: each connection is one.
pub fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, "the limit of open files stays as low as it is");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nmesh:x:994:993::/nonexistent:/usr/sbin/nologin\n";
    const GROUP: &str = "root:x:0:\nssl-cert:x:110:postgres,mesh\nmesh:x:993:\nother:x:5:meshes\nbad:x:y:mesh\n";

    #[test]
    fn a_user_is_found_with_its_groups() {
        let mesh = User { name: "mesh".to_owned(), uid: 994, gid: 993, groups: vec![993, 110] };
        assert_eq!(User::find_in("mesh", PASSWD, GROUP).unwrap(), mesh);
        let numbers = User { name: "7:8".to_owned(), uid: 7, gid: 8, groups: vec![8] };
        assert_eq!(User::find_in("7:8", PASSWD, GROUP).unwrap(), numbers);
    }

    #[test]
    fn root_and_nobody_known_are_refused() {
        for (name, why) in
            [("root", "that is root"), ("0:5", "that is root"), ("x", "no such user"), ("a:b", "UID:GID")]
        {
            let error = User::find_in(name, PASSWD, GROUP).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn unreadable_files_are_named() {
        let error = check_readable(&["/nowhere/key.pem".into()]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/key.pem") && error.contains("chgrp"), "{error}");
    }
}
