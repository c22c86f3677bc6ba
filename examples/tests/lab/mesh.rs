//! Our own programs in the lab: a coordinator with relay and STUN responder, and nodes on TUN devices.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Host, Process, eventually};

/// The program under test.
pub(crate) const MESH: &str = env!("CARGO_BIN_EXE_mesh");
/// What our programs log; only seen when a test fails.
const LOG: &str = "info,mesh_derp=debug,mesh_control=debug,mesh_node=debug,mesh_nat=debug";

/// A coordinator with relay and STUN on one address, and a user `alice`.
pub(crate) struct Coordinator {
    process: Option<Process>,
    host: Host,
    url: String,
    options: Vec<String>,
}

impl Coordinator {
    /// Starts one on these addresses of `host`, the first of which is its URL. IPv6 addresses stand in brackets; `further`
    /// options go to the program as they are.
    pub(crate) fn start(host: &Host, addresses: &[&str], further: &[&str]) -> Self {
        let url = format!("http://{}:8080", addresses[0]);
        let mut options: Vec<String> = further.iter().map(|&option| option.to_owned()).collect();
        for address in addresses {
            options.extend([
                "--listen".to_owned(),
                format!("{address}:8080"),
                "--stun".to_owned(),
                format!("{address}:3478"),
            ]);
        }
        let mut coordinator = Self { process: None, host: host.clone(), url, options };
        coordinator.start_again();
        coordinator.admin("users create alice");
        coordinator
    }

    /// Where nodes reach it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Kills the process.
    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    /// Starts the process on the state that the last one has left.
    pub(crate) fn start_again(&mut self) {
        let mut command = self.host.command(MESH);
        command.args(["coordinator", "--url", &self.url]).args(&self.options);
        command.arg("--state-dir").arg(self.host.dir().join("state")).env("RUST_LOG", LOG);
        let mut process = self.host.spawn("coordinator", &mut command);
        process.wait_line("ready", Duration::from_secs(10));
        self.process = Some(process);
    }

    /// Runs `mesh admin`.
    pub(crate) fn admin(&self, line: &str) -> Value {
        let state = self.host.dir().join("state");
        let text = self.host.sh(&format!("{MESH} admin --state-dir {} {line} -o json", state.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line}: {error}: {text}"))
    }

    /// A new key for one node of alice's.
    pub(crate) fn auth_key(&self) -> String {
        self.admin("keys create --user alice")["key"].as_str().expect("a key").to_owned()
    }

    /// The command that joins, with a new key.
    pub(crate) fn up(&self, name: &str) -> String {
        format!("up --login-server {} --auth-key {} --hostname {name} --timeout 30s", self.url, self.auth_key())
    }

    /// CPU seconds that the process has taken so far.
    pub(crate) fn cpu(&self) -> f64 {
        self.process.as_ref().map_or(0.0, Process::cpu)
    }

    /// Packets that the relay has handed on since it started.
    pub(crate) fn relayed_packets(&self) -> u64 {
        self.admin("relay")["packets_out"].as_u64().expect("the relay's counter")
    }
}

/// A node of ours on a TUN device.
pub(crate) struct Node {
    daemon: Process,
    pub(crate) host: Host,
}

impl Node {
    /// Starts the daemon; it has not joined a network yet.
    pub(crate) fn start(host: &Host) -> Self {
        Self::start_with(host, &[])
    }

    /// The same with further options.
    pub(crate) fn start_with(host: &Host, options: &[&str]) -> Self {
        let mut command = host.command(MESH);
        command.args(["daemon", "--tun", "mesh0", "--state-dir"]).arg(host.dir().join("state"));
        command.arg("--socket").arg(host.dir().join("mesh.sock")).args(options).env("RUST_LOG", LOG);
        let mut daemon = host.spawn("daemon", &mut command);
        daemon.wait_line("ready", Duration::from_secs(10));
        Self { daemon, host: host.clone() }
    }

    /// Starts the daemon and joins.
    pub(crate) fn join(host: &Host, coordinator: &Coordinator, name: &str) -> Self {
        let node = Self::start(host);
        node.mesh(&coordinator.up(name));
        node
    }

    /// Lets the daemon end as it does when a system shuts down.
    pub(crate) fn stop(mut self) {
        self.daemon.terminate();
        // The next one's first line must not be taken from this one's log.
        std::fs::remove_file(self.host.dir().join("daemon.log")).unwrap();
    }

    /// CPU seconds that the daemon has taken so far.
    pub(crate) fn cpu(&self) -> f64 {
        self.daemon.cpu()
    }

    /// Runs a command of `mesh` against this daemon.
    pub(crate) fn mesh(&self, line: &str) -> String {
        self.host.sh(&format!("{MESH} --socket {} {line}", self.host.dir().join("mesh.sock").display()))
    }

    /// `mesh status`.
    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.mesh("status --json")).unwrap()
    }

    /// This node's addresses, IPv4 first.
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.mesh("ip").split_whitespace().map(str::to_owned).collect()
    }

    /// This node's IPv4 address.
    pub(crate) fn ip(&self) -> String {
        self.addresses().swap_remove(0)
    }

    /// What the status says of the peer whose name begins so.
    pub(crate) fn peer(&self, name: &str) -> Value {
        eventually("the peer is in the status", Duration::from_secs(15), || {
            let status = self.status();
            let peers = status["peers"].as_array().cloned().unwrap_or_default();
            peers.into_iter().find(|peer| peer["name"].as_str().is_some_and(|n| n.starts_with(name))).ok_or(status)
        })
    }

    /// Sends packets to a mesh address until one is answered, and says how long that took.
    pub(crate) fn outage(&self, to: &str) -> Duration {
        let began = Instant::now();
        eventually("packets arrive", Duration::from_secs(60), || {
            let sent = self.host.try_sh(&format!("ping -n -c 1 -W 1 {to}"));
            if sent.status.success() { Ok(()) } else { Err(self.mesh("status")) }
        });
        began.elapsed()
    }

    /// Sends packets until the path to the only peer, which has the address `to`, is of this kind.
    pub(crate) fn wait_path(&self, to: &str, kind: &str) {
        eventually(kind, Duration::from_secs(60), || {
            self.outage(to);
            let path = self.status()["peers"][0]["path"].clone();
            if path["kind"] == kind { Ok(()) } else { Err(path) }
        });
    }
}
