//! What real clients sent, and what they accepted, read by the types of this crate.
//!
//! `tests/data/golden/` was recorded from clients that nobody in this project wrote.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use mesh_control::version::CapabilityVersion;
use mesh_control::wire::{
    EarlyNoise, EndpointType, KeyResponse, MapRequest, MapResponse, NodeId, RegisterRequest, RegisterResponse,
    Timestamp, decode, encode,
};
use serde_json::Value;
use std::path::{Path, PathBuf};

#[test]
fn go_requests_come_out_as_they_went_in() {
    let mut seen = 0;
    for folder in ["go-1.90.9", "go-older"] {
        for (name, bytes) in files(folder) {
            let again = if name.starts_with("register") {
                encode(&decode::<RegisterRequest>(&bytes).unwrap_or_else(|error| panic!("{name}: {error}")))
            } else if name.starts_with("map") {
                encode(&decode::<MapRequest>(&bytes).unwrap_or_else(|error| panic!("{name}: {error}")))
            } else {
                continue;
            };
            assert_eq!(without_nulls(&again), without_nulls(&bytes), "{folder}/{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, 14);
}

#[test]
fn go_register_members_that_are_always_sent_are_sent() {
    let bytes = file("go-1.90.9/register-no-authkey.json");
    let sent: Value = serde_json::from_slice(&encode(&decode::<RegisterRequest>(&bytes).unwrap())).unwrap();
    let golden: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(sent, golden);
}

#[test]
fn names_in_other_cases_are_matched() {
    let bytes = file("tailscale-rs-0.6.1/map-update-endpoints-netinfo.json");
    let request: MapRequest = decode(&bytes).unwrap();
    let hostinfo = request.hostinfo.unwrap();
    assert_eq!(hostinfo.ipn_version, "0.6.1");
    let net_info = hostinfo.net_info.unwrap();
    assert_eq!(net_info.preferred_derp.map(|region| region.to_string()).as_deref(), Some("900"));
    assert!((net_info.derp_latency["900-v4"] - 0.001_786_876).abs() < f64::EPSILON);
    assert_eq!(request.endpoint_types, [EndpointType::Local; 2]);
    assert_eq!(request.endpoints.len(), 2);
    assert!(request.omit_peers && !request.stream);
}

#[test]
fn every_recorded_request_is_read() {
    for folder in ["tailscale-rs-0.6.1", "third-party-rust"] {
        for (name, bytes) in files(folder) {
            if name.starts_with("register") {
                let request: RegisterRequest = decode(&bytes).unwrap();
                assert_eq!(request.auth.unwrap().auth_key, "tskey-auth-test", "{name}");
                assert!(request.version >= CapabilityVersion(130) && !request.node_key.is_zero(), "{name}");
                assert!(request.expiry.is_zero() && request.old_node_key.is_zero(), "{name}");
            } else {
                let request: MapRequest = decode(&bytes).unwrap();
                assert!(!request.node_key.is_zero() && !request.disco_key.is_zero(), "{name}");
                assert_eq!(request.stream, name.contains("stream"), "{name}");
                assert_eq!(request.compress, "", "{name}");
            }
        }
    }
}

#[test]
fn a_logout_is_a_past_expiry() {
    let request: RegisterRequest = decode(&file("go-1.90.9/register-logout-of-ephemeral.json")).unwrap();
    assert_eq!(request.expiry, Timestamp::LOGOUT);
}

#[test]
fn answers_that_clients_accepted_are_read() {
    let key: KeyResponse = decode(&file("server-accepted/key-response.json")).unwrap();
    assert!(key.legacy_public_key.is_zero() && !key.public_key.is_zero());
    let early: EarlyNoise = decode(&file("server-accepted/early-noise.json")).unwrap();
    assert!(!early.node_key_challenge.is_zero());
    let register: RegisterResponse = decode(&file("server-accepted/register-response.json")).unwrap();
    assert!(register.machine_authorized && register.error.is_empty());
    assert_eq!(register.login.login_name, "u@example.com");

    let first: MapResponse = decode(&file("server-accepted/map-response-first.json")).unwrap();
    let node = first.node.unwrap();
    assert_eq!((node.id, node.stable_id.as_str(), node.short_name()), (NodeId(2), "n2CNTRL", "tsrs"));
    assert!(node.machine_authorized && node.key_expiry.is_zero());
    assert_eq!(node.routed().len(), 2);
    let derp = first.derp_map.unwrap();
    assert_eq!(derp.regions.len(), 1);
    assert_eq!(first.packet_filters["base"].as_ref().unwrap()[0].ip_proto, [1, 6, 17, 58]);
    assert_eq!(first.peers.len(), 2);
    assert_eq!(first.domain, "itest.example");
    assert!(first.dns_config.unwrap().proxied);

    let minimal: MapResponse = decode(&file("server-accepted/map-response-minimal-go-running.json")).unwrap();
    assert!(minimal.node.unwrap().machine_authorized);

    let delta: MapResponse = decode(&file("server-accepted/map-response-peers-changed.json")).unwrap();
    let peer = &delta.peers_changed[0];
    assert_eq!(peer.home().unwrap().to_string(), "900");
    assert_eq!((peer.online, peer.cap), (Some(true), CapabilityVersion(142)));
}

#[test]
fn an_answer_with_nulls_everywhere_is_read() {
    let message = br#"{"Node":{"ID":1,"Key":null,"Endpoints":null,"Tags":null,"CapMap":{"a":null},"Hostinfo":null,
        "AllowedIPs":null,"Addresses":null,"HomeDERP":null,"KeyExpiry":null,"Name":null,"MachineAuthorized":null},
        "Peers":null,"DNSConfig":{"Routes":{"x":null},"Resolvers":null,"Proxied":null},"PacketFilters":{"base":null},
        "UserProfiles":null,"OnlineChange":{"7":true},"Domain":null,"ControlTime":null,"SSHPolicy":null}"#;
    let response: MapResponse = decode(message).unwrap();
    let node = response.node.unwrap();
    assert!(node.cap_map["a"].is_empty() && node.allowed_ips.is_none() && node.home_derp.is_none());
    assert!(response.dns_config.unwrap().routes["x"].is_empty());
    assert_eq!(response.packet_filters["base"], None);
    assert!(response.online_change[&NodeId(7)]);
    assert_eq!(response.ssh_policy, None);
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden")
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(data().join(name)).unwrap()
}

fn files(folder: &str) -> Vec<(String, Vec<u8>)> {
    let mut list: Vec<_> = std::fs::read_dir(data().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect();
    list.sort();
    list
}

/// The JSON without members that are null: Go writes an unset optional boolean so, and we leave it out.
fn without_nulls(bytes: &[u8]) -> Value {
    fn strip(value: &mut Value) {
        if let Value::Object(members) = value {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(strip);
        }
    }
    let mut value = serde_json::from_slice(bytes).unwrap();
    strip(&mut value);
    value
}
