//! Recorded sessions of the official clients, replayed byte for byte. See `tests/data/README.md`.

use std::time::Instant;

use bytes::{Buf as _, Bytes, BytesMut};
use mesh_noise::key::{NONCE_LEN, NodePublic, RelayPrivate, RelayPublic};
use serde::Deserialize;

use crate::frame::{Decoder, Frame, Kind};
use crate::json;
use crate::login::{ClientInfo, ServerInfo};
use crate::queue::Lane;
use crate::random::Prepared;
use crate::server::{Connection, Input};

#[derive(Deserialize)]
struct Session {
    derp_server_private: String,
    derp_server_public: RelayPublic,
    client_public: String,
    client_info_plain: String,
    frames: Vec<Recorded>,
}

#[derive(Deserialize)]
struct Recorded {
    dir: String,
    #[serde(rename = "type")]
    kind: u8,
    payload_hex: String,
}

impl Recorded {
    fn body(&self) -> Bytes {
        hex::decode(&self.payload_hex).unwrap().into()
    }

    /// As it stood on the wire: the recording leaves the header out.
    fn wire(&self) -> Vec<u8> {
        let body = self.body();
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&[self.kind][..], &length, &body].concat()
    }
}

impl Session {
    fn relay(&self) -> RelayPrivate {
        format!("privkey:{}", self.derp_server_private).parse().unwrap()
    }

    fn node(&self) -> NodePublic {
        format!("nodekey:{}", self.client_public).parse().unwrap()
    }

    fn wire(&self, direction: &str) -> Vec<u8> {
        self.frames.iter().filter(|frame| frame.dir == direction).flat_map(Recorded::wire).collect()
    }
}

fn sessions() -> [(&'static str, Session); 2] {
    [
        ("go", include_str!("../tests/data/derp-go-1.90.9.json")),
        ("rust", include_str!("../tests/data/derp-tailscale-rs-0.6.1.json")),
    ]
    .map(|(name, text)| (name, json::from_str(text).unwrap()))
}

fn nonce_of(sealed: &[u8]) -> Prepared {
    Prepared::exactly(*sealed.first_chunk::<NONCE_LEN>().unwrap())
}

#[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
fn start() -> Instant {
    Instant::now()
}

#[test]
fn every_recorded_frame_decodes_and_encodes_to_the_same_bytes() {
    for (name, session) in sessions() {
        assert_eq!(session.relay().public(), session.derp_server_public);
        for (at, recorded) in session.frames.iter().enumerate() {
            let kind = Kind::from_byte(recorded.kind).unwrap();
            let frame = Frame::decode(kind, recorded.body()).unwrap();
            assert_eq!(frame.to_bytes(), recorded.wire(), "{name} frame {at}");
        }
        for direction in ["c2s", "s2c"] {
            let wire = session.wire(direction);
            for piece in [1, 7, 1000, wire.len()] {
                let (mut decoder, mut again) = (Decoder::new(), BytesMut::new());
                for bytes in wire.chunks(piece) {
                    decoder.extend(bytes);
                    while let Some(frame) = decoder.next_frame().unwrap() {
                        frame.encode(&mut again);
                    }
                }
                assert_eq!(again, wire, "{name} {direction} in pieces of {piece}");
            }
        }
    }
}

#[test]
fn recorded_logins_open_and_ours_are_the_same_bytes() {
    for (name, session) in sessions() {
        let shared = session.relay().box_with_node(&session.node());
        let [_, login, answer, ..] = &session.frames[..] else { panic!("{name}: too short") };
        let Frame::ClientInfo { node, sealed } = Frame::decode(Kind::ClientInfo, login.body()).unwrap() else {
            panic!()
        };
        assert_eq!(node, session.node());
        let info = ClientInfo::open(&shared, &sealed).unwrap();
        assert_eq!((info.version, info.can_ack_pings), (2, name == "go"));
        assert_eq!(shared.open(&sealed).unwrap(), session.client_info_plain.as_bytes());
        if name == "go" {
            // What we send is what the Go client sends. The Rust client's spelling is its own.
            let ours = info.seal(node, &shared, &mut nonce_of(&sealed));
            assert_eq!(ours.to_bytes(), login.wire());
        }
        let Frame::ServerInfo { sealed } = Frame::decode(Kind::ServerInfo, answer.body()).unwrap() else { panic!() };
        let info = ServerInfo::open(&shared, &sealed).unwrap();
        assert_eq!(info, ServerInfo::default());
        assert_eq!(info.seal(&shared, &mut nonce_of(&sealed)).to_bytes(), answer.wire());
    }
}

#[test]
fn our_relay_takes_what_the_clients_sent_and_answers_the_recorded_bytes() {
    for (name, session) in sessions() {
        let nonce = nonce_of(&session.frames[2].body());
        let mut relay = Connection::new(start(), session.relay(), &mut { nonce });
        assert_eq!(relay.poll_transmit().unwrap(), session.frames[0].wire(), "{name}: ServerKey");
        relay.read_buffer().extend_from_slice(&session.wire("c2s"));
        let (mut packets, mut disco, mut preferred) = (Vec::new(), 0, Vec::new());
        while let Some(input) = relay.poll_input().unwrap() {
            match input {
                Input::Login { node, .. } => {
                    assert_eq!(node, session.node());
                    relay.admit();
                }
                Input::Packet { destination, payload } => {
                    disco += usize::from(Lane::of(&payload) == Lane::Disco);
                    packets.push((destination, payload));
                }
                Input::Preferred(home) => preferred.push(home),
                Input::Ping(_) | Input::Regional(_) | Input::Nothing => panic!("{name}: {input:?} was not recorded"),
            }
        }
        assert_eq!(relay.poll_transmit().unwrap(), session.frames[2].wire(), "{name}: ServerInfo");
        let recorded: Vec<_> = session
            .frames
            .iter()
            .filter(|frame| frame.dir == "c2s" && frame.kind == Kind::SendPacket as u8)
            .map(|frame| {
                let mut body = frame.body();
                let mut key = [0; 32];
                body.copy_to_slice(&mut key);
                (NodePublic::from_bytes(key), body)
            })
            .collect();
        assert_eq!(packets, recorded, "{name}");
        // The Go client names its home and sends disco; the Rust client does neither.
        let go = name == "go";
        assert_eq!((preferred, disco > 0), (if go { vec![true] } else { vec![] }, go), "{name}");
    }
}

#[test]
fn the_rust_clients_spelling_of_its_home_is_understood() {
    #[derive(Deserialize)]
    struct Request {
        #[serde(rename = "Hostinfo")]
        host: Host,
    }
    #[derive(Deserialize)]
    struct Host {
        #[serde(rename = "NetInfo")]
        net: Net,
    }
    #[derive(Deserialize)]
    struct Net {
        #[serde(rename = "PreferredDERP", with = "crate::map::region_or_zero")]
        home: Option<crate::map::RegionId>,
    }
    let text = include_str!("../tests/data/map-update-endpoints-netinfo.json");
    assert!(serde_json::from_str::<Request>(text).is_err());
    assert_eq!(json::from_str::<Request>(text).unwrap().host.net.home, crate::map::RegionId::new(900));
}
