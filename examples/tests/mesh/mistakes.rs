//! Every way to get it wrong gives one line that says what to do.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::net::{MESH, Net, Running, eventually, free_port, mesh, refusal, text};

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
    let certificate = || fs::read(net.path("coordinator").join("tls.pem")).unwrap();
    let before = certificate();
    let listen = format!("127.0.0.1:{}", free_port());
    let state = net.path("coordinator");
    let line =
        refusal(&mesh(&["coordinator", "--state-dir", text(&state), "--url", "http://x.example", "--listen", &listen]));
    assert!(line.contains("in use") || line.contains("another"), "{line}");
    assert_eq!(certificate(), before, "the first coordinator's pinned certificate was replaced");
}

#[test]
fn a_port_in_use_is_named() {
    let net = Net::start();
    let listen = format!("127.0.0.1:{}", net.address.port());
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
    let second = Command::new(MESH)
        .args(["daemon", "--tun", "userspace", "--state-dir", text(&net.path("anna"))])
        .args(["--socket", text(&net.path("a.sock")), "--port", &net.address.port().to_string()])
        .output()
        .unwrap();
    let line = refusal(&second);
    assert!(line.contains(&net.address.port().to_string()) && line.contains("--port"), "{line}");
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
fn a_mistyped_coordinator_costs_nothing() {
    let net = Net::start();
    let a = net.node("anna");
    let before = a.status();
    for url in ["nonsense", "ftp://127.0.0.1", "http://", "http://127.0.0.1/path"] {
        let line = a.refusal(&format!("up --login-server {url} --timeout 5s"));
        assert!(line.contains("--login-server"), "{line}");
    }
    let after = a.status();
    assert_eq!((&after["state"], &after["self"]["key"]), (&before["state"], &before["self"]["key"]));
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let line = a.refusal(&format!("up --login-server {nowhere} --timeout 2s"));
    assert!(line.contains(&nowhere), "{line}");
    a.ok(&format!("up --login-server {} --timeout 30s", net.url()));
    assert_eq!(a.status()["self"]["key"], before["self"]["key"], "the registration was thrown away");
}

#[test]
fn damaged_state_is_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let listen = format!("127.0.0.1:{}", free_port());
    let socket = dir.path().join("mesh.sock");
    for (of, file) in [
        ("daemon", "machine.key"),
        ("daemon", "node.key"),
        ("daemon", "control.key"),
        ("daemon", "prefs.json"),
        ("coordinator", "control.key"),
        ("coordinator", "relay.key"),
        ("coordinator", "tls.pem"),
        ("coordinator", "coordinator.db"),
    ] {
        let state = dir.path().join(format!("{of}-{file}"));
        fs::create_dir(&state).unwrap();
        fs::write(state.join(file), "garbage").unwrap();
        let output = if of == "daemon" {
            mesh(&["daemon", "--tun", "userspace", "--state-dir", text(&state), "--socket", text(&socket)])
        } else {
            mesh(&["coordinator", "--state-dir", text(&state), "--listen", &listen, "--url", "http://127.0.0.1"])
        };
        let line = refusal(&output);
        assert!(line.contains(file), "{of}: {line}");
        assert_eq!(fs::read_to_string(state.join(file)).unwrap(), "garbage", "{of}: {file} was overwritten");
    }
}

#[test]
fn a_state_directory_that_cannot_be_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let state = dir.path().join("file/state");
    let (socket, listen) = (dir.path().join("mesh.sock"), format!("127.0.0.1:{}", free_port()));
    for arguments in [
        vec!["daemon", "--tun", "userspace", "--state-dir", text(&state), "--socket", text(&socket)],
        vec!["coordinator", "--state-dir", text(&state), "--listen", &listen, "--url", "http://127.0.0.1"],
        vec!["relay", "--state-dir", text(&state), "--listen", &listen],
    ] {
        let line = refusal(&mesh(&arguments));
        assert!(line.contains(text(&state)), "{line}");
    }
}

#[test]
fn without_the_privilege_a_tun_device_is_refused_and_userspace_is_the_default() {
    let dir = tempfile::tempdir().unwrap();
    // The program runs as nobody, who has to be able to read it and to write its state.
    let program = dir.path().join("mesh");
    fs::copy(MESH, &program).unwrap();
    Command::new("chmod").args(["-R", "a+rwX", text(dir.path())]).status().unwrap();
    let as_nobody = |arguments: &[&str]| {
        let mut command = if rustix::process::geteuid().is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", text(&program)]);
            command
        } else {
            Command::new(&program)
        };
        command.args(arguments);
        command
    };
    let (state, socket) = (dir.path().join("state"), dir.path().join("mesh.sock"));
    let arguments = ["daemon", "--state-dir", text(&state), "--socket", text(&socket), "--tun", "mesh-test"];
    let line = refusal(&as_nobody(&arguments).output().unwrap());
    assert!(line.contains("mesh-test") && line.contains("userspace"), "{line}");

    let running = Running::start_command(dir.path().join("log"), as_nobody(&arguments[..5]));
    let status: Value = serde_json::from_slice(&mesh(&["--socket", text(&socket), "status", "--json"]).stdout).unwrap();
    assert_eq!(status["self"]["device"], "userspace");
    running.stop();
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_reason_to_panic() {
    let net = Net::start();
    let a = net.node("anna");
    let mut status = Command::new(MESH)
        .args(["--socket", text(&a.socket), "status", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(status.stdout.take());
    let mut said = String::new();
    status.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    status.wait().unwrap();
    assert_eq!(said, "");
}
