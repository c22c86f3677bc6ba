//! Parsers that stand behind a handshake or a box: the bytes are sealed as the other side would seal them.

use std::time::Instant;

use mesh_control::channel::{ClientChannel, Records, ServerChannel};
use mesh_control::version::CapabilityVersion;
use mesh_control::wire::frame;
use mesh_derp::client::Connection;
use mesh_derp::frame::Frame;
use mesh_derp::login::ServerInfo;
use mesh_nat::agent::{Agent, PeerConfig, Source};
use mesh_nat::disco::seal;
use mesh_nat::path::{Path, SocketId};
use mesh_nat::relay::geneve::{self, Content};
use mesh_nat::relay::server::{Config, Handled, Server};
use mesh_noise::key::{DiscoPrivate, MachinePrivate, NodePrivate, RelayPrivate};
use mesh_noise::random::SeededRng;

fn rng() -> SeededRng {
    SeededRng::from_seed([9; 32])
}

/// A path agent takes a message that its only peer has sealed, over UDP or through the relay.
pub(crate) fn agent(now: Instant, bytes: &[u8]) {
    let Some((first, message)) = bytes.split_first() else { return };
    let (ours, theirs) = (DiscoPrivate::from_bytes([1; 32]), DiscoPrivate::from_bytes([2; 32]));
    let node = NodePrivate::from_bytes([3; 32]).public();
    let mut agent = Agent::new(now, ours.clone(), NodePrivate::from_bytes([4; 32]).public(), [5; 32]);
    agent.set_sockets(vec![(SocketId(0), mesh_nat::path::Family::V4)]);
    let endpoints = vec![([192, 0, 2, 1], 41641).into()];
    agent.set_peer(now, PeerConfig { node, disco: theirs.public(), endpoints, ..PeerConfig::default() });
    let datagram = seal::seal(&theirs.public(), &theirs.box_with(&ours.public()), &mut rng(), message);
    let source = match first % 2 {
        0 => Source {
            path: Path::Direct { socket: SocketId(0), remote: ([192, 0, 2, *first], 41641).into() },
            node: None,
        },
        _ => {
            let region = mesh_derp::map::RegionId::new(1).expect("regions count from 1");
            Source { path: Path::Relay { region }, node: Some(node) }
        }
    };
    let _ = agent.handle_datagram(now, source, &datagram);
    let _ = agent.handle_datagram(now, source, bytes);
    for _ in 0..8 {
        while agent.poll_transmit().is_some() {}
        while agent.poll_event().is_some() {}
        let Some(next) = agent.poll_timeout() else { break };
        agent.handle_timeout(next);
        assert!(agent.poll_timeout().is_none_or(|later| later > next), "a deadline stays due");
    }
}

/// A peer relay's server takes a datagram as it is, behind a header, and as a message that a client of a pair has sealed.
/// It never answers with more than it was sent, and forwards nothing before both clients have bound.
pub(crate) fn relay_server(now: Instant, bytes: &[u8]) {
    let [ours, client, other] = [1, 2, 3].map(|number| DiscoPrivate::from_bytes([number; 32]));
    let mut server = Server::new(now, ours.clone(), [5; 32], Config::default());
    server.set_addresses(vec![([203, 0, 113, 1], 7777).into()]);
    let pair = [client.public(), other.public()];
    let vni = server.allocate(now, pair).expect("the server has an address").vni;
    let sealed = seal::seal(&client.public(), &client.box_with(&ours.public()), &mut rng(), bytes);
    let source = ([192, 0, 2, 1], 41641).into();
    let datagrams = [
        bytes.to_vec(),
        geneve::encapsulate(vni, Content::Control, bytes),
        geneve::encapsulate(vni, Content::WireGuard, bytes),
        geneve::encapsulate(vni, Content::Control, &sealed),
    ];
    for datagram in datagrams {
        let outcome = server.handle_datagram(now, source, &datagram);
        assert!(!matches!(outcome, Ok(Handled::Forward(_))), "forwarded for one client");
        let mut replies = 0;
        while let Some((to, reply)) = server.poll_transmit() {
            replies += 1;
            assert!(to == source && reply.len() <= datagram.len() && replies == 1, "amplified");
        }
    }
}

/// The control channel: raw bytes in place of each message, and as plaintext inside records both ways.
pub(crate) fn channel(bytes: &[u8]) {
    let (machine, control) = (MachinePrivate::from_bytes([1; 32]), MachinePrivate::from_bytes([2; 32]));
    let start = || ClientChannel::start(CapabilityVersion(100), &machine, &control.public(), &mut rng());
    let (mut client, initiation) = start().expect("the server's key is a key");
    let _ = client.receive(bytes);
    let _ = ServerChannel::accept(&control, bytes, &mut rng());
    let (mut client, _) = start().expect("the server's key is a key");
    let mut server = ServerChannel::accept(&control, &initiation, &mut rng()).expect("it was made for this server");
    let mut client = client.receive(&server.response).expect("it answers this client").expect("it is whole");
    let (front, back) = bytes.split_at(bytes.len() / 2);
    for piece in [front, back] {
        server.records.write(piece).expect("few records");
        let _ = client.receive(server.records.output());
        server.records.consume_output(server.records.output().len());
    }
    if client.early().is_none() && client.receive(&[]).is_ok() {
        client.write(bytes).expect("few records");
        assert!(carried(&client, &mut server.records) == bytes, "records change what they carry");
    }
    let _ = server.records.receive(bytes);
    for compression in [frame::Compression::None, frame::Compression::Zstd] {
        let mut reader = frame::FrameReader::new(compression).with_limit(1 << 16);
        reader.push(bytes);
        while let Ok(Some(_)) = reader.next_json() {}
    }
    let _ = mesh_control::client::c2n::answer(bytes);
}

fn carried(from: &Records, to: &mut Records) -> Vec<u8> {
    to.receive(from.output()).expect("our own records");
    let mut found = vec![0; to.readable()];
    let count = to.read(&mut found);
    assert_eq!(count, found.len());
    found
}

/// A node's relay connection, logged in, and then whatever comes.
pub(crate) fn derp_session(now: Instant, bytes: &[u8]) {
    let (relay, node) = (RelayPrivate::from_bytes([1; 32]), NodePrivate::from_bytes([2; 32]));
    let mut hello = Frame::ServerKey(relay.public()).to_bytes().to_vec();
    hello.extend_from_slice(&ServerInfo::default().seal(&relay.box_with_node(&node.public()), &mut rng()).to_bytes());
    let mut client = Connection::new(now, node, None, true, &mut rng());
    client.handle_bytes(now, &hello).expect("the login is sound");
    let _ = client.handle_bytes(now, bytes);
    while client.poll_event().is_some() {}
    while client.poll_transmit().is_some() {}
}
