//! A coordinator behind `https`, and plain HTTP beside it on the same port.

use crate::http::request;
use crate::net::{Net, eventually, free_port, text};

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
