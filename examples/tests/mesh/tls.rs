//! A coordinator behind `https`, and plain HTTP beside it on the same port.

use std::fs;
use std::time::Duration;

use mesh_derp::driver::client::{Options, RelayClient, RelayEvent};
use mesh_derp::map::{DerpNode, DerpRegion, RegionId};
use mesh_derp::tls::{ClientTls, ServerTls};
use mesh_noise::key::NodePrivate;

use crate::http::request;
use crate::net::{Net, Running, eventually, free_port, text};

#[test]
fn a_generated_certificate_is_trusted_by_who_is_given_it() {
    let net = Net::started(|net| net.scheme = "https");
    let stranger = net.daemon("carl");
    let line = stranger.refusal(&format!("up --login-server {} --auth-key {} --timeout 5s", net.url(), net.key("")));
    assert!(line.contains("certificate") && line.contains("--ca-file"), "{line}");

    let ca = net.path("coordinator").join("tls.pem");
    let with_ca = ["--ca-file", text(&ca)];
    let (a, b) = (net.node_with("anna", &with_ca), net.node_with("bert", &with_ca));
    eventually("both know each other", || if a.run("ping bert").status.success() { Ok(()) } else { Err(a.status()) });
    assert!(b.peer("anna")["online"] == true);

    let (head, body) = request(net.address, "GET", "/key?v=130", "");
    assert!(head.contains(" 200 ") && body.contains("mkey:"), "the port answers plain HTTP too: {head}");
}

#[test]
fn a_given_certificate_is_shown_and_a_wrong_one_refused() {
    // Another coordinator's certificate serves as the given one: certificate and key in one file.
    let other = Net::start();
    let pem = other.path("coordinator").join("tls.pem");
    let net = Net::started(|net| {
        net.scheme = "https";
        net.options = ["--tls-cert", text(&pem), "--tls-key", text(&pem)].map(str::to_owned).to_vec();
    });
    let a = net.node_with("anna", &["--ca-file", text(&pem)]);
    eventually("the relay shows it too", || {
        let status = a.status();
        if status["self"]["relay_connected"] == true { Ok(()) } else { Err(status) }
    });
    assert!(!net.path("coordinator").join("tls.pem").exists(), "a certificate was made all the same");

    let listen = format!("127.0.0.1:{}", free_port());
    let state = net.path("second");
    let arguments = ["coordinator", "--state-dir", text(&state), "--listen", &listen, "--url", "https://127.0.0.1"];
    for (cert, key) in
        [("/nonexistent", text(&pem)), (text(&pem), "/nonexistent"), (text(&net.path("anna.log")), text(&pem))]
    {
        let output = crate::net::mesh(&[&arguments[..], &["--tls-cert", cert, "--tls-key", key]].concat());
        let line = crate::net::refusal(&output);
        assert!(line.contains("certificate"), "{line}");
    }
}

#[tokio::test]
async fn a_certificate_read_again_on_sighup_is_shown_and_a_broken_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let made = |name: &str| ServerTls::load_or_generate(&dir.path().join(name), &["127.0.0.1".to_owned()]).unwrap();
    let pins = [made("one").pin(), made("two").pin()];
    let [one, two, state] = ["one/tls.pem", "two/tls.pem", "relay"].map(|name| dir.path().join(name));
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let arguments = ["relay", "--state-dir", text(&state), "--listen", &listen];
    let files = ["--tls-cert", text(&one), "--tls-key", text(&one)];
    let relay = Running::start(dir.path().join("relay.log"), &[&arguments[..], &files].concat());
    let said = |what: &str| {
        eventually(what, || {
            let log = relay.text();
            if log.contains(what) { Ok(()) } else { Err(log) }
        });
    };
    let connects = async |pin: &str| {
        let id = RegionId::new(901).unwrap();
        let mut region = DerpRegion::new(id, "own", "Own");
        let node = DerpNode::new("901a", id, "127.0.0.1");
        region.nodes.push(DerpNode { ipv4: "127.0.0.1".into(), derp_port: port, cert_name: pin.to_owned(), ..node });
        let key = NodePrivate::generate(&mut rand::make_rng::<rand::rngs::StdRng>());
        let mut client = RelayClient::new(Options::new(region, key, ClientTls::system().unwrap()));
        let event = tokio::time::timeout(Duration::from_secs(20), client.next_event()).await.expect("an event");
        matches!(event, RelayEvent::Connected { .. })
    };
    assert!(connects(&pins[0]).await && !connects(&pins[1]).await);

    fs::write(&one, "no certificate").unwrap();
    relay.signal("HUP");
    said(&format!("the certificate stays as it was: {}: no certificate in it", one.display()));
    assert!(connects(&pins[0]).await);

    fs::write(&one, fs::read(&two).unwrap()).unwrap();
    relay.signal("HUP");
    said("certificate loaded again");
    assert!(connects(&pins[1]).await && !connects(&pins[0]).await);
}
