//! What a relay's process may still do once it runs: little, so that a fault in it is worth little to an attacker.
//!
//! | layer | what it forbids | from Linux |
//! |---|---|---|
//! | no new privileges | set-user-id programs and the like | 3.5 |
//! | landlock | every file but the state directory, certificates, and what name look-ups read | 5.13 |
//! | seccomp | every system call that a relay does not make: no programs, no other processes, no modules, no mounts | 3.5 |
//!
//! The system calls are a list of what is allowed. Whatever is not on it answers `ENOSYS`, "there is no such call", and
//! does not kill: C libraries try new calls and fall back to old ones when they hear that, so the list need not follow every
//! release of theirs. New threads may be made (`clone` with `CLONE_THREAD`), processes may not; `clone3` hides its flags
//! behind a pointer, so it is one of the calls that "do not exist".
//!
//! Sockets stay: of the kinds that a relay uses (IPv4, IPv6, local, and netlink, which the resolver asks for addresses).
//!
//! All this binds the thread that calls [`enter`] and those that it starts later, so it is called before there are others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::error::Error;

/// The newest kernel interface whose rights are used; older kernels enforce what they know.
const LANDLOCK: ABI = ABI::V5;

/// What is read to look up names, to trust certificates, and to tell how the process does.
const READABLE: [&str; 22] = [
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/run/systemd/resolve",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
    "/lib",
    "/lib64",
    "/proc/self",
    "/dev/urandom",
    "/sys/fs/cgroup",
];

/// What a process needs besides.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// Directories to read and write in. Made if they are missing.
    pub write: Vec<PathBuf>,
    /// Files to read, now and after they have been replaced: so the directories that they are in are readable.
    pub read: Vec<PathBuf>,
}

/// Restricts this process and says in one line how.
///
/// A layer that the kernel does not have is done without.
///
/// # Errors
/// If the process has several threads already, or the kernel refuses what it has.
pub fn enter(needs: &Needs) -> Result<String, Error> {
    crate::privileges::alone()?;
    needs.write.iter().try_for_each(|directory| crate::listen::state_dir(directory))?;
    let no_new_privileges = rustix::thread::set_no_new_privs(true);
    no_new_privileges.map_err(|source| Error::System { what: "giving up new privileges", source: source.into() })?;
    let files = restrict_files(needs)?;
    let calls = restrict_calls()?;
    Ok(format!("no new privileges, {files}, {calls}"))
}

fn restrict_files(needs: &Needs) -> Result<&'static str, Error> {
    let failed = |error: landlock::RulesetError| Error::System {
        what: "restricting files (landlock)",
        source: io_error(&error),
    };
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let known: Vec<PathBuf> =
        READABLE.iter().map(PathBuf::from).chain(homes(&needs.read)).chain(needs.read.clone()).collect();
    // Paths that do not exist are left out.
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rules(path_beneath_rules(known, read)))
        .and_then(|rules| rules.add_rules(path_beneath_rules(&needs.write, AccessFs::from_all(LANDLOCK))))
        .and_then(|rules| rules.add_rules(path_beneath_rules(["/dev/null"], AccessFs::ReadFile | AccessFs::WriteFile)))
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(failed)?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => "files by landlock",
        RulesetStatus::PartiallyEnforced => "files by landlock, as far as this kernel has it",
        RulesetStatus::NotEnforced => "files not restricted (this kernel has no landlock)",
    })
}

/// The directories that files are in, also those that links lead to: a renewed certificate is often another file.
fn homes(files: &[PathBuf]) -> Vec<PathBuf> {
    let parent = |path: &Path| path.parent().filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned);
    let direct = files.iter().map(|file| parent(file).unwrap_or_else(|| PathBuf::from(".")));
    let behind = files.iter().filter_map(|file| file.canonicalize().ok()).filter_map(|file| parent(&file));
    direct.chain(behind).filter(|path| path != Path::new("/") && path != Path::new("/etc")).collect()
}

fn restrict_calls() -> Result<&'static str, Error> {
    let Ok(target) = TargetArch::try_from(std::env::consts::ARCH) else {
        return Ok("system calls not restricted (not on this processor)");
    };
    let failed = |error: String| Error::System {
        what: "restricting system calls (seccomp)",
        source: std::io::Error::other(error),
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls().into_iter().map(|call| (call, Vec::new())).collect();
    let rule = |condition: Result<SeccompCondition, seccompiler::BackendError>| {
        condition.and_then(|condition| SeccompRule::new(vec![condition])).map_err(|error| failed(error.to_string()))
    };
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let sockets = families.iter().map(|family| {
        rule(SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(family.unsigned_abs())))
    });
    rules.insert(libc::SYS_socket, sockets.collect::<Result<_, _>>()?);
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let clone = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(thread), thread);
    rules.insert(libc::SYS_clone, vec![rule(clone)?]);
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let filter = SeccompFilter::new(rules, missing, SeccompAction::Allow, target);
    let program: Result<BpfProgram, _> = filter.and_then(TryInto::try_into);
    seccompiler::apply_filter(&program.map_err(|error| failed(error.to_string()))?)
        .map_err(|error| failed(error.to_string()))?;
    Ok("system calls by seccomp")
}

/// The system calls of a relay: sockets, events, files, memory, threads, time, signals.
fn calls() -> Vec<i64> {
    use libc::*;
    let mut all = vec![
        // Sockets.
        SYS_socketpair,
        SYS_bind,
        SYS_listen,
        SYS_accept,
        SYS_accept4,
        SYS_connect,
        SYS_getsockname,
        SYS_getpeername,
        SYS_getsockopt,
        SYS_setsockopt,
        SYS_sendto,
        SYS_recvfrom,
        SYS_sendmsg,
        SYS_recvmsg,
        SYS_sendmmsg,
        SYS_recvmmsg,
        SYS_shutdown,
        // Events.
        SYS_epoll_create1,
        SYS_epoll_ctl,
        SYS_epoll_pwait,
        SYS_epoll_pwait2,
        SYS_ppoll,
        SYS_pselect6,
        SYS_eventfd2,
        SYS_timerfd_create,
        SYS_timerfd_settime,
        SYS_timerfd_gettime,
        SYS_pipe2,
        SYS_signalfd4,
        SYS_inotify_init1,
        SYS_inotify_add_watch,
        SYS_inotify_rm_watch,
        // Files.
        SYS_read,
        SYS_write,
        SYS_readv,
        SYS_writev,
        SYS_pread64,
        SYS_pwrite64,
        SYS_preadv,
        SYS_pwritev,
        SYS_preadv2,
        SYS_pwritev2,
        SYS_close,
        SYS_close_range,
        SYS_lseek,
        SYS_fstat,
        SYS_newfstatat,
        SYS_statx,
        SYS_statfs,
        SYS_fstatfs,
        SYS_fcntl,
        SYS_ioctl,
        SYS_dup,
        SYS_dup3,
        SYS_openat,
        SYS_getdents64,
        SYS_readlinkat,
        SYS_faccessat,
        SYS_faccessat2,
        SYS_unlinkat,
        SYS_renameat,
        SYS_renameat2,
        SYS_mkdirat,
        SYS_fchmod,
        SYS_fchmodat,
        SYS_ftruncate,
        SYS_fallocate,
        SYS_fsync,
        SYS_fdatasync,
        SYS_flock,
        SYS_umask,
        SYS_getcwd,
        SYS_copy_file_range,
        SYS_sendfile,
        // Memory.
        SYS_mmap,
        SYS_munmap,
        SYS_mprotect,
        SYS_mremap,
        SYS_madvise,
        SYS_brk,
        SYS_membarrier,
        // Threads.
        SYS_set_robust_list,
        SYS_get_robust_list,
        SYS_rseq,
        SYS_futex,
        SYS_futex_waitv,
        SYS_set_tid_address,
        SYS_exit,
        SYS_exit_group,
        SYS_sched_yield,
        SYS_sched_getaffinity,
        SYS_sched_setaffinity,
        SYS_gettid,
        SYS_getpid,
        SYS_getppid,
        SYS_tgkill,
        SYS_prctl,
        // Time.
        SYS_nanosleep,
        SYS_clock_nanosleep,
        SYS_clock_gettime,
        SYS_clock_getres,
        SYS_gettimeofday,
        // Signals.
        SYS_rt_sigaction,
        SYS_rt_sigprocmask,
        SYS_rt_sigreturn,
        SYS_sigaltstack,
        SYS_restart_syscall,
        // What the process asks about itself.
        SYS_getuid,
        SYS_geteuid,
        SYS_getgid,
        SYS_getegid,
        SYS_getresuid,
        SYS_getresgid,
        SYS_uname,
        SYS_sysinfo,
        SYS_getrusage,
        SYS_prlimit64,
        SYS_getrandom,
    ];
    #[cfg(target_arch = "x86_64")]
    all.extend([
        SYS_epoll_wait,
        SYS_epoll_create,
        SYS_poll,
        SYS_select,
        SYS_pipe,
        SYS_open,
        SYS_stat,
        SYS_lstat,
        SYS_access,
        SYS_readlink,
        SYS_unlink,
        SYS_rename,
        SYS_mkdir,
        SYS_rmdir,
        SYS_chmod,
        SYS_dup2,
        SYS_getrlimit,
        SYS_time,
        SYS_arch_prctl,
    ]);
    all
}

fn io_error(error: &(dyn std::error::Error + 'static)) -> std::io::Error {
    std::io::Error::other(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directories_of_a_certificate_and_of_what_it_links_to_stay_readable() {
        let dir = tempfile::tempdir().unwrap();
        let (live, archive) = (dir.path().join("live"), dir.path().join("archive"));
        std::fs::create_dir_all(&live).unwrap();
        std::fs::create_dir_all(&archive).unwrap();
        std::fs::write(archive.join("cert1.pem"), "").unwrap();
        std::os::unix::fs::symlink("../archive/cert1.pem", live.join("cert.pem")).unwrap();
        assert_eq!(homes(&[live.join("cert.pem")]), [live, archive.canonicalize().unwrap()]);
        assert_eq!(homes(&["/etc/cert.pem".into()]), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_test_with_its_threads_is_refused() {
        let error = enter(&Needs::default()).unwrap_err().to_string();
        assert!(error.contains("threads already"), "{error}");
    }
}
