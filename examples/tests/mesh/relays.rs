//! Relays: on their own, in the map, in and out of reach.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use mesh_derp::driver::client::{Options, RelayClient, RelayEvent};
use mesh_derp::map::DerpMap;
use mesh_derp::tls::ClientTls;
use mesh_noise::key::NodePrivate;
use serde_json::{Value, json};

use crate::http::{fetch_through, serve_page};
use crate::net::{Net, Running, eventually, free_port, mesh, text};

/// A relay of its own and a DERP map that names it.
struct Own {
    state: PathBuf,
    log: PathBuf,
    address: String,
    region: u16,
    node: Value,
    running: Option<Running>,
}

impl Own {
    /// Region `region` under `dir`, not started yet.
    fn new(dir: &std::path::Path, region: u16) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let state = dir.join(format!("relay{region}"));
        let mut own = Self {
            state,
            log: dir.join(format!("relay{region}.log")),
            address,
            region,
            node: Value::Null,
            running: None,
        };
        let printed = mesh(&own.arguments(&["--print-node"]));
        assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
        own.node = serde_json::from_slice(&printed.stdout).unwrap();
        own
    }

    fn arguments<'a>(&'a self, further: &[&'a str]) -> Vec<&'a str> {
        let region: &'static str = match self.region {
            901 => "901",
            902 => "902",
            other => panic!("no test has a region {other}"),
        };
        let mut arguments = vec!["relay", "--state-dir", text(&self.state), "--region-id", region];
        arguments.extend(["--listen", &self.address, "--stun", &self.address]);
        arguments.extend(further);
        arguments
    }

    fn start(&mut self, further: &[&str]) {
        self.running = None;
        self.running = Some(Running::start(self.log.clone(), &self.arguments(further)));
    }

    fn map(&self) -> Value {
        let region = self.region;
        json!({ "Regions": { region.to_string(): {
            "RegionID": region, "RegionCode": "own", "RegionName": "Own", "Nodes": [self.node]
        } } })
    }
}

#[test]
fn a_standalone_relay_carries_traffic_and_its_death_is_survived() {
    let mut relay = None;
    let net = Net::started(|net| {
        let mut own = Own::new(net.dir.path(), 901);
        own.start(&[]);
        let map = net.path("derp.json");
        fs::write(&map, own.map().to_string()).unwrap();
        net.options = ["--no-relay", "--derp-map", text(&map)].map(str::to_owned).to_vec();
        relay = Some(own);
    });
    let mut relay = relay.expect("a relay");
    assert!(relay.node["CertName"].as_str().is_some_and(|name| name.starts_with("sha256-raw:")), "{}", relay.node);
    assert_eq!(relay.node["RegionID"], 901);
    let (a, b) = (net.node("anna"), net.node("bert"));
    for node in [&a, &b] {
        node.ok("set --path relay");
    }
    let page = serve_page("through the relay");
    eventually("a page over the relay", || fetch_through(a.http, "bert", page));
    assert_eq!(a.status()["self"]["home_region"], 901);

    relay.running = None;
    eventually("the loss is told", || {
        let health = a.health();
        if health.iter().any(|line| line.contains("region 901")) { Ok(()) } else { Err(health) }
    });
    relay.start(&[]);
    eventually("a page over the relay that came back", || fetch_through(a.http, "bert", page));

    let netcheck = mesh(&["netcheck", "--json", "--derp-map", text(&net.path("derp.json"))]);
    assert!(netcheck.status.success(), "{}", String::from_utf8_lossy(&netcheck.stderr));
    let report: Value = serde_json::from_slice(&netcheck.stdout).unwrap();
    assert_eq!(report["udp"], true);
    assert!(report["region_latency_ms"]["901"].as_f64().is_some(), "{report}");
    let report: Value = serde_json::from_str(&a.ok("netcheck --json")).unwrap();
    assert_eq!((&report["udp"], &report["preferred_region"]), (&json!(true), &json!(901)));
    relay.running.take().expect("a relay").stop();
}

#[test]
fn a_map_read_again_on_sighup_adds_a_region_to_running_nodes_and_a_broken_one_changes_nothing() {
    let mut extra = 0;
    let net = Net::started(|net| {
        fs::write(net.path("derp.json"), "{}").unwrap();
        extra = free_port();
        let map = net.path("derp.json");
        let stun = format!("127.0.0.1:{extra}");
        net.options = ["--derp-map", text(&map), "--region-id", "7", "--stun", &stun].map(str::to_owned).to_vec();
    });
    let a = net.node("anna");
    let regions = || {
        let report: Value = serde_json::from_str(&a.ok("netcheck --json")).unwrap();
        let measured = report["region_latency_ms"].as_object().cloned().unwrap_or_default();
        measured.keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(regions(), ["7"], "the embedded relay has the region that it was given");

    let mut further = Own::new(net.dir.path(), 902);
    further.start(&[]);
    fs::write(net.path("derp.json"), further.map().to_string()).unwrap();
    net.coordinator().signal("HUP");
    eventually("the new region is measured", || {
        let regions = regions();
        if regions == ["7", "902"] { Ok(()) } else { Err(regions) }
    });

    fs::write(net.path("derp.json"), "{ no map").unwrap();
    net.coordinator().signal("HUP");
    eventually("the broken file is told", || {
        let log = net.coordinator().text();
        if log.contains("stays as it was") { Ok(()) } else { Err(log) }
    });
    assert_eq!(regions(), ["7", "902"]);
}

#[tokio::test]
async fn a_relay_with_a_verifying_url_serves_members_and_nobody_else() {
    let mut relay = None;
    let net = Net::started(|net| {
        let mut own = Own::new(net.dir.path(), 901);
        own.start(&["--verify-url", &format!("http://{}/verify", net.address)]);
        let map = net.path("derp.json");
        fs::write(&map, own.map().to_string()).unwrap();
        net.options = ["--no-relay", "--derp-map", text(&map)].map(str::to_owned).to_vec();
        relay = Some(own);
    });
    let relay = relay.expect("a relay");
    let a = net.node("anna");
    eventually("a member is connected", || {
        let status = a.status();
        if status["self"]["relay_connected"] == true { Ok(()) } else { Err(status) }
    });

    let map: DerpMap = mesh_derp::json::from_str(&relay.map().to_string()).unwrap();
    let region = map.regions.into_values().next().expect("a region");
    let mut rng = rand::make_rng::<rand::rngs::StdRng>();
    let stranger = NodePrivate::generate(&mut rng);
    let mut client = RelayClient::new(Options::new(region, stranger, ClientTls::system().unwrap()));
    for _ in 0..2 {
        let event = tokio::time::timeout(Duration::from_secs(10), client.next_event()).await.expect("an event");
        assert!(matches!(event, RelayEvent::Disconnected { .. }), "a stranger was let in: {event:?}");
    }
}
