//! A coordinator and nodes as processes, in a directory that goes away with them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The program under test.
pub(crate) const MESH: &str = env!("CARGO_BIN_EXE_mesh");

/// A running `mesh …`; ended when dropped.
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts `mesh` with `arguments` and waits for its `ready` line.
    pub(crate) fn start(log: PathBuf, arguments: &[&str]) -> Self {
        let mut command = Command::new(MESH);
        command.args(arguments);
        Self::start_command(log, command)
    }

    /// The same for a command that is not quite `mesh` itself.
    pub(crate) fn start_command(log: PathBuf, mut command: Command) -> Self {
        let file = fs::File::create(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let mut running = Self { child: command.spawn().unwrap(), log };
        eventually("ready", || {
            if let Some(status) = running.child.try_wait().unwrap() {
                panic!("{command:?} ended with {status}:\n{}", running.text());
            }
            running.text().lines().any(|line| line.starts_with("ready")).then_some(()).ok_or_else(|| running.text())
        });
        running
    }

    /// What it has printed.
    pub(crate) fn text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The memory that it holds, in kB.
    pub(crate) fn resident_kb(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line on memory");
        line.split_whitespace().nth(1).expect("a number").parse().unwrap()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// Asks it to end, and wants that to go well.
    pub(crate) fn stop(mut self) {
        self.signal("TERM");
        let status = self.child.wait().unwrap();
        assert!(status.success(), "asked to end, it ended with {status}:\n{}", self.text());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            println!("--- {}:\n{}", self.log.display(), self.text());
        }
    }
}

/// A directory with a coordinator in it.
pub(crate) struct Net {
    // Dropped first, while its log is still there to be shown.
    pub(crate) coordinator: Option<Running>,
    pub(crate) dir: tempfile::TempDir,
    /// Where the coordinator listens.
    pub(crate) address: SocketAddr,
    /// `http` or `https`.
    pub(crate) scheme: &'static str,
    /// What the coordinator is told besides where to listen.
    pub(crate) options: Vec<String>,
}

impl Net {
    /// A running coordinator on 127.0.0.1, with a user called alice.
    pub(crate) fn start() -> Self {
        Self::started(|_| {})
    }

    /// The same with changes.
    pub(crate) fn started(change: impl FnOnce(&mut Self)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), free_port());
        let mut net = Self { dir, address, scheme: "http", options: Vec::new(), coordinator: None };
        change(&mut net);
        net.start_coordinator();
        net.admin("users create alice");
        net
    }

    pub(crate) fn start_coordinator(&mut self) {
        let (listen, url, state) = (self.address.to_string(), self.url(), self.path("coordinator"));
        let mut arguments =
            vec!["coordinator", "--state-dir", text(&state), "--listen", &listen, "--url", &url, "--stun", &listen];
        arguments.extend(self.options.iter().map(String::as_str));
        self.coordinator = Some(Running::start(self.path("coordinator.log"), &arguments));
    }

    pub(crate) fn coordinator(&self) -> &Running {
        self.coordinator.as_ref().expect("a running coordinator")
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `mesh admin` and returns its whole outcome.
    pub(crate) fn try_admin(&self, line: &str) -> Output {
        let mut command = Command::new(MESH);
        command.args(["admin", "--state-dir", text(&self.path("coordinator")), "-o", "json"]);
        command.args(line.split_whitespace()).output().unwrap()
    }

    /// Runs `mesh admin`, which has to go well.
    pub(crate) fn admin(&self, line: &str) -> Value {
        let output = self.try_admin(line);
        assert!(output.status.success(), "mesh admin {line}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// A node as `mesh admin nodes list` has it.
    pub(crate) fn listed(&self, name: &str) -> Option<Value> {
        let nodes = self.admin("nodes list");
        nodes.as_array().expect("a list").iter().find(|node| node["name"] == name).cloned()
    }

    /// A new key for alice.
    pub(crate) fn key(&self, options: &str) -> String {
        self.admin(&format!("keys create --user alice {options}"))["key"].as_str().expect("a key").to_owned()
    }

    /// A daemon that has not joined.
    pub(crate) fn daemon(&self, name: &str) -> Daemon {
        self.daemon_with(name, &[])
    }

    /// The same with further arguments.
    pub(crate) fn daemon_with(&self, name: &str, further: &[&str]) -> Daemon {
        let socket = self.path(&format!("{name}.sock"));
        let proxy = || SocketAddr::new(self.address.ip(), free_port());
        let (socks5, http) = (proxy(), proxy());
        let mut command = Command::new(MESH);
        command
            .args(["daemon", "--no-portmap", "--tun", "userspace", "--state-dir"])
            .arg(self.path(name))
            .arg("--socket")
            .arg(&socket);
        command.args(["--socks5", &socks5.to_string(), "--http-proxy", &http.to_string()]).args(further);
        let running = Running::start_command(self.path(&format!("{name}.log")), command);
        Daemon { running, socket, socks5, http }
    }

    /// Lets a daemon join with a key.
    pub(crate) fn join(&self, daemon: &Daemon, name: &str, key: &str) -> String {
        daemon.ok(&format!("up --login-server {} --auth-key {key} --hostname {name} --timeout 30s", self.url()))
    }

    /// A daemon that has joined.
    pub(crate) fn node(&self, name: &str) -> Daemon {
        self.node_with(name, &[])
    }

    /// The same with further arguments.
    pub(crate) fn node_with(&self, name: &str, further: &[&str]) -> Daemon {
        let daemon = self.daemon_with(name, further);
        self.join(&daemon, name, &self.key(""));
        daemon
    }
}

/// A `mesh daemon` and the commands that talk to it.
pub(crate) struct Daemon {
    pub(crate) running: Running,
    pub(crate) socket: PathBuf,
    pub(crate) socks5: SocketAddr,
    pub(crate) http: SocketAddr,
}

impl Daemon {
    pub(crate) fn run(&self, line: &str) -> Output {
        Command::new(MESH).arg("--socket").arg(&self.socket).args(line.split_whitespace()).output().unwrap()
    }

    /// Runs a command that has to go well, and returns what it printed.
    pub(crate) fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(
            output.status.success(),
            "mesh {line} ended with {}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.running.text()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one line that a refused command prints.
    pub(crate) fn refusal(&self, line: &str) -> String {
        refusal(&self.run(line))
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.ok("status --json")).unwrap()
    }

    /// Waits until `mesh status` says `state`.
    pub(crate) fn wait_state(&self, state: &str) {
        eventually(state, || {
            let status = self.status();
            if status["state"] == state { Ok(()) } else { Err(status) }
        });
    }

    /// The addresses within the mesh: IPv4, then IPv6.
    pub(crate) fn ips(&self) -> Vec<IpAddr> {
        self.ok("ip").lines().map(|line| line.parse().unwrap()).collect()
    }

    pub(crate) fn ip(&self) -> String {
        self.ips()[0].to_string()
    }

    pub(crate) fn peer(&self, name: &str) -> Value {
        eventually("the peer is known", || {
            let status = self.status();
            let peers = status["peers"].as_array().cloned().unwrap_or_default();
            peers.into_iter().find(|peer| peer["name"].as_str().is_some_and(|n| n.starts_with(name))).ok_or(status)
        })
    }

    /// The answers to a `mesh ping … --json`.
    pub(crate) fn pongs(&self, line: &str) -> Vec<Value> {
        self.ok(&format!("ping {line} --json")).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What the daemon warns of.
    pub(crate) fn health(&self) -> Vec<String> {
        let status = self.status();
        let lines = status["health"].as_array().cloned().unwrap_or_default();
        lines.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }
}

/// Asserts that a command failed with exactly one line and returns the line.
pub(crate) fn refusal(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert!(!output.status.success(), "it went well: {}", String::from_utf8_lossy(&output.stdout));
    assert!(!said.contains("panicked"), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("mesh: ")).collect();
    assert_eq!(lines.len(), 1, "not one clear line: {said}");
    lines[0].to_owned()
}

/// Runs `mesh` with `arguments` to its end.
pub(crate) fn mesh(arguments: &[&str]) -> Output {
    Command::new(MESH).args(arguments).output().unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// A port that nobody listens on, by TCP or UDP, in either family.
pub(crate) fn free_port() -> u16 {
    loop {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let both = TcpListener::bind(("::1", port)).is_ok() && std::net::UdpSocket::bind(("::", port)).is_ok();
        if both {
            return port;
        }
    }
}

/// Runs `check` until it yields a value; fails the test with its last complaint after half a minute.
pub(crate) fn eventually<T, E: std::fmt::Debug>(what: &str, mut check: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match check() {
            Ok(value) => return value,
            Err(complaint) => assert!(Instant::now() < deadline, "{what}: not in time: {complaint:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
