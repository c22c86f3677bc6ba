//! Certificates from a public authority. Debian's `pebble` stands in for one, on loopback and with a DNS of its own; it
//! looks where it is told to, at the very port that is under test.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mesh_derp::driver::client::{Options, RelayClient, RelayEvent};
use mesh_derp::map::{DerpNode, DerpRegion, RegionId};
use mesh_derp::tls::{ClientTls, ServerTls};
use mesh_derp::x509;
use mesh_noise::key::NodePrivate;
use serde_json::json;

use crate::net::{Net, Running, eventually, free_port, mesh, refusal, text};

const NAME: &str = "relay.mesh.test";

/// A program that ends with the test.
struct Ended(Child);

impl Ended {
    fn start(log: &Path, command: &mut Command) -> Self {
        let log = fs::File::create(log).unwrap();
        let command = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Self(command.spawn().expect("Debian's package pebble; ./test installs it"))
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// An authority that validates names at one port of this host.
struct Authority {
    dir: PathBuf,
    directory: String,
    management: u16,
    _dns: Ended,
    pebble: Option<Ended>,
}

impl Authority {
    /// Certificates are valid for `lifetime`; names are looked for at `port`, wherever they point.
    fn start(dir: &Path, port: u16, lifetime: Duration) -> Self {
        let dir = dir.join("authority");
        ServerTls::load_or_generate(&dir, &["localhost".to_owned()]).unwrap();
        let [listen, management, dns, dns_management] = [(); 4].map(|()| free_port());
        let pem = dir.join("tls.pem");
        let config = json!({ "pebble": {
            "listenAddress": format!("127.0.0.1:{listen}"),
            "managementListenAddress": format!("127.0.0.1:{management}"),
            "certificate": pem, "privateKey": pem,
            "httpPort": port, "tlsPort": port,
            "certificateValidityPeriod": lifetime.as_secs(),
        } });
        let file = dir.join("pebble.json");
        fs::write(&file, config.to_string()).unwrap();
        let local = |port: u16| format!("127.0.0.1:{port}");
        let mut names = Command::new("pebble-challtestsrv");
        names.args(["-dns01", &local(dns), "-management", &local(dns_management)]);
        names.args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""]);
        let names = Ended::start(&dir.join("dns.log"), &mut names);
        // Without the pauses between its looks; it looks all the same.
        let mut pebble = Command::new("pebble");
        pebble.arg("-config").arg(&file).args(["-dnsserver", &local(dns)]).env("PEBBLE_VA_NOSLEEP", "1");
        let pebble = Ended::start(&dir.join("pebble.log"), &mut pebble);
        for port in [listen, management, dns_management] {
            eventually("the authority answers", || TcpStream::connect(("127.0.0.1", port)));
        }
        let directory = format!("https://localhost:{listen}/dir");
        Self { dir, directory, management, _dns: names, pebble: Some(pebble) }
    }

    fn stop(&mut self) {
        self.pebble = None;
    }

    /// What it signs with, as a file of trusted certificates.
    fn root(&self) -> PathBuf {
        let file = self.dir.join("root.pem");
        let url = format!("https://127.0.0.1:{}/roots/0", self.management);
        let fetched = Command::new("curl").args(["-sk", &url, "-o"]).arg(&file).status();
        assert!(fetched.expect("Debian's package curl; ./test installs it").success());
        file
    }

    fn options(&self) -> Vec<String> {
        let ca = self.dir.join("tls.pem");
        let options = ["--acme-agree-tos", "--acme-directory", &self.directory, "--acme-ca-file", text(&ca)];
        options.map(str::to_owned).to_vec()
    }
}

/// A relay with a certificate for [`NAME`].
struct Relay {
    state: PathBuf,
    address: SocketAddr,
    running: Option<Running>,
}

impl Relay {
    fn new(dir: &Path) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        Self { state: dir.join("relay"), address, running: None }
    }

    fn start(&mut self, authority: &Authority, further: &[&str]) {
        self.running = None;
        let (listen, options) = (self.address.to_string(), authority.options());
        let mut arguments = vec!["relay", "--state-dir", text(&self.state), "--listen", &listen, "--acme", NAME];
        arguments.extend(options.iter().map(String::as_str));
        arguments.extend(further);
        self.running = Some(Running::start(self.state.with_extension("log"), &arguments));
    }

    fn log(&self) -> String {
        self.running.as_ref().expect("a running relay").text()
    }

    fn said(&self, what: &str) {
        eventually(what, || if self.log().contains(what) { Ok(()) } else { Err(self.log()) });
    }

    fn certificate(&self) -> PathBuf {
        self.state.join("acme.pem")
    }

    /// A client that trusts `root` and wants a certificate for [`NAME`].
    fn client(&self, root: &Path) -> RelayClient {
        let id = RegionId::new(901).unwrap();
        let mut region = DerpRegion::new(id, "own", "Own");
        let (ipv4, derp_port) = (self.address.ip().to_string(), self.address.port());
        region.nodes.push(DerpNode { ipv4, derp_port, ..DerpNode::new("901a", id, NAME) });
        let key = NodePrivate::generate(&mut rand::make_rng::<rand::rngs::StdRng>());
        RelayClient::new(Options::new(region, key, ClientTls::with_ca_file(root).unwrap()))
    }

    /// A client that is connected.
    async fn connected(&self, root: &Path) -> RelayClient {
        let mut client = self.client(root);
        let event = tokio::time::timeout(Duration::from_secs(20), client.next_event()).await.expect("an event");
        assert!(matches!(event, RelayEvent::Connected { .. }), "{event:?}\n{}", self.log());
        client
    }
}

#[tokio::test]
#[ignore = "needs Debian's pebble; ./test installs it"]
async fn a_certificate_is_kept_and_shown_while_the_authority_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let mut relay = Relay::new(dir.path());
    let mut authority = Authority::start(dir.path(), relay.address.port(), Duration::from_secs(6 * 24 * 60 * 60));
    relay.start(&authority, &["--acme-challenge", "http-01", "--acme-email", "ops@mesh.test"]);
    relay.said("one of our own making is shown until");
    relay.said("has issued a certificate for relay.mesh.test");
    assert!(relay.log().contains("by http-01"), "{}", relay.log());
    let root = authority.root();
    relay.connected(&root).await;
    for file in ["acme.pem", "acme-account.json"] {
        let mode = fs::metadata(relay.state.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }

    authority.stop();
    relay.start(&authority, &[]);
    relay.connected(&root).await;
    let log = relay.log();
    assert!(!log.contains("asking") && !log.contains("of our own making"), "{log}");

    // One name more has to be asked for; what was issued goes on being shown meanwhile.
    relay.start(&authority, &["--acme", "other.mesh.test"]);
    relay.said("no certificate for relay.mesh.test, other.mesh.test from https://localhost:");
    let log = relay.log();
    assert!(
        log.contains("Connection refused") && log.contains("shown meanwhile: the present one, valid for 5 more days"),
        "{log}"
    );
    relay.connected(&root).await;
}

#[tokio::test]
#[ignore = "needs Debian's pebble; ./test installs it"]
async fn a_certificate_is_renewed_in_time_and_connections_stay() {
    let dir = tempfile::tempdir().unwrap();
    let mut relay = Relay::new(dir.path());
    let lifetime = Duration::from_secs(21);
    let authority = Authority::start(dir.path(), relay.address.port(), lifetime);
    relay.start(&authority, &["--acme-challenge", "tls-alpn-01"]);
    relay.said("has issued a certificate for relay.mesh.test");
    let (issued, root) = (Instant::now(), authority.root());
    let (first, account) = (fs::read(relay.certificate()).unwrap(), relay.state.join("acme-account.json"));
    let made = fs::read(&account).unwrap();
    let mut client = relay.connected(&root).await;

    eventually("the certificate is renewed", || {
        if fs::read(relay.certificate()).unwrap() == first { Err(relay.log()) } else { Ok(()) }
    });
    let after = issued.elapsed();
    assert!(after > lifetime / 2 && after < lifetime, "renewed after {after:?}");
    assert_eq!(fs::read(&account).unwrap(), made, "the same account is used");
    let event =
        tokio::time::timeout(Duration::from_secs_f64((lifetime - after).as_secs_f64() + 1.0), client.next_event());
    assert!(event.await.is_err(), "the connection did not outlive the certificate that it began with");
    relay.connected(&root).await;
    assert!(!relay.log().contains("ERROR"), "{}", relay.log());
}

#[tokio::test]
#[ignore = "needs Debian's pebble; ./test installs it"]
async fn a_challenge_that_does_not_work_gives_way_to_the_other_and_the_authority_is_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut relay, nobody) = (Relay::new(dir.path()), free_port());
    let authority = Authority::start(dir.path(), nobody, Duration::from_secs(60 * 60));
    relay.start(&authority, &[]);
    for challenge in ["tls-alpn-01", "http-01"] {
        relay.said(&format!(
            "no certificate for relay.mesh.test from {} by {challenge}: relay.mesh.test: ",
            authority.directory
        ));
    }
    let log = relay.log();
    assert!(log.contains("connection refused") && log.contains("(urn:ietf:params:acme:error:connection)"), "{log}");

    let state = dir.path().join("mistaken");
    let without = ["relay", "--state-dir", text(&state), "--listen", "127.0.0.1:0", "--acme", NAME];
    let output = mesh(&without);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("--acme-agree-tos"));
    let line =
        refusal(&mesh(&[&without[..], &["--acme-agree-tos", "--acme-directory", "http://localhost/dir"]].concat()));
    assert!(line.contains("not the https:// URL"), "{line}");
}

#[test]
#[ignore = "needs Debian's pebble; ./test installs it"]
fn a_coordinator_with_a_certificate_for_its_address_is_joined_without_a_pin() {
    let mut authority = None;
    let net = Net::started(|net| {
        let started = Authority::start(net.dir.path(), net.address.port(), Duration::from_secs(60 * 60));
        net.scheme = "https";
        net.options = started.options();
        net.options.extend(["--acme".to_owned(), net.address.ip().to_string()]);
        authority = Some(started);
    });
    let authority = authority.expect("an authority");
    let issued = "has issued a certificate for 127.0.0.1";
    eventually(issued, || {
        let log = net.coordinator().text();
        if log.contains(issued) { Ok(()) } else { Err(log) }
    });
    assert!(!net.path("coordinator").join("tls.pem").exists(), "a certificate to pin was made all the same");
    let root = authority.root();
    let a = net.node_with("anna", &["--ca-file", text(&root)]);
    eventually("the relay is trusted by its certificate", || {
        let status = a.status();
        if status["self"]["relay_connected"] == true { Ok(()) } else { Err(status) }
    });
    let pem = fs::read_to_string(net.path("coordinator").join("acme.pem")).unwrap();
    assert!(pem.starts_with(&format!("# {}\n", authority.directory)) && x509::facts(pem.as_bytes()).is_none());
}
