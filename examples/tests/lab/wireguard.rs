//! Ends of WireGuard tunnels without a mesh: an interface with its keys, its address and its peers.

use std::time::Duration;

use super::{Host, Process, eventually};

/// The program under test.
pub(crate) const MESH_WIREGUARD: &str = env!("CARGO_BIN_EXE_mesh-wireguard");

/// One end, listening on port 51820, with the addresses `10.9.0.NUMBER` and `fd09::NUMBER`.
pub(crate) struct End {
    pub(crate) process: Process,
    pub(crate) host: Host,
    pub(crate) interface: String,
    pub(crate) public: String,
    number: u8,
}

impl End {
    /// Starts `mesh-wireguard` with these environment variables.
    pub(crate) fn ours(host: &Host, number: u8, environment: &[(&str, &str)]) -> Self {
        let interface = interface(number);
        let mut command = host.command(MESH_WIREGUARD);
        command.args([&interface, "--foreground"]).envs(environment.iter().copied());
        let mut process = host.spawn("mesh-wireguard", &mut command);
        process.wait_line("ready", Duration::from_secs(30));
        Self::configure(host, number, interface, process)
    }

    /// Starts Debian's `wireguard-go`.
    pub(crate) fn wireguard_go(host: &Host, number: u8) -> Self {
        let interface = interface(number);
        let mut command = host.command("wireguard-go");
        command.args(["--foreground", &interface]).env("LOG_LEVEL", "verbose");
        let process = host.spawn("wireguard-go", &mut command);
        Self::configure(host, number, interface, process)
    }

    fn configure(host: &Host, number: u8, interface: String, process: Process) -> Self {
        eventually("the control socket", Duration::from_secs(10), || {
            let shown = host.try_sh(&format!("wg show {interface}"));
            if shown.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&shown.stderr).into_owned()) }
        });
        host.sh(&format!(
            "umask 077; wg genkey > private; wg set {interface} private-key private listen-port 51820
             ip addr add 10.9.0.{number}/24 dev {interface}; ip addr add fd09::{number}/64 dev {interface} nodad
             ip link set {interface} up"
        ));
        let public = host.sh("wg pubkey < private").trim().to_owned();
        Self { process, host: host.clone(), interface, public, number }
    }

    /// Adds the other end as a peer; `how` is for `wg set`, an endpoint or a preshared key.
    pub(crate) fn add_peer(&self, peer: &Self, how: &str) {
        let (interface, public, number) = (&self.interface, &peer.public, peer.number);
        let allowed = format!("10.9.0.{number}/32,fd09::{number}/128");
        self.host.sh(&format!("wg set {interface} peer {public} allowed-ips {allowed} {how}"));
    }

    pub(crate) fn remove_peer(&self, peer: &Self) {
        self.host.sh(&format!("wg set {} peer {} remove", self.interface, peer.public));
    }

    /// What `wg show` says of one peer.
    pub(crate) fn show(&self, peer: &Self, what: &str) -> Vec<String> {
        let text = self.host.sh(&format!("wg show {} {what}", self.interface));
        let line = text.lines().find(|line| line.starts_with(&peer.public)).unwrap_or_default();
        line.split_whitespace().skip(1).map(str::to_owned).collect()
    }

    /// Bytes received from a peer, and sent to it.
    pub(crate) fn transfer(&self, peer: &Self) -> (u64, u64) {
        let columns = self.show(peer, "transfer");
        (columns[0].parse().unwrap(), columns[1].parse().unwrap())
    }

    /// When the last handshake with a peer was, in seconds since 1970; 0 for never.
    pub(crate) fn last_handshake(&self, peer: &Self) -> u64 {
        self.show(peer, "latest-handshakes")[0].parse().unwrap()
    }
}

impl Drop for End {
    /// Asked to end, not killed: a killed process leaves its control socket behind, which all namespaces share.
    fn drop(&mut self) {
        self.process.terminate();
    }
}

/// Control sockets live in `/var/run/wireguard`, which all namespaces share: every interface has a name of its own.
fn interface(number: u8) -> String {
    format!("mw{}-{number}", std::process::id())
}
