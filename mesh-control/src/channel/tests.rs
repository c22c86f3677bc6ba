use super::*;
use mesh_noise::key::ChallengePublic;
use proptest::prelude::*;
use rand_core::{Infallible, TryCryptoRng, TryRng};

/// Answers every draw with the same bytes.
struct Fixed([u8; 32]);

impl TryRng for Fixed {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from(self.try_next_u32()?))
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        for (at, byte) in out.iter_mut().enumerate() {
            *byte = self.0[at % 32];
        }
        Ok(())
    }
}

impl TryCryptoRng for Fixed {}

fn counting(start: u8) -> [u8; 32] {
    std::array::from_fn(|at| start + u8::try_from(at).unwrap())
}

fn control() -> MachinePrivate {
    MachinePrivate::from_bytes(counting(0))
}

fn machine() -> MachinePrivate {
    "privkey:40ab1b58e9076c7a4d9d07291f5edf9d1aa017eb949624ba683317f48a640369".parse().unwrap()
}

fn handshake(version: u16) -> (ClientChannel, ServerChannel) {
    let (client, initiation) =
        ClientChannel::start(CapabilityVersion(version), &machine(), &control().public(), &mut Fixed(counting(0x20)))
            .unwrap();
    let server = ServerChannel::accept(&control(), &initiation, &mut Fixed(counting(0x40))).unwrap();
    (client, server)
}

fn pair() -> (Records, Records) {
    let (mut client, server) = handshake(130);
    (client.receive(&server.response).unwrap().unwrap(), server.records)
}

fn drain(records: &mut Records) -> Vec<u8> {
    let mut out = vec![0; records.readable()];
    assert_eq!(records.read(&mut out), out.len());
    out
}

fn output(records: &mut Records) -> Vec<u8> {
    let out = records.output().to_vec();
    records.consume_output(out.len());
    out
}

#[test]
fn the_documented_vector_comes_out_byte_for_byte() {
    let (mut client, initiation) =
        ClientChannel::start(CapabilityVersion(138), &machine(), &control().public(), &mut Fixed(counting(0x20)))
            .unwrap();
    assert_eq!(
        initiation_to_header(&initiation),
        "AIoBAGA1gHLWNliA0a7qMprfkSE4OFHtIaKOO3XpZdDSzRZiVHRQM2JILTv4VsPL3xjOI0ryGf5ygkPpvVHVtz0Pj4ZPWtfyloFIAIv743e+\
         iSEFK37+K47MQPgl+gNLsoj48ZI="
    );
    let header = initiation_to_header(&initiation);
    assert_eq!(initiation_from_header(header.as_bytes()), Ok(initiation));
    let mut server = ServerChannel::accept(&control(), &initiation, &mut Fixed(counting(0x40))).unwrap();
    assert_eq!((server.version, server.machine), (CapabilityVersion(138), machine().public()));
    let mut client = client.receive(&server.response).unwrap().unwrap();
    client.write(b"hello").unwrap();
    assert_eq!(hex::encode(output(&mut client)), "0400150ef4b5e404a13949137f39f86830c4e9ffac1210a4");
    client.write(b"hello").unwrap();
    assert_eq!(hex::encode(output(&mut client)), "0400158a88dbf397354089495ecef196b9bd076e48d7e1c3");
    server.records.write(b"world").unwrap();
    assert_eq!(hex::encode(output(&mut server.records)), "0400153d25aaedba7a6c3b24b63ea6f4aa1826e10342884d");
    assert_eq!(client.handshake_hash(), server.records.handshake_hash());
}

#[test]
fn recorded_sessions_are_served_byte_for_byte() {
    for recording in [
        include_str!("../../tests/data/golden/vectors/noise-go-1.90.9.json"),
        include_str!("../../tests/data/golden/vectors/noise-tailscale-rs-0.6.1.json"),
    ] {
        let recording: serde_json::Value = serde_json::from_str(recording).unwrap();
        let bytes = |name: &str| hex::decode(recording[name].as_str().unwrap()).unwrap();
        let key = |name: &str| -> [u8; 32] { bytes(name).try_into().unwrap() };
        let head = recording["request_head"].as_str().unwrap();
        let header = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case(HANDSHAKE_HEADER).then_some(value)
        });
        let initiation = initiation_from_header(header.unwrap().as_bytes()).unwrap();
        assert_eq!(initiation.to_vec(), bytes("init_hex"));

        let control = MachinePrivate::from_bytes(key("control_static_private"));
        let mut rng = Fixed(key("server_ephemeral_private"));
        let mut server = ServerChannel::accept(&control, &initiation, &mut rng).unwrap();
        assert_eq!(server.response.to_vec(), bytes("response_hex"));
        assert_eq!(server.machine.as_bytes(), &key("machine_public"));
        assert_eq!(server.records.handshake_hash(), &key("handshake_hash"));

        let mut early_seen = false;
        for record in recording["records"].as_array().unwrap() {
            let frame = hex::decode(record["frame_hex"].as_str().unwrap()).unwrap();
            let plaintext = hex::decode(record["plaintext_hex"].as_str().unwrap()).unwrap();
            if record["dir"] == "c2s" {
                server.records.receive(&frame).unwrap();
                assert_eq!(drain(&mut server.records), plaintext);
            } else {
                if plaintext.starts_with(&EARLY_MAGIC) {
                    assert!(
                        matches!(early_payload(&plaintext), Ok(EarlyPayload::Present(_, length)) if length == plaintext.len())
                    );
                    early_seen = true;
                }
                server.records.write(&plaintext).unwrap();
                assert_eq!(output(&mut server.records), frame);
            }
        }
        assert!(early_seen);
    }
}

#[test]
fn the_early_payload_is_taken_out_of_the_stream() {
    let (mut client, mut server) = handshake(130);
    let early = EarlyNoise { node_key_challenge: ChallengePublic::from_bytes([7; 32]) };
    server.write_early(&early).unwrap();
    server.records.write(b"SETTINGS").unwrap();
    let mut flight = server.response.to_vec();
    flight.extend(output(&mut server.records));
    let mut client = client.receive(&flight).unwrap().expect("the response was whole");
    assert_eq!(client.early(), Some(&early));
    assert_eq!(drain(&mut client), b"SETTINGS");
}

#[test]
fn the_early_header_says_the_documented_length() {
    let (_, mut server) = handshake(130);
    server.write_early(&EarlyNoise::default()).unwrap();
    let record = output(&mut server.records);
    // 9 bytes of header and 95 of JSON, as §14.3 has it, in one record.
    assert_eq!(record.len(), HEADER_LEN + EARLY_HEADER + 0x5f + TAG_LEN);
}

#[test]
fn a_stream_without_early_payload_is_left_alone() {
    let (mut client, mut server) = pair();
    server.write(b"\xff\xff").unwrap();
    server.write(b"").unwrap();
    client.receive(&output(&mut server)).unwrap();
    assert_eq!(client.readable(), 0, "two bytes do not yet say what they are");
    server.write(b"\x00rest").unwrap();
    client.receive(&output(&mut server)).unwrap();
    assert_eq!(drain(&mut client), b"\xff\xff\x00rest");
    assert_eq!(client.early(), None);
}

#[test]
fn a_failed_record_is_final_and_leaves_what_came_before() {
    let (mut client, mut server) = pair();
    client.write(b"one").unwrap();
    let good = output(&mut client);
    client.write(b"two").unwrap();
    let mut bad = output(&mut client);
    bad[4] ^= 1;
    server.receive(&good).unwrap();
    assert_eq!(server.receive(&bad), Err(ChannelError::Noise(NoiseError::Authentication)));
    assert_eq!(drain(&mut server), b"one");
    assert_eq!(server.receive(&[]), Err(ChannelError::Noise(NoiseError::Authentication)));
    assert_eq!(server.write(b"x"), Err(ChannelError::Noise(NoiseError::Authentication)));
}

#[test]
fn malformed_records_are_named() {
    let (_, mut server) = pair();
    assert_eq!(server.receive(&[4, 0x0f, 0xfe]), Err(ChannelError::RecordLength(4094)));
    let (_, mut server) = pair();
    assert_eq!(server.receive(&[4, 0, 15]), Err(ChannelError::RecordLength(15)));
    let (_, mut server) = pair();
    assert_eq!(server.receive(&[9, 0, 16]), Err(ChannelError::Type { expected: 4, got: 9 }));
    assert_eq!(initiation_from_header(b"!"), Err(ChannelError::Header));
    assert_eq!(initiation_from_header(b"AAAA"), Err(ChannelError::Header));
}

#[test]
fn a_refusal_is_shown_on_one_line() {
    let (mut client, _) = handshake(130);
    assert!(client.receive(&[3, 0]).unwrap().is_none());
    assert_eq!(client.receive(b"\x07no\nway!").err(), Some(ChannelError::Refused("noway!".into())));
}

#[test]
fn another_servers_key_fails_the_handshake() {
    let other = MachinePrivate::from_bytes(counting(9));
    let (_, initiation) =
        ClientChannel::start(CapabilityVersion(130), &machine(), &other.public(), &mut Fixed(counting(1))).unwrap();
    let error = ServerChannel::accept(&control(), &initiation, &mut Fixed(counting(2))).err();
    assert_eq!(error, Some(ChannelError::Noise(NoiseError::Authentication)));
}

proptest! {
    #[test]
    fn any_cutting_gives_the_same_stream(
        writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..6000), 1..5),
        cuts in prop::collection::vec(1_usize..3000, 1..20),
    ) {
        let (mut client, mut server) = pair();
        for piece in &writes { client.write(piece).unwrap(); }
        let stream = output(&mut client);
        prop_assert!(stream.len() >= writes.iter().map(Vec::len).sum());
        let mut rest = &stream[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() { break; }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            rest = later;
            server.receive(now).unwrap();
        }
        prop_assert!(!server.mid_record());
        prop_assert_eq!(drain(&mut server), writes.concat());
    }

    #[test]
    fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let (mut client, mut server) = handshake(130);
        let _ = server.records.receive(&bytes);
        let _ = client.receive(&bytes);
        let _ = initiation_from_header(&bytes);
        let _ = early_payload(&bytes);
        let _ = ServerChannel::accept(&control(), &bytes, &mut Fixed([1; 32]));
    }
}
