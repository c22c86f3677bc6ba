//! What is there when something else goes away: coordinator, relay, node.

use crate::http::{fetch_through, serve_page};
use crate::net::{Net, eventually};

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
