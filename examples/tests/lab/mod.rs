//! A laboratory of network namespaces for the tests that need real interfaces.
//!
//! Every namespace is made by the test, named after its process, reachable from nowhere else, and deleted by name when
//! the lab is dropped. Processes are ended by their id. Nothing here leads to the host: no link joins a namespace of the
//! lab to one that it did not make.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "what fails in the lab fails the test, and each test binary uses its part of it"
)]

pub(crate) mod go_client;
pub(crate) mod mesh;
pub(crate) mod nat;
pub(crate) mod net;
pub(crate) mod pair;
pub(crate) mod traffic;
pub(crate) mod wireguard;

use std::fmt::Debug;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A set of namespaces with the processes in them and a directory for their files.
#[derive(Debug)]
pub(crate) struct Lab {
    name: String,
    namespaces: Vec<String>,
    dir: tempfile::TempDir,
}

/// One network namespace.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    ns: String,
    dir: PathBuf,
}

/// A process in the lab; killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Lab {
    /// A lab with no hosts yet. `name` must be unique within the test binary and short.
    pub(crate) fn new(name: &str) -> Self {
        assert_eq!(output(Command::new("id").arg("-u")).trim(), "0", "network namespaces need root");
        let dir = tempfile::Builder::new().prefix("mesh-lab-").tempdir().unwrap();
        Self { name: format!("mesh{}-{name}", std::process::id()), namespaces: Vec::new(), dir }
    }

    /// Adds a namespace with its loopback up.
    pub(crate) fn host(&mut self, name: &str) -> Host {
        let ns = format!("{}-{name}", self.name);
        ip(&["netns", "add", &ns]);
        self.namespaces.push(ns.clone());
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let host = Host { ns, dir };
        host.sh("ip link set lo up");
        host
    }

    /// A router: forwards between its links and answers for nothing else.
    pub(crate) fn router(&mut self, name: &str) -> Host {
        let host = self.host(name);
        host.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        host
    }

    /// Joins two hosts by a virtual cable; each end is `(host, interface, address/prefix)`.
    pub(crate) fn link(&self, a: (&Host, &str, &str), b: (&Host, &str, &str)) {
        self.cable((a.0, a.1), (b.0, b.1));
        for (host, interface, address) in [a, b] {
            host.sh(&format!("ip addr add {address} dev {interface} nodad"));
        }
    }

    /// Joins two hosts by a virtual cable without addresses; each end is `(host, interface)`.
    pub(crate) fn cable(&self, a: (&Host, &str), b: (&Host, &str)) {
        ip(&["link", "add", a.1, "netns", &a.0.ns, "type", "veth", "peer", "name", b.1, "netns", &b.0.ns]);
        for (host, interface) in [a, b] {
            host.sh(&format!("ip link set {interface} up"));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for ns in &self.namespaces {
            drop(Command::new("ip").args(["netns", "del", ns]).output());
        }
        if std::thread::panicking() {
            // The files of a failed test tell why; they stay where the system clears them.
            let kept = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap()).keep();
            println!("files of the failed lab: {}", kept.display());
        }
    }
}

impl Host {
    /// A directory of this host's own.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The namespace's name.
    pub(crate) fn ns(&self) -> &str {
        &self.ns
    }

    /// A command that will run in this namespace.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.ns]).arg(program).current_dir(&self.dir);
        command
    }

    /// Runs a shell line and returns what it printed; fails the test if it fails.
    pub(crate) fn sh(&self, line: &str) -> String {
        output(self.command("sh").args(["-ec", line]))
    }

    /// Runs a shell line and returns its whole outcome.
    pub(crate) fn try_sh(&self, line: &str) -> Output {
        self.command("sh").args(["-ec", line]).output().unwrap()
    }

    /// Starts a process whose output goes to a file of the lab.
    pub(crate) fn spawn(&self, name: &str, command: &mut Command) -> Process {
        let log = self.dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        Process { child: command.spawn().unwrap(), name: name.to_owned(), log }
    }
}

impl Process {
    /// What the process has printed so far.
    pub(crate) fn log(&self) -> String {
        let mut text = Vec::new();
        File::open(&self.log).unwrap().read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// CPU seconds that the process has taken so far, to a hundredth.
    pub(crate) fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        // The name, in brackets, may hold anything; user and system time are the 12th and 13th field after it.
        let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
        let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap());
        ticks.sum::<f64>() / 100.0
    }

    /// Waits until a printed line begins with `start`.
    pub(crate) fn wait_line(&mut self, start: &str, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while !self.log().lines().any(|line| line.starts_with(start)) {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{} ended with {status} before printing {start:?}:\n{}", self.name, self.log());
            }
            assert!(Instant::now() < deadline, "{} did not print {start:?} in time:\n{}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks the process to end and waits for it, at most five seconds.
    pub(crate) fn terminate(&mut self) {
        self.end_by("TERM");
    }

    /// The same as with Ctrl-C.
    pub(crate) fn interrupt(&mut self) {
        self.end_by("INT");
    }

    fn end_by(&mut self, signal: &str) {
        drop(Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).output());
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                self.child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            println!("--- {} printed:\n{}", self.name, self.log());
        }
    }
}

/// Runs `check` until it yields a value; fails the test with its last complaint after `timeout`.
pub(crate) fn eventually<T, E: Debug>(what: &str, timeout: Duration, mut check: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + timeout;
    loop {
        match check() {
            Ok(value) => return value,
            Err(complaint) => assert!(Instant::now() < deadline, "{what}: not within {timeout:?}: {complaint:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ip(args: &[&str]) {
    output(Command::new("ip").args(args));
}

/// Runs a command to its end and returns what it printed; fails the test if it fails.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
