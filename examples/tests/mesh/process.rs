//! `mesh relay` as a service: what it may do, whose it is, where its sockets come from, what it tells.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::http::request;
use crate::net::{MESH, Running, eventually, free_port, mesh, refusal, text};

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

fn lines(process: &str) -> String {
    fs::read_to_string(format!("/proc/{process}/status")).unwrap()
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name)).expect("the line");
    line[name.len()..].trim()
}

/// The process that listens on a port of 127.0.0.1, as its lock file says.
fn process(state: &Path) -> String {
    let lock = fs::read_to_string(state.join("lock")).unwrap();
    lock.split_whitespace().find(|word| word.bytes().all(|b| b.is_ascii_digit())).expect("a process id").to_owned()
}

#[test]
fn a_relay_runs_in_its_sandbox_and_serves_what_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let (state, address) = (dir.path().join("state"), address());
    let at = address.to_string();
    let arguments = ["relay", "--state-dir", text(&state), "--listen", &at, "--stun", &at];
    let names = ["--bootstrap-dns-names", "localhost"];
    let relay = Running::start(dir.path().join("log"), &[&arguments[..], &names].concat());
    assert!(relay.text().contains("sandbox: no new privileges"), "{}", relay.text());
    let status = lines(&process(&state));
    assert_eq!((field(&status, "NoNewPrivs:"), field(&status, "Seccomp:")), ("1", "2"));
    assert!(request(address, "GET", "/healthz", "").0.contains(" 200 "));
    let (_, metrics) = request(address, "GET", "/metrics", "");
    for name in ["derp_accepts 0", "stun_requests{disposition=\"success\",family=\"ipv4\"} 0", "mesh_listener_underway"]
    {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
    // A name look-up reads files and, with glibc, loads libraries.
    eventually("localhost looked up", || {
        let (_, names) = request(address, "GET", "/bootstrap-dns", "");
        names.contains("127.0.0.1").then_some(()).ok_or(names)
    });
    relay.stop();
}

#[test]
fn a_relay_in_its_sandbox_has_made_its_mesh_key_and_sees_its_allow_list_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (state, address) = (dir.path().join("state"), address());
    let (lists, key) = (dir.path().join("lists"), dir.path().join("mesh.key"));
    fs::create_dir(&lists).unwrap();
    let (list, next) = (lists.join("nodes"), lists.join("next"));
    fs::write(&list, "# nobody yet\n").unwrap();
    let at = address.to_string();
    let arguments =
        ["relay", "--state-dir", text(&state), "--listen", &at, "--verify-url", "http://127.0.0.1:1/verify"];
    let files = ["--allow-list", text(&list), "--mesh-key-file", text(&key)];
    let relay = Running::start(dir.path().join("log"), &[&arguments[..], &files].concat());
    assert!(relay.text().contains("files by landlock"), "{}", relay.text());
    assert_eq!(fs::read_to_string(&key).unwrap().trim().len(), 64);
    // Another file under the same name, as editors and programs that renew something leave it.
    fs::write(&next, format!("nodekey:{}\n", "7".repeat(64))).unwrap();
    fs::rename(&next, &list).unwrap();
    eventually("the list read again", || {
        relay.text().contains("allow-list read again").then_some(()).ok_or_else(|| relay.text())
    });
    relay.stop();
}

#[test]
fn a_relay_started_by_root_becomes_somebody_else_and_keeps_its_state() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can become somebody else");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (state, address) = (dir.path().join("state"), address());
    let at = address.to_string();
    let arguments = ["relay", "--state-dir", text(&state), "--listen", &at];
    // What an earlier run as root has left.
    Running::start(dir.path().join("log"), &arguments).stop();
    assert_eq!(fs::metadata(state.join("relay.key")).unwrap().uid(), 0);
    let key = fs::read(state.join("relay.key")).unwrap();
    for round in ["first", "second"] {
        let relay = Running::start(dir.path().join(round), &[&arguments[..], &["--user", "65533:65532"]].concat());
        let status = lines(&process(&state));
        assert_eq!(field(&status, "Uid:"), "65533\t65533\t65533\t65533");
        assert_eq!((field(&status, "Gid:"), field(&status, "Groups:")), ("65532\t65532\t65532\t65532", "65532"));
        assert_eq!(fs::metadata(state.join("relay.key")).unwrap().uid(), 65533);
        assert!(request(address, "GET", "/healthz", "").0.contains(" 200 "));
        relay.stop();
    }
    assert_eq!(fs::read(state.join("relay.key")).unwrap(), key);
    // A certificate that the user cannot read is found out now and not when it is renewed.
    let (cert, private) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    for file in [&cert, &private] {
        fs::write(file, "").unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let files = ["--tls-cert", text(&cert), "--tls-key", text(&private), "--user", "65533:65532"];
    let said = refusal(&mesh(&[&arguments[..], &files].concat()));
    assert!(said.contains("cert.pem") && said.contains("chgrp"), "{said}");
}

#[test]
fn systemd_is_told_when_a_relay_serves_and_when_it_stops() {
    let dir = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let heard = || {
        let mut buffer = [0; 200];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut command = Command::new(MESH);
    command.args(["relay", "--state-dir", text(&dir.path().join("state")), "--listen", &address().to_string()]);
    command.env("NOTIFY_SOCKET", dir.path().join("notify"));
    let relay = Running::start_command(dir.path().join("log"), command);
    assert_eq!(heard().trim(), "READY=1");
    relay.stop();
    assert_eq!(heard().trim(), "STOPPING=1");
}

#[test]
fn a_relay_serves_on_sockets_that_systemd_passes() {
    if Command::new("systemd-socket-activate").arg("--version").output().is_err() {
        println!("SKIPPED: no systemd-socket-activate on this machine");
        return;
    }
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let log = fs::File::create(dir.path().join("log")).unwrap();
    let mut command = Command::new("systemd-socket-activate");
    command.args(["--listen", &address.to_string(), MESH, "relay", "--state-dir", text(&dir.path().join("state"))]);
    command.stdout(log.try_clone().unwrap()).stderr(log);
    let mut child = command.spawn().unwrap();
    // It is started by the first connection, which it then serves.
    eventually("listening", || std::net::TcpStream::connect(address));
    let (head, _) = request(address, "GET", "/healthz", "");
    drop(child.kill());
    drop(child.wait());
    assert!(head.contains(" 200 "), "{head}\n{}", fs::read_to_string(dir.path().join("log")).unwrap());
}

#[test]
fn a_relay_without_any_socket_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let said = refusal(&mesh(&["relay", "--state-dir", text(dir.path())]));
    assert!(said.contains("--listen") && said.contains("ListenStream="), "{said}");
}
