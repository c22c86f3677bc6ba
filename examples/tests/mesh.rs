//! The program as a person uses it: real processes on loopback, no root, and every way to get it wrong.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::missing_panics_doc,
    reason = "tests fail by panicking and read the real clock"
)]

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const MESH: &str = env!("CARGO_BIN_EXE_mesh");

/// A running `mesh …`; ended when dropped.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(log: PathBuf, arguments: &[&str]) -> Self {
        let file = fs::File::create(&log).unwrap();
        let child = Command::new(MESH)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        let mut running = Self { child, log };
        eventually("ready", || {
            if let Some(status) = running.child.try_wait().unwrap() {
                panic!("{arguments:?} ended with {status}:\n{}", running.text());
            }
            running.text().lines().any(|line| line.starts_with("ready")).then_some(()).ok_or_else(|| running.text())
        });
        running
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn stop(mut self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").arg(id).status().unwrap().success());
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
struct Net {
    dir: tempfile::TempDir,
    port: u16,
    coordinator: Option<Running>,
}

impl Net {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Self { dir, port: free_port(), coordinator: None };
        net.start_coordinator();
        net.admin("users create alice");
        net
    }

    fn start_coordinator(&mut self) {
        let (listen, url) = (format!("127.0.0.1:{}", self.port), self.url());
        let state = self.path("coordinator");
        self.coordinator = Some(Running::start(
            self.path("coordinator.log"),
            &["coordinator", "--state-dir", text(&state), "--listen", &listen, "--url", &url, "--stun", &listen],
        ));
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn try_admin(&self, line: &str) -> Output {
        let mut command = Command::new(MESH);
        command.args(["admin", "--state-dir", text(&self.path("coordinator")), "-o", "json"]);
        command.args(line.split_whitespace()).output().unwrap()
    }

    fn admin(&self, line: &str) -> Value {
        let output = self.try_admin(line);
        assert!(output.status.success(), "mesh admin {line}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn key(&self, options: &str) -> String {
        self.admin(&format!("keys create --user alice {options}"))["key"].as_str().expect("a key").to_owned()
    }

    fn daemon(&self, name: &str) -> Daemon {
        let socket = self.path(&format!("{name}.sock"));
        let socks5 = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let http = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let arguments = [
            "daemon",
            "--state-dir",
            text(&self.path(name)),
            "--socket",
            text(&socket),
            "--tun",
            "userspace",
            "--socks5",
            &socks5.to_string(),
            "--http-proxy",
            &http.to_string(),
        ]
        .map(str::to_owned);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let running = Running::start(self.path(&format!("{name}.log")), &arguments);
        Daemon { running, socket, socks5, http }
    }

    /// A daemon that has joined.
    fn node(&self, name: &str) -> Daemon {
        let daemon = self.daemon(name);
        daemon.ok(&format!(
            "up --login-server {} --auth-key {} --hostname {name} --timeout 30s",
            self.url(),
            self.key("")
        ));
        daemon
    }
}

struct Daemon {
    running: Running,
    socket: PathBuf,
    socks5: SocketAddr,
    http: SocketAddr,
}

impl Daemon {
    fn run(&self, line: &str) -> Output {
        Command::new(MESH).arg("--socket").arg(&self.socket).args(line.split_whitespace()).output().unwrap()
    }

    fn ok(&self, line: &str) -> String {
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
    fn refusal(&self, line: &str) -> String {
        refusal(&self.run(line))
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.ok("status --json")).unwrap()
    }

    fn ip(&self) -> String {
        self.ok("ip").lines().next().expect("an address").to_owned()
    }

    fn peer(&self, name: &str) -> Value {
        eventually("the peer is known", || {
            let status = self.status();
            let peers = status["peers"].as_array().cloned().unwrap_or_default();
            peers.into_iter().find(|peer| peer["name"].as_str().is_some_and(|n| n.starts_with(name))).ok_or(status)
        })
    }
}

/// Asserts that a command failed with exactly one line and returns the line.
fn refusal(output: &Output) -> String {
    let line = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert!(!output.status.success(), "it went well: {}", String::from_utf8_lossy(&output.stdout));
    assert!(!line.contains("panicked"), "{line}");
    line
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn eventually<T, E: std::fmt::Debug>(what: &str, mut check: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match check() {
            Ok(value) => return value,
            Err(complaint) => assert!(Instant::now() < deadline, "{what}: not in time: {complaint:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A web server on 127.0.0.1 that answers everything with `body`; returns its port.
fn serve_page(body: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 1024];
            if stream.read(&mut request).is_ok() {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                drop(stream.write_all((head + body).as_bytes()));
            }
        }
    });
    port
}

/// Fetches `http://host:port/` through an HTTP proxy.
fn fetch_through(proxy: SocketAddr, host: &str, port: u16) -> Result<String, String> {
    let attempt = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(proxy)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = attempt().map_err(|error| error.to_string())?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(answer),
    }
}

/// Fetches `http://host:port/` through a SOCKS5 proxy, by name.
fn fetch_by_socks(proxy: SocketAddr, host: &str, port: u16) -> Result<String, String> {
    let attempt = || -> std::io::Result<Result<String, String>> {
        let mut stream = TcpStream::connect(proxy)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(&[5, 1, 0])?;
        let mut method = [0; 2];
        stream.read_exact(&mut method)?;
        let mut request = vec![5, 1, 0, 3, u8::try_from(host.len()).expect("a short name")];
        request.extend_from_slice(host.as_bytes());
        request.extend_from_slice(&port.to_be_bytes());
        stream.write_all(&request)?;
        let mut reply = [0; 10];
        stream.read_exact(&mut reply)?;
        if reply[1] != 0 {
            return Ok(Err(format!("SOCKS5 reply {}", reply[1])));
        }
        write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).ok_or(answer))
    };
    attempt().map_err(|error| error.to_string())?
}

#[test]
fn two_nodes_reach_each_other_by_name_and_address_through_both_proxies() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    let port = serve_page("hello from bert");
    let address = b.ip();
    let full_name = a.peer("bert")["name"].as_str().expect("a name").to_owned();
    eventually("a page by short name", || fetch_through(a.http, "bert", port));
    assert_eq!(fetch_through(a.http, &full_name, port).as_deref(), Ok("hello from bert"));
    assert_eq!(fetch_through(a.http, &address, port).as_deref(), Ok("hello from bert"));
    assert_eq!(fetch_by_socks(a.socks5, "bert", port).as_deref(), Ok("hello from bert"));
    assert_eq!(fetch_by_socks(a.socks5, &full_name, port).as_deref(), Ok("hello from bert"));
    assert!(fetch_by_socks(a.socks5, "nobody", port).is_err());
    assert!(fetch_through(a.http, "bert", free_port()).is_err(), "nothing listens there");

    let pong: Value =
        serde_json::from_str(a.ok("ping bert --until-direct --timeout 20s --json").lines().last().unwrap()).unwrap();
    assert_eq!(pong["via"], "direct");
    let peer = a.peer("bert");
    assert_eq!(peer["path"]["kind"], "direct");
    assert!(peer["rx_bytes"].as_u64() > Some(0) && peer["tx_bytes"].as_u64() > Some(0), "{peer}");
    assert!(peer["last_handshake"].is_u64(), "{peer}");
    assert!(a.status()["version"].is_u64());
    assert!(a.ok("status").contains("bert"));
}

#[test]
fn the_path_can_be_held_to_the_relay_and_let_go_again() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    let port = serve_page("by relay");
    for node in [&a, &b] {
        node.ok("set --path relay");
    }
    eventually("a page over the relay", || fetch_through(a.http, "bert", port));
    let pong: Value = serde_json::from_str(&a.ok("ping bert --json")).unwrap();
    assert_eq!(pong["via"], "relay");
    let before = a.peer("bert")["direct"]["tx_bytes"].as_u64();
    assert_eq!(fetch_through(a.http, "bert", port).as_deref(), Ok("by relay"));
    assert_eq!(a.peer("bert")["direct"]["tx_bytes"].as_u64(), before, "data left by UDP");
    for node in [&a, &b] {
        node.ok("set --path auto");
    }
    a.ok("ping bert --until-direct --timeout 20s");
}

#[test]
fn a_node_is_let_in_by_the_administrator_or_by_a_code_on_the_page() {
    let net = Net::start();
    let daemon = net.daemon("anna");
    let mut up = Command::new(MESH)
        .args(["--socket", text(&daemon.socket), "up", "--login-server", &net.url(), "--hostname", "anna", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(up.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    let printed: Value = serde_json::from_str(&line).unwrap();
    let url = printed["auth_url"].as_str().expect("a URL").to_owned();
    net.admin(&format!("nodes approve {url} --user alice"));
    assert!(up.wait().unwrap().success());

    let daemon = net.daemon("bert");
    let line = daemon.run(&format!("up --login-server {} --hostname bert --timeout 1s --json", net.url()));
    let printed: Value =
        serde_json::from_str(String::from_utf8_lossy(&line.stdout).lines().next().expect("a line")).unwrap();
    let url = printed["auth_url"].as_str().expect("a URL").to_owned();
    let code = net.admin("codes create --user alice")["code"].as_str().expect("a code").to_owned();
    let post = |code: &str| {
        let path = url.strip_prefix(&net.url()).expect("a page of the coordinator");
        let mut stream = TcpStream::connect(("127.0.0.1", net.port)).unwrap();
        let body = format!("code={code}");
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    };
    assert!(!post("000000").contains(" 200 "), "a wrong code was taken");
    assert!(post(&code).contains(" 200 "), "the code was refused");
    daemon.ok("up --timeout 30s");
    assert!(daemon.status()["self"]["name"].as_str().is_some_and(|name| name.starts_with("bert")));
}

#[test]
fn tunnels_outlive_the_coordinator_and_addresses_outlive_everything() {
    let mut net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    let port = serve_page("still here");
    eventually("a page", || fetch_through(a.http, "bert", port));
    a.ok("ping bert --until-direct --timeout 20s");
    let address = b.ip();

    net.coordinator.take().unwrap().stop();
    for _ in 0..5 {
        assert_eq!(fetch_through(a.http, "bert", port).as_deref(), Ok("still here"), "while the coordinator was away");
    }
    net.start_coordinator();
    eventually("both nodes are back", || {
        let connected = [&a, &b].map(|node| node.status()["control_connected"] == true);
        if connected == [true, true] { Ok(()) } else { Err(connected) }
    });
    eventually("the relay is back", || (b.status()["self"]["relay_connected"] == true).then_some(()).ok_or(b.status()));

    b.ok("logout");
    b.ok(&format!("up --login-server {} --auth-key {} --hostname bert --timeout 30s", net.url(), net.key("")));
    assert_eq!(b.ip(), address, "after logout and login");
    net.admin("nodes rename bert zoe");
    assert_eq!(b.ip(), address, "after a rename");
    let b = {
        b.running.stop();
        net.daemon("bert")
    };
    eventually("the node is up again by itself", || {
        let status = b.status();
        if status["state"] == "running" { Ok(()) } else { Err(status) }
    });
    assert_eq!(b.ip(), address, "after a restart of the node");
    eventually("a page", || fetch_through(a.http, &address, port));
}

#[test]
fn down_disconnects_and_up_reconnects_without_a_key() {
    let net = Net::start();
    let a = net.node("anna");
    let address = a.ip();
    a.ok("down");
    assert_eq!(a.status()["state"], "stopped");
    a.ok("up --timeout 30s");
    assert_eq!(a.ip(), address);
}

#[test]
fn auth_keys_that_do_not_open_say_why() {
    let net = Net::start();
    let a = net.daemon("anna");
    let up = |key: &str| {
        a.refusal(&format!("up --login-server {} --auth-key {key} --hostname anna --timeout 10s", net.url()))
    };
    assert!(up("nonsense").contains("auth key"), "unknown");
    let expired = net.key("--expiry 1s");
    std::thread::sleep(Duration::from_millis(2100));
    assert!(up(&expired).contains("expired"), "expired");
    let single = net.key("");
    let b = net.daemon("bert");
    b.ok(&format!("up --login-server {} --auth-key {single} --hostname bert --timeout 30s", net.url()));
    assert!(up(&single).contains("used"), "spent");
}

#[test]
fn a_coordinator_out_of_reach_is_named() {
    let net = Net::start();
    let a = net.daemon("anna");
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let line = a.refusal(&format!("up --login-server {nowhere} --auth-key x --hostname anna --timeout 3s"));
    assert!(line.contains(&nowhere), "{line}");
}

#[test]
fn a_coordinator_with_another_key_is_not_trusted() {
    let mut net = Net::start();
    let a = net.node("anna");
    net.coordinator.take().unwrap().stop();
    fs::rename(net.path("coordinator"), net.path("coordinator.old")).unwrap();
    net.start_coordinator();
    net.admin("users create alice");
    let line = eventually("the refusal", || {
        let status = a.status();
        let health = status["health"].as_array().cloned().unwrap_or_default();
        let lines = health.iter().filter_map(Value::as_str).map(str::to_owned);
        lines.into_iter().find(|line| line.contains("another key")).ok_or(status)
    });
    assert!(line.contains("log out and join again"), "it should say what to do: {line}");
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let net = Net::start();
    let _a = net.daemon("anna");
    let second = Command::new(MESH)
        .args([
            "daemon",
            "--tun",
            "userspace",
            "--state-dir",
            text(&net.path("anna")),
            "--socket",
            text(&net.path("x.sock")),
        ])
        .output()
        .unwrap();
    let line = refusal(&second);
    assert!(line.contains("in use") || line.contains("another"), "{line}");
    let second = Command::new(MESH)
        .args(["coordinator", "--state-dir", text(&net.path("coordinator")), "--url", "http://x", "--listen"])
        .arg(format!("127.0.0.1:{}", free_port()))
        .output()
        .unwrap();
    let line = refusal(&second);
    assert!(line.contains("in use") || line.contains("another"), "{line}");
}

#[test]
fn a_port_in_use_is_named() {
    let net = Net::start();
    let listen = format!("127.0.0.1:{}", net.port);
    let second = Command::new(MESH)
        .args(["coordinator", "--state-dir", text(&net.path("second")), "--url", "http://x", "--listen", &listen])
        .output()
        .unwrap();
    assert!(refusal(&second).contains(&listen));
    let second = Command::new(MESH)
        .args(["daemon", "--tun", "userspace", "--state-dir", text(&net.path("anna"))])
        .args(["--socket", text(&net.path("a.sock")), "--socks5", &listen])
        .output()
        .unwrap();
    assert!(refusal(&second).contains(&listen));
}

#[test]
fn without_a_daemon_the_commands_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    for line in ["status", "up", "down", "ip", "ping x", "netcheck", "logout", "set --path relay"] {
        let output =
            Command::new(MESH).args(["--socket", text(&socket)]).args(line.split_whitespace()).output().unwrap();
        let said = refusal(&output);
        assert!(said.contains("mesh daemon"), "{line}: {said}");
    }
    let admin = Command::new(MESH).args(["admin", "--state-dir", text(dir.path()), "nodes", "list"]).output().unwrap();
    assert!(refusal(&admin).contains("coordinator"));
}

#[test]
fn a_standalone_relay_carries_traffic_and_its_death_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (relay_port, port) = (free_port(), free_port());
    let relay_address = format!("127.0.0.1:{relay_port}");
    let relay_state = dir.path().join("relay");
    let arguments = ["relay", "--state-dir", text(&relay_state), "--listen", &relay_address, "--stun", &relay_address];
    let printed = Command::new(MESH).args(arguments).arg("--print-node").output().unwrap();
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let node: Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert!(node["CertName"].as_str().is_some_and(|name| name.starts_with("sha256-raw:")), "{node}");
    let map = serde_json::json!({ "Regions": { "901": {
        "RegionID": 901, "RegionCode": "own", "RegionName": "Own", "Nodes": [node]
    } } });
    let map_file = dir.path().join("derp.json");
    fs::write(&map_file, map.to_string()).unwrap();
    let mut relay = Running::start(dir.path().join("relay.log"), &arguments);

    let (listen, url, state) =
        (format!("127.0.0.1:{port}"), format!("http://127.0.0.1:{port}"), dir.path().join("coordinator"));
    let coordinator = Running::start(
        dir.path().join("coordinator.log"),
        &[
            "coordinator",
            "--state-dir",
            text(&state),
            "--listen",
            &listen,
            "--url",
            &url,
            "--no-relay",
            "--derp-map",
            text(&map_file),
        ],
    );
    let net = Net { dir, port, coordinator: Some(coordinator) };
    net.admin("users create alice");
    let (a, b) = (net.node("anna"), net.node("bert"));
    for node in [&a, &b] {
        node.ok("set --path relay");
    }
    let page = serve_page("through the relay");
    eventually("a page over the relay", || fetch_through(a.http, "bert", page));

    drop(relay);
    relay = Running::start(
        net.path("relay2.log"),
        &["relay", "--state-dir", text(&relay_state), "--listen", &relay_address, "--stun", &relay_address],
    );
    eventually("a page over the relay that came back", || fetch_through(a.http, "bert", page));
    let netcheck = Command::new(MESH).args(["netcheck", "--json", "--derp-map", text(&map_file)]).output().unwrap();
    assert!(netcheck.status.success(), "{}", String::from_utf8_lossy(&netcheck.stderr));
    let report: Value = serde_json::from_slice(&netcheck.stdout).unwrap();
    assert_eq!(report["udp"], true);
    assert!(report["region_latency_ms"]["901"].as_f64().is_some(), "{report}");
    relay.stop();
}
