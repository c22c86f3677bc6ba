//! What `mesh` keeps on disk, and what it tells of itself.

use std::os::unix::fs::PermissionsExt;

use crate::net::{Net, free_port, mesh};

#[test]
fn secrets_are_private_and_never_printed() {
    let net = Net::start();
    let key = net.key("");
    let a = net.daemon("anna");
    net.join(&a, "anna", &key);
    let mut secrets = vec![key];
    for directory in ["anna", "coordinator"] {
        let path = net.path(directory);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700, "{directory}");
        for entry in std::fs::read_dir(&path).unwrap().flatten() {
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode & 0o077, 0, "{}: {mode:o}", entry.path().display());
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            secrets.extend(text.trim().strip_prefix("privkey:").map(str::to_owned));
        }
    }
    assert!(secrets.len() >= 4, "machine, node, coordinator and relay have keys");
    let printed =
        [a.running.text(), net.coordinator().text(), a.ok("status --json"), net.admin("keys list").to_string()];
    for secret in secrets {
        assert!(!printed.iter().any(|text| text.contains(&secret)), "a secret was printed");
    }
}

#[test]
fn settings_of_the_daemon_show_in_the_status() {
    let net = Net::start();
    let port = free_port().to_string();
    let a = net.node_with("anna", &["--port", &port, "--static-endpoint", "203.0.113.9:4444"]);
    let status = a.status();
    assert_eq!(status["self"]["port"].to_string(), port);
    let endpoints: Vec<_> = status["self"]["endpoints"].as_array().expect("a list").clone();
    assert_eq!(endpoints[0], "203.0.113.9:4444", "{endpoints:?}");
    let listed = net.listed("anna").expect("anna");
    assert!(listed["endpoints"].to_string().contains("203.0.113.9:4444"), "{listed}");
    for key in ["home_region", "endpoints", "addresses"] {
        assert!(!status["self"][key].is_null(), "self.{key}");
    }
    assert_eq!(status["version"], 1);

    a.ok("down");
    assert_eq!(a.status()["state"], "stopped");
    assert!(a.refusal("ping bert").contains("mesh up") || a.refusal("ping bert").contains("no peer"));
    assert!(a.refusal("netcheck --json").contains("mesh up"));
    a.ok("set --path direct");
    assert_eq!(a.status()["self"]["path_mode"], "direct");
}

#[test]
fn the_version_is_told_with_and_without_a_daemon() {
    let expected = format!("mesh {}", env!("CARGO_PKG_VERSION"));
    let alone = mesh(&["--socket", "/nonexistent/mesh.sock", "version"]);
    assert!(alone.status.success());
    assert_eq!(String::from_utf8(alone.stdout).unwrap().trim(), expected);
    let net = Net::start();
    let a = net.daemon("anna");
    let both = a.ok("version");
    assert!(both.starts_with(&expected) && both.contains("daemon"), "{both}");
}
