//! What keys, users and nodes are to the administrator, and what the nodes notice of it.

use serde_json::{Value, json};

use crate::http::{fetch_through, serve_page};
use crate::net::{Net, eventually};

#[test]
fn each_kind_of_key_keeps_its_promise() {
    let net = Net::start();
    let reusable = net.key("--reusable --tag tag:web --tag tag:db");
    let (a, b) = (net.daemon("anna"), net.daemon("bert"));
    net.join(&a, "anna", &reusable);
    net.join(&b, "bert", &reusable);
    assert_eq!(a.peer("bert")["owner"], "tag:web");
    assert!(net.admin("nodes list")[0]["tags"] == json!(["tag:web", "tag:db"]));
    assert_eq!(net.listed("anna").expect("anna")["expires"], Value::Null, "a tagged node's key does not expire");

    let ephemeral = net.daemon("carl");
    net.join(&ephemeral, "carl", &net.key("--ephemeral"));
    assert_eq!(net.listed("carl").expect("carl")["ephemeral"], true);
    assert_eq!(a.peer("carl")["owner"], "alice");
    ephemeral.ok("logout");
    assert_eq!(net.listed("carl"), None, "an ephemeral node has logged out and is still there");
    eventually("the peer is gone", || {
        let peers = a.status()["peers"].clone();
        if peers.as_array().is_some_and(|peers| peers.len() == 1) { Ok(()) } else { Err(peers) }
    });

    let lasting = net.node("dora");
    lasting.ok("logout");
    assert!(net.listed("dora").is_some(), "a node that logs out keeps its place");

    let keys = net.admin("keys list");
    let kinds: Vec<_> = keys
        .as_array()
        .expect("a list")
        .iter()
        .map(|key| (key["reusable"] == true, key["ephemeral"] == true, !key["used"].is_null()))
        .collect();
    assert_eq!(kinds, [(true, false, true), (false, true, true), (false, false, true)]);
    assert!(!keys.to_string().contains("mesh-auth-"), "a list of keys shows secrets");
    assert_eq!(net.admin("users list")[0]["name"], "alice");
}

#[test]
fn keys_and_users_that_make_no_sense_are_refused_in_one_line() {
    let net = Net::start();
    for (line, about) in [
        ("users create alice", "alice"),
        ("users create two/words", "user name"),
        ("keys create --user nobody", "nobody"),
        ("keys create --user alice --tag web", "tag:"),
        ("keys create --user alice --expiry 0s", "expiry"),
        ("nodes rename nobody somebody", "nobody"),
        ("nodes expire nobody", "nobody"),
        ("nodes delete nobody", "nobody"),
        ("nodes approve 0123456789abcdef --user alice", "0123456789abcdef"),
        ("codes create --user nobody", "nobody"),
    ] {
        let said = crate::net::refusal(&net.try_admin(line));
        assert!(said.contains(about), "{line}: {said}");
    }
}

#[test]
fn an_expired_node_asks_to_sign_in_and_comes_back_as_it_was() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    let (addresses, port) = (b.ips(), serve_page("back again"));
    eventually("a page", || fetch_through(a.http, "bert", port));

    net.admin("nodes expire bert");
    b.wait_state("needs-login");
    assert!(b.status()["url"].as_str().is_some_and(|url| url.starts_with(&net.url())), "{}", b.status());
    assert!(b.health().iter().any(|line| line.contains("expired")), "{:?}", b.health());
    assert_eq!(net.listed("bert").expect("bert")["expired"], true);
    net.join(&b, "bert", &net.key(""));
    assert_eq!(b.ips(), addresses);
    eventually("a page again", || fetch_through(a.http, "bert", port));
    assert_eq!(net.admin("nodes list").as_array().map(Vec::len), Some(2), "it has come back as another node");

    let key = b.status()["self"]["key"].clone();
    b.ok(&format!("login --auth-key {} --timeout 30s", net.key("")));
    assert_eq!(b.ips(), addresses, "after a login");
    assert_ne!(b.status()["self"]["key"], key, "a login has to bring a new key");
}

#[test]
fn a_deleted_node_is_told_and_forgotten_by_its_peers() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    a.peer("bert");
    net.admin("nodes delete bert");
    assert_eq!(net.listed("bert"), None);
    eventually("the peer is gone", || {
        let peers = a.status()["peers"].clone();
        if peers == json!([]) { Ok(()) } else { Err(peers) }
    });
    b.wait_state("needs-login");
    net.join(&b, "bert", &net.key(""));
    assert!(net.listed("bert").is_some());
}

#[test]
fn a_new_name_reaches_the_node_and_its_peers() {
    let net = Net::start();
    let (a, b) = (net.node("anna"), net.node("bert"));
    net.admin("nodes rename bert zoe");
    assert_eq!(a.peer("zoe")["addresses"][0], b.ip());
    eventually("its own name", || {
        let name = b.status()["self"]["name"].clone();
        if name.as_str().is_some_and(|name| name.starts_with("zoe.")) { Ok(()) } else { Err(name) }
    });
    assert!(!net.try_admin("nodes rename zoe anna").status.success(), "two nodes share a name");
}
