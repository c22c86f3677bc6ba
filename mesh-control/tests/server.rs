//! The coordination server as clients and operators meet it: over its connections and its admin socket.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "server/support.rs"]
mod support;

use std::time::Duration;

use http::StatusCode;
use mesh_control::admin::{Client, CreateKey};
use mesh_control::driver::server::{Config, Coordinator};
use mesh_control::wire::{
    Hostinfo, MapRequest, RegisterAuth, RegisterRequest, RegisterResponse, Timestamp, decode, encode,
};
use mesh_derp::map::{DerpRegion, RegionId};
use mesh_noise::key::{DiscoPublic, NodePublic};
use support::{Machine, Server, golden, node_key};

fn register(machine: &Machine, auth_key: Option<&str>) -> RegisterRequest {
    let hostname = format!("host{}", machine.number);
    RegisterRequest {
        version: mesh_control::version::CapabilityVersion::CURRENT,
        node_key: node_key(machine.number),
        auth: auth_key.map(|key| RegisterAuth { auth_key: key.to_owned() }),
        hostinfo: Some(Box::new(Hostinfo { hostname, os: "linux".into(), ..Hostinfo::default() })),
        ..RegisterRequest::default()
    }
}

fn poll(machine: &Machine) -> MapRequest {
    MapRequest {
        version: mesh_control::version::CapabilityVersion::CURRENT,
        node_key: node_key(machine.number),
        disco_key: DiscoPublic::from_bytes([machine.number; 32]),
        compress: "zstd".into(),
        keep_alive: true,
        stream: true,
        ..MapRequest::default()
    }
}

fn report(machine: &Machine, endpoint: &str) -> MapRequest {
    MapRequest { stream: false, omit_peers: true, endpoints: vec![endpoint.parse().unwrap()], ..poll(machine) }
}

#[tokio::test]
async fn the_key_is_given_in_every_way_that_clients_ask() {
    let server = Server::start().await;
    for request in [
        "GET /key?v=130 HTTP/1.1\r\nHost: 10.0.0.1:8080\r\nConnection: close\r\n\r\n",
        "GET http://10.0.0.1:8080/key?v=130 HTTP/1.1\r\nhost: 10.0.0.1\r\nConnection: close\r\n\r\n",
        "GET /key HTTP/1.0\r\n\r\n",
    ] {
        // Reads to the end, as a client that waits for the server to close.
        let answer = server.raw(request).await;
        assert!(answer.starts_with("HTTP/1.") && answer.contains(" 200 OK"), "{answer}");
        assert!(answer.contains(&format!("\"publicKey\":\"{}\"", server.coordinator.public_key())), "{answer}");
        assert!(answer.contains("\"legacyPublicKey\":\"mkey:000"), "{answer}");
    }
}

#[tokio::test]
async fn bodies_of_real_clients_are_accepted() {
    for (client, registers, reports, stream) in [
        (
            "go-1.90.9",
            vec!["register-authkey", "register-ephemeral", "register-request-tags"],
            vec!["map-update-first", "map-update-services-endpoints-netinfo"],
            vec!["map-stream-first", "map-stream-reconnect"],
        ),
        (
            "go-older",
            vec!["register-authkey-ephemeral"],
            vec!["map-update-services-endpoints-netinfo"],
            vec!["map-stream-first"],
        ),
        (
            "tailscale-rs-0.6.1",
            vec!["register-authkey", "register-ephemeral"],
            vec!["map-update-endpoints", "map-update-endpoints-netinfo"],
            vec!["map-stream-first"],
        ),
        (
            "third-party-rust",
            vec!["register-authkey"],
            vec!["map-update-first", "map-update-endpoints-netinfo"],
            vec!["map-stream-first"],
        ),
    ] {
        let server = Server::start().await;
        let key = server.key(CreateKey { tags: vec!["tag:web".into(), "tag:db".into()], ..Server::reusable() }).await;
        let mut machine = server.machine(1).await;
        for name in registers {
            let body = golden(client, name).replace("tskey-auth-test", &key);
            let (status, answer) = machine.post("/machine/register", body.into()).await;
            assert_eq!(status, StatusCode::OK, "{client}/{name}");
            let answer: RegisterResponse = decode(&answer).unwrap();
            assert!(answer.machine_authorized && answer.error.is_empty(), "{client}/{name}: {answer:?}");
            assert!(answer.auth_url.is_empty() && !answer.node_key_expired);
            assert!(answer.user.id.0 > 0 && !answer.login.login_name.is_empty() && !answer.login.provider.is_empty());
        }
        // Each map request as of the node whose key is registered now.
        let current = server.admin().nodes().await.unwrap()[0].node_key.clone();
        let as_current = |name: &str| {
            let text = golden(client, name);
            let key = decode::<MapRequest>(text.as_bytes()).unwrap().node_key;
            text.replace(&key.to_string(), &current)
        };
        for name in reports {
            let (status, answer) = machine.post("/machine/map", as_current(name).into()).await;
            assert_eq!((status, answer.len()), (StatusCode::OK, 0), "{client}/{name}");
        }
        let node = &server.admin().nodes().await.unwrap()[0];
        assert_eq!(node.endpoints.len(), 1, "{client}: link-local endpoints are left out");
        assert_eq!(node.home_region, Some(900), "{client}");
        for name in stream {
            let body = as_current(name);
            let zstd = body.contains("\"zstd\"");
            assert_eq!(zstd, client.starts_with("go"));
            let mut maps = machine.stream(body.into(), zstd).await;
            let map = maps.next().await.unwrap();
            assert_eq!(map.node.unwrap().key.to_string(), current, "{client}/{name}");
        }
    }
}

#[tokio::test]
async fn a_real_logout_deletes_an_ephemeral_node() {
    let server = Server::start().await;
    let key = server.key(Server::reusable()).await;
    let mut machine = server.machine(1).await;
    for (name, nodes) in [("register-ephemeral", 1), ("register-logout-of-ephemeral", 0)] {
        let body = golden("go-1.90.9", name).replace("tskey-auth-test", &key);
        let (_, answer) = machine.post("/machine/register", body.into()).await;
        let answer: RegisterResponse = decode(&answer).unwrap();
        assert_eq!(answer.node_key_expired, nodes == 0);
        assert_eq!(server.admin().nodes().await.unwrap().len(), nodes);
    }
}

#[tokio::test]
async fn a_bad_auth_key_is_refused_in_words() {
    let server = Server::start().await;
    let spent = server.key(CreateKey { user: "alice".into(), ..CreateKey::default() }).await;
    server.machine(9).await.join(&spent).await;
    let short = server.key(CreateKey { expiry_seconds: Some(1), ..Server::reusable() }).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let mut machine = server.machine(1).await;
    for (key, words) in [("tskey-auth-test", "not known"), (&spent, "already been used"), (&short, "has expired")] {
        let answer = machine.register(&register(&machine, Some(key))).await;
        assert!(answer.error.contains(words), "{}", answer.error);
        assert!(!answer.machine_authorized && answer.auth_url.is_empty());
    }
    assert_eq!(server.admin().nodes().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_client_that_is_too_old_is_refused_by_status() {
    let server = Server::start().await;
    let mut machine = server.machine(1).await;
    let mut request = register(&machine, None);
    request.version.0 = 100;
    let (status, text) = machine.post("/machine/register", encode(&request).into()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(String::from_utf8_lossy(&text).contains("too old"));
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let server = Server::start().await;
    let key = server.key(CreateKey { user: "alice".into(), ..CreateKey::default() }).await;
    let mut machine = server.machine(1).await;
    machine.join(&key).await;
    machine.post("/machine/map", encode(&report(&machine, "10.0.0.1:41641")).into()).await;
    let (control, nodes) = (server.coordinator.public_key(), server.admin().nodes().await.unwrap());
    let pending = machine.register(&RegisterRequest { node_key: node_key(77), ..register(&machine, None) }).await;
    drop(machine);

    let server = server.restart().await;
    assert_eq!(server.coordinator.public_key(), control);
    assert_eq!(server.admin().nodes().await.unwrap(), nodes);
    assert!(pending.auth_url.ends_with(&server.admin().logins().await.unwrap()[0].id));
    // A running client does not register again: it just polls.
    let mut machine = server.machine(1).await;
    let map = machine.stream(encode(&poll(&machine)).into(), true).await.next().await.unwrap();
    assert_eq!(map.node.unwrap().addresses[0].to_string(), "100.64.0.1/32");
    // One that restarted as well shows its spent key, and is in.
    let answer = machine.register(&register(&machine, Some(&key))).await;
    assert!(answer.machine_authorized, "{answer:?}");
    // The next machine gets the next address.
    let key = server.key(Server::reusable()).await;
    server.machine(2).await.join(&key).await;
    let addresses: Vec<_> = server.admin().nodes().await.unwrap().iter().map(|node| node.addresses[0]).collect();
    assert_eq!(addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), ["100.64.0.1", "100.64.0.2"]);
}

#[tokio::test]
async fn logout_and_login_keep_the_addresses() {
    let server = Server::start().await;
    let key = server.key(Server::reusable()).await;
    let mut machine = server.machine(1).await;
    machine.join(&key).await;
    let before = server.admin().nodes().await.unwrap();
    let mut maps = machine.stream(encode(&poll(&machine)).into(), true).await;
    maps.next().await.unwrap();

    let answer =
        machine.register(&RegisterRequest { expiry: Timestamp::LOGOUT, ..register(&machine, Some(&key)) }).await;
    assert!(answer.node_key_expired && !answer.machine_authorized);
    assert!(maps.next().await.unwrap().node.unwrap().expired);
    assert!(server.admin().nodes().await.unwrap()[0].expired);

    server.machine(2).await.join(&key).await;
    let again = RegisterRequest { node_key: node_key(99), ..register(&machine, Some(&key)) };
    assert!(machine.register(&again).await.machine_authorized);
    let after = server.admin().nodes().await.unwrap();
    assert_eq!((after[0].id, &after[0].addresses), (before[0].id, &before[0].addresses));
    assert!(!after[0].expired);
    assert_eq!(maps.next().await, None, "the stream of the dead key ends");
}

#[tokio::test]
async fn peers_hear_of_each_other_as_things_happen() {
    let server = Server::start_with(|config| config.offline_grace = Duration::from_millis(200)).await;
    let key = server.key(Server::reusable()).await;
    let mut first = server.machine(1).await;
    first.join(&key).await;
    let mut maps = first.stream(encode(&poll(&first)).into(), true).await;
    assert!(maps.next().await.unwrap().peers.is_empty());

    let mut second = server.machine(2).await;
    second.join(&key).await;
    let joined = maps.next().await.unwrap();
    let peer = joined.peers_changed[0].clone();
    assert_eq!((peer.name.as_str(), peer.online), ("host2.tailnet.mesh.internal.", Some(false)));

    let mut theirs = second.stream(encode(&poll(&second)).into(), true).await;
    assert_eq!(theirs.next().await.unwrap().peers[0].online, Some(true));
    // The disco key came with the poll, then the node came online: one or two messages.
    let online = maps.until(|map| map.peers_changed_patch.iter().any(|patch| patch.online == Some(true))).await;
    assert_eq!(online.peers_changed_patch[0].node_id, peer.id);

    second.post("/machine/map", encode(&report(&second, "10.0.0.2:41641")).into()).await;
    let moved = maps.until(|map| map.peers_changed_patch.iter().any(|patch| patch.endpoints.is_some())).await;
    assert_eq!(moved.peers_changed_patch[0].endpoints.as_deref().unwrap()[0].to_string(), "10.0.0.2:41641");

    // A new poll replaces the old one, and nobody notices.
    let mut newer = second.stream(encode(&poll(&second)).into(), true).await;
    newer.next().await.unwrap();
    assert_eq!(theirs.next().await, None);
    drop(newer);
    let gone = maps.next().await.unwrap();
    let patch = &gone.peers_changed_patch[0];
    assert!(patch.online == Some(false) && patch.last_seen.is_some(), "{gone:?}");

    server.admin().rename_node("host2", "front").await.unwrap();
    assert_eq!(maps.next().await.unwrap().peers_changed[0].name, "front.tailnet.mesh.internal.");
    server.admin().delete_node("front").await.unwrap();
    assert_eq!(maps.next().await.unwrap().peers_removed, [peer.id]);

    let region = RegionId::new(901).unwrap();
    let mut derp_map = server.coordinator.derp_map();
    derp_map.regions.insert(region, DerpRegion::new(region, "x", "X"));
    server.coordinator.set_derp_map(derp_map.clone());
    assert_eq!(maps.next().await.unwrap().derp_map, Some(derp_map));

    server.admin().expire_node("host1").await.unwrap();
    let node = maps.next().await.unwrap().node.unwrap();
    assert!(node.expired && !node.key_expiry.is_zero());
    server.admin().delete_node("host1").await.unwrap();
    assert!(maps.next().await.unwrap().node.unwrap().expired);
    assert_eq!(maps.next().await, None);
    let (status, _) = first.post("/machine/map", encode(&report(&first, "10.0.0.1:1")).into()).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn an_idle_stream_is_kept_alive() {
    let server = Server::start_with(|config| config.keep_alive = Duration::from_millis(100)).await;
    let key = server.key(Server::reusable()).await;
    let mut machine = server.machine(1).await;
    machine.join(&key).await;
    for compress in ["zstd", ""] {
        let request = MapRequest { compress: compress.into(), ..poll(&machine) };
        let mut maps = machine.stream(encode(&request).into(), compress == "zstd").await;
        assert!(maps.next().await.unwrap().node.is_some());
        assert_eq!(maps.next().await.unwrap(), mesh_control::wire::MapResponse::keep_alive());
    }
}

#[tokio::test]
async fn one_shot_requests_are_answered_once() {
    let server = Server::start().await;
    let key = server.key(Server::reusable()).await;
    server.machine(2).await.join(&key).await;
    let mut machine = server.machine(1).await;
    machine.join(&key).await;
    for (omit_peers, read_only, peers) in [(false, false, 1), (false, true, 1), (true, true, 0)] {
        let request = MapRequest { stream: false, omit_peers, read_only, ..poll(&machine) };
        let mut maps = machine.stream(encode(&request).into(), true).await;
        let map = maps.next().await.unwrap();
        assert!(map.node.is_some());
        assert_eq!(map.peers.len(), peers);
        assert_eq!(maps.next().await, None);
    }
}

#[tokio::test]
async fn a_machine_gets_nothing_for_another_ones_key() {
    let server = Server::start().await;
    let key = server.key(Server::reusable()).await;
    let mut machine = server.machine(1).await;
    machine.join(&key).await;
    let mut thief = server.machine(2).await;
    for request in [poll(&machine), report(&machine, "10.9.9.9:9")] {
        let (status, _) = thief.post("/machine/map", encode(&request).into()).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
    }
    let answer = thief.register(&register(&machine, Some(&key))).await;
    assert!(answer.error.contains("another node"), "{}", answer.error);
    assert!(server.admin().nodes().await.unwrap()[0].endpoints.is_empty());
}

#[tokio::test]
async fn malformed_requests_get_a_4xx_and_the_server_lives() {
    let server = Server::start().await;
    let mut machine = server.machine(1).await;
    let big = vec![b' '; (1 << 20) + 1];
    for path in ["/machine/register", "/machine/map"] {
        for body in [&b""[..], b"{", b"[]", b"null", b"{\"NodeKey\":5}", b"{\"Version\":\"x\"}", b"\xff\xfe", &big] {
            let (status, _) = machine.post(path, body.to_vec().into()).await;
            assert!(status.is_client_error(), "{path} {status}");
        }
    }
    for path in ["/machine/nothing", "/", "/machine/tka/init/begin", "/machine/set-dns"] {
        let (status, _) = machine.post(path, "{}".into()).await;
        assert!(matches!(status, StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED), "{path} {status}");
    }
    let (status, _) = machine.post("/machine/update-health", golden("go-older", "update-health").into()).await;
    assert_eq!(status, StatusCode::OK);

    let nothing = format!("{}=", "A".repeat(135));
    for (request, expected) in [
        ("POST /ts2021 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400"),
        ("POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n".to_owned(), "400"),
        (
            "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\
             X-Tailscale-Handshake: ???\r\n\r\n"
                .to_owned(),
            "400",
        ),
        (
            // 101 bytes that are no initiation: upgraded, then closed without another word.
            format!(
                "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n\
                 X-Tailscale-Handshake: {nothing}\r\n\r\n"
            ),
            "101 Switching Protocols",
        ),
        ("GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(), "404"),
        ("GET /register/%3Cscript%3E HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_owned(), "404"),
        ("\0\0\0\0\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = server.raw(&request).await;
        assert!(answer.contains(expected), "{request:?}: {answer:?}");
    }
    assert_eq!(server.admin().nodes().await.unwrap(), []);
}

#[tokio::test]
async fn a_printed_url_is_approved_on_its_page() {
    let server = Server::start().await;
    let mut machine = server.machine(1).await;
    let mut request = register(&machine, None);
    request.hostinfo.as_mut().unwrap().hostname = "<b>web</b>".into();
    let asked = machine.register(&request).await;
    assert!(!asked.machine_authorized && asked.error.is_empty());
    let path = asked.auth_url.strip_prefix(server.coordinator.url()).unwrap().to_owned();
    request.followup = asked.auth_url.clone();
    let held = {
        let mut second = server.machine(1).await;
        let request = request.clone();
        tokio::spawn(async move { second.register(&request).await })
    };

    let page = server.raw(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
    assert!(page.contains("200 OK") && page.contains("&lt;b&gt;web&lt;/b&gt;") && !page.contains("<b>web"), "{page}");
    assert!(page.contains("linux") && page.contains(&node_key(1).short()) && page.contains("192.0.2.7"), "{page}");
    assert!(page.to_ascii_lowercase().contains("content-security-policy: default-src 'none'"), "{page}");
    assert!(!page.contains("<script"));

    let post = |code: String| {
        let body = format!("code={code}&user=");
        format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\n\r\n{body}",
            body.len()
        )
    };
    let refused = server.raw(&post("AAAA-BBBB-CCCC".into())).await;
    assert!(refused.contains("403 ") && refused.contains("Attempts left: 4"), "{refused}");
    assert!(!held.is_finished());
    let code = server.admin().create_code(None).await.unwrap().code;
    let approved = server.raw(&post(code.clone())).await;
    assert!(approved.contains("200 OK") && approved.contains("Approved"), "{approved}");
    let answer = tokio::time::timeout(Duration::from_secs(5), held).await.unwrap().unwrap();
    assert!(answer.machine_authorized, "{answer:?}");
    assert_eq!(answer.login.login_name, "alice");
    assert_eq!(server.admin().nodes().await.unwrap()[0].name, "bwebb");
    // Both the page and the code are used up.
    assert!(server.raw(&post(code)).await.contains("404 "));
}

#[tokio::test]
async fn an_operator_approves_by_url_or_by_code() {
    let server = Server::start().await;
    for (number, whole) in [(1, true), (2, false)] {
        let mut machine = server.machine(number).await;
        let asked = machine.register(&register(&machine, None)).await;
        let login = if whole { asked.auth_url.as_str() } else { asked.auth_url.rsplit('/').next().unwrap() };
        assert!(server.admin().approve(login, "nobody").await.unwrap_err().to_string().contains("no user is named"));
        let info = server.admin().approve(login, "alice").await.unwrap();
        assert_eq!((info.hostname, info.approved_for.as_deref()), (format!("host{number}"), Some("alice")));
        let request = RegisterRequest { followup: asked.auth_url.clone(), ..register(&machine, None) };
        assert!(machine.register(&request).await.machine_authorized);
        let error = server.admin().approve(login, "alice").await.unwrap_err().to_string();
        assert!(error.contains("no machine is waiting"), "{error}");
    }
}

#[tokio::test]
async fn a_request_that_waits_for_approval_is_answered_in_time() {
    let server = Server::start_with(|config| config.followup_hold = Duration::from_millis(200)).await;
    let mut machine = server.machine(1).await;
    let asked = machine.register(&register(&machine, None)).await;
    let again =
        machine.register(&RegisterRequest { followup: asked.auth_url.clone(), ..register(&machine, None) }).await;
    assert_eq!(again.auth_url, asked.auth_url);
    let strange = RegisterRequest { followup: "http://x/register/gone".into(), ..register(&machine, None) };
    assert_eq!(machine.register(&strange).await.auth_url, asked.auth_url);
}

#[tokio::test]
async fn operators_are_told_what_went_wrong() {
    let server = Server::start().await;
    let admin = server.admin();
    assert!(admin.create_user("alice").await.unwrap_err().to_string().contains("exists already"));
    assert!(admin.create_user("a b").await.unwrap_err().to_string().contains("user name"));
    let wrong = CreateKey { tags: vec!["web".into()], ..Server::reusable() };
    assert!(admin.create_key(&wrong).await.unwrap_err().to_string().contains("tag:"));
    assert!(admin.delete_node("nobody").await.unwrap_err().to_string().contains("no node is named nobody"));
    assert!(admin.reload_derp_map().await.unwrap_err().to_string().contains("--derp-map"));
    assert_eq!(admin.users().await.unwrap().len(), 1);
    let keys = admin.keys().await.unwrap();
    assert!(keys.iter().all(|key| key.key.is_none()));
    let empty = tempfile::tempdir().unwrap();
    let error = Client::new(empty.path()).users().await.unwrap_err().to_string();
    assert!(error.contains("is it running"), "{error}");
}

#[tokio::test]
async fn a_second_coordinator_on_the_same_directory_is_refused() {
    let server = Server::start().await;
    let error = Coordinator::start(Config::new(server.dir.path(), "http://127.0.0.1:1")).unwrap_err().to_string();
    assert!(error.contains("another coordinator is running"), "{error}");
    assert_eq!(server.admin().users().await.unwrap().len(), 1, "the first one still answers");
}

#[tokio::test]
async fn a_damaged_noise_key_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("control.key"), "oops").unwrap();
    let error = Coordinator::start(Config::new(dir.path(), "http://127.0.0.1:1")).unwrap_err().to_string();
    assert!(error.contains("does not hold a private key"), "{error}");
    assert_eq!(std::fs::read_to_string(dir.path().join("control.key")).unwrap(), "oops");
}

#[tokio::test]
async fn relays_learn_who_may_use_them() {
    let server = Server::start().await;
    let key = server.key(Server::reusable()).await;
    let mut machine = server.machine(1).await;
    machine.join(&key).await;
    let ask = |node: NodePublic| format!("{{\"NodePublic\":\"{node}\",\"Source\":\"192.0.2.1\"}}");
    for (node, allow) in [(node_key(1), true), (node_key(2), false)] {
        let body = ask(node);
        let request = format!(
            "POST /verify HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        assert!(server.raw(&request).await.contains(&format!("\"Allow\":{allow}")));
    }
    server.admin().expire_node("host1").await.unwrap();
    assert!(!server.coordinator.admits(&node_key(1)));
}

#[tokio::test]
async fn state_files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let server = Server::start().await;
    for entry in std::fs::read_dir(server.dir.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{:?}", entry.path());
    }
}

#[tokio::test]
async fn many_machines_join_at_once() {
    let server = Server::start().await;
    let key = server.key(Server::reusable()).await;
    let mut joins = tokio::task::JoinSet::new();
    for number in 1..=20 {
        let (mut machine, key) = (server.machine(number).await, key.clone());
        joins.spawn(async move { machine.join(&key).await });
    }
    joins.join_all().await;
    let nodes = server.admin().nodes().await.unwrap();
    let addresses: std::collections::BTreeSet<_> = nodes.iter().map(|node| node.addresses[0]).collect();
    assert_eq!((nodes.len(), addresses.len()), (20, 20));
}
