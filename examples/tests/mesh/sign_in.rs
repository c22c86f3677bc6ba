//! Getting in, and out again: keys, approval, codes, expiry.

use std::io::BufRead;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::http::request;
use crate::net::{Daemon, MESH, Net, eventually, text};

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
    output.read_line(&mut line).unwrap();
    let printed: Value = serde_json::from_str(&line).unwrap();
    let url = printed["auth_url"].as_str().expect("a URL").to_owned();
    net.admin(&format!("nodes approve {url} --user alice"));
    assert!(up.wait().unwrap().success());

    let daemon = net.daemon("bert");
    let url = asks_to_join(&net, &daemon, "bert");
    let path = url.strip_prefix(&net.url()).expect("a page of the coordinator").to_owned();
    let post = |code: &str| request(net.address, "POST", &path, &format!("code={code}")).0;
    let code = net.admin("codes create --user alice")["code"].as_str().expect("a code").to_owned();
    assert!(!post("000000").contains(" 200 "), "a wrong code was taken");
    assert!(post(&code).contains(" 200 "), "the code was refused");
    daemon.ok("up --timeout 30s");
    assert!(daemon.status()["self"]["name"].as_str().is_some_and(|name| name.starts_with("bert")));
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
fn five_wrong_codes_close_the_page_and_the_node_asks_at_another() {
    let net = Net::start();
    let daemon = net.daemon("anna");
    let url = asks_to_join(&net, &daemon, "anna");
    let path = url.strip_prefix(&net.url()).expect("a page of the coordinator").to_owned();
    let post = |code: &str| request(net.address, "POST", &path, &format!("code={code}"));
    for left in (1..5).rev() {
        let (head, page) = post("WRON-GCOD-E000");
        assert!(head.contains(" 403 ") && page.contains(&format!("Attempts left: {left}.")), "{head}\n{page}");
    }
    assert!(post("WRON-GCOD-E000").1.contains("Too many wrong codes"));
    let code = net.admin("codes create --user alice")["code"].as_str().expect("a code").to_owned();
    assert!(post(&code).0.contains(" 404 "), "a closed request was approved");
    let again = eventually("another URL", || {
        let status = daemon.status();
        let now = status["url"].as_str().filter(|now| *now != url).map(str::to_owned);
        now.ok_or(status)
    });
    let path = again.strip_prefix(&net.url()).expect("a page of the coordinator");
    assert!(request(net.address, "POST", path, &format!("code={code}")).0.contains(" 200 "), "the good code was spent");
    daemon.wait_state("running");
}

#[test]
fn the_page_says_who_asks_and_is_not_fooled_by_what_they_call_themselves() {
    let net = Net::start();
    let daemon = net.daemon("anna");
    let url = asks_to_join(&net, &daemon, "<script>alert(1)</script>&\"'");
    let (head, page) = request(net.address, "GET", url.strip_prefix(&net.url()).expect("a page"), "");
    assert!(head.contains("content-type: text/html") && head.contains("content-security-policy: default-src 'none'"));
    assert!(page.starts_with("<!doctype html>") && !page.contains("<script"), "{page}");
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;"), "{page}");
    let key = daemon.status()["self"]["key"].as_str().expect("a node key").to_owned();
    assert!(page.contains(&key["nodekey:".len()..][..8]), "the page should name the key: {page}");
    let unknown = request(net.address, "GET", "/register/0000000000000000", "").0;
    assert!(unknown.contains(" 404 "), "{unknown}");
}

#[test]
fn a_person_is_shown_url_and_qr_code() {
    let net = Net::start();
    let daemon = net.daemon("anna");
    let output = daemon.run(&format!("up --login-server {} --hostname anna --timeout 1s", net.url()));
    let shown = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(shown.contains(&format!("{}/register/", net.url())), "{shown}");
    assert!(shown.lines().filter(|line| line.contains('█')).count() > 10, "no QR code in {shown}");
    let line = crate::net::refusal(&output);
    assert!(line.contains("nobody has approved this node"), "{line}");
    assert!(daemon.ok("status").contains("waiting for approval at"));
}

/// Has a daemon ask to join, and returns the URL that it prints.
fn asks_to_join(net: &Net, daemon: &Daemon, name: &str) -> String {
    let output = daemon.run(&format!("up --login-server {} --hostname {name} --timeout 1s --json", net.url()));
    let printed = String::from_utf8(output.stdout).unwrap();
    let line: Value = serde_json::from_str(printed.lines().next().expect("a line")).unwrap();
    line["auth_url"].as_str().expect("a URL").to_owned()
}
