//! What each fuzz target does with its bytes. The targets are one line each, so that the same functions replay the
//! committed corpus in every test run, without a fuzzer.
//!
//! `cargo +nightly fuzz run stun` looks for new failures; a failure becomes a named test beside the code before it is
//! fixed, and its input joins `corpus/`.

mod gateway;
mod relay;
mod rewrite;
mod session;
mod tunnel;

pub use gateway::{portmap, upnp};

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_derp::frame::{Decoder, Frame};
use mesh_noise::key::{NodePrivate, NodePublic, RelayPrivate};
use mesh_noise::wireguard::uapi::Request;
use mesh_noise::wireguard::{Interface, PeerConfig, message};
use mesh_tun::batch::Batch;
use mesh_tun::filter::{Filter, Flows, Standing};
use mesh_tun::offload::{Coalescer, Header, Segments, Unusable};
use mesh_tun::packet::Packet;

/// WireGuard messages: the classifier, and an interface that takes whatever comes.
pub fn wireguard(bytes: &[u8]) {
    let _ = message::kind(bytes);
    let now = epoch();
    let private = NodePrivate::from_bytes([1; 32]);
    let peer = NodePrivate::from_bytes([2; 32]).public();
    let mut interface = Interface::<u8>::new(now, SystemTime::UNIX_EPOCH, &private, [3; 32]);
    interface.set_peer(now, peer, PeerConfig::default());
    let _ = interface.handle_datagram(now, &0, Some(([192, 0, 2, 1], 1).into()), bytes);
    while interface.poll_transmit().is_some() {}
    while interface.poll_event().is_some() {}
}

/// Two WireGuard ends; each byte is a step of one of them, of the link or of the clock.
///
/// # Panics
/// When it has found a failure.
pub fn wireguard_pair(bytes: &[u8]) {
    tunnel::run(epoch(), &bytes[..bytes.len().min(256)]);
}

/// The configuration protocol of `wg(8)`, in one piece and in two, and the text forms of keys.
///
/// # Panics
/// When it has found a failure.
pub fn uapi(bytes: &[u8]) {
    let whole = requests(&[bytes]);
    let (front, back) = bytes.split_at(bytes.len() / 2);
    assert_eq!(format!("{:?}", requests(&[front, back])), format!("{whole:?}"), "pieces decode differently");
    if let Ok(text) = str::from_utf8(bytes)
        && let Ok(key) = text.parse::<NodePublic>()
    {
        assert_eq!(key.to_string().parse(), Ok(key));
    }
}

fn requests(pieces: &[&[u8]]) -> Vec<Request> {
    let (mut decoder, mut found) = (mesh_noise::wireguard::uapi::Decoder::default(), Vec::new());
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_request() {
                Ok(Some(request)) => found.push(request),
                Ok(None) => break,
                // The stream is of no use from here on.
                Err(_) => return found,
            }
        }
    }
    found
}

/// STUN requests and responses.
///
/// # Panics
/// When it has found a failure.
pub fn stun(bytes: &[u8]) {
    use mesh_nat::stun::message::{Request, Response, request};
    let _ = mesh_nat::classify::classify(bytes);
    let _ = Response::decode(bytes);
    if let Ok(decoded) = Request::decode(bytes) {
        let again = request(decoded.tx);
        assert!(Request::decode(&again).is_ok(), "our own request is refused");
    }
}

/// Disco messages after their box has been opened: what decodes encodes to something that decodes alike.
///
/// # Panics
/// When it has found a failure.
pub fn disco(bytes: &[u8]) {
    use mesh_nat::disco::message::Message;
    let _ = mesh_nat::disco::seal::sender(bytes);
    if let Ok(message) = Message::decode(bytes) {
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(Message::decode(&again).as_ref(), Ok(&message));
    }
}

/// Disco messages that a peer has sealed, and what the path agent does about them until it rests.
///
/// # Panics
/// When it has found a failure.
pub fn agent(bytes: &[u8]) {
    session::agent(epoch(), bytes);
}

/// Datagrams that a peer relay's server receives, from anybody and from a client.
///
/// # Panics
/// When it has found a failure.
pub fn relay_server(bytes: &[u8]) {
    session::relay_server(epoch(), bytes);
}

/// The control channel's handshake, records and frames, and the requests that control sends to a node.
///
/// # Panics
/// When it has found a failure.
pub fn channel(bytes: &[u8]) {
    session::channel(bytes);
}

/// Relay frames that arrive at a node, or at a relay, after the login; and what becomes of packets in a relay's queue.
///
/// # Panics
/// When it has found a failure.
pub fn derp_session(bytes: &[u8]) {
    session::derp_session(epoch(), bytes);
    relay::session(epoch(), bytes);
    relay::queue(epoch(), bytes);
}

/// What comes before a relay's frames: a proxy's header, the heads of HTTP requests and responses, and WebSocket messages.
///
/// # Panics
/// When it has found a failure.
pub fn derp_http(bytes: &[u8]) {
    relay::http(bytes);
}

/// Relay frames in one piece and in two, and the boxes of the login.
///
/// # Panics
/// When it has found a failure.
pub fn derp_frame(bytes: &[u8]) {
    let whole = frames(&[bytes]);
    let (front, back) = bytes.split_at(bytes.len() / 2);
    assert_eq!(frames(&[front, back]), whole, "pieces decode differently");
    let relay = RelayPrivate::from_bytes([1; 32]);
    let shared = relay.box_with_node(&NodePrivate::from_bytes([2; 32]).public());
    let _ = mesh_derp::login::ClientInfo::open(&shared, bytes);
}

fn frames(pieces: &[&[u8]]) -> Vec<Frame> {
    let (mut decoder, mut found) = (Decoder::new(), Vec::new());
    for piece in pieces {
        decoder.extend(piece);
        while let Ok(Some(frame)) = decoder.next_frame() {
            found.push(frame);
        }
    }
    found
}

/// JSON bodies of the control protocol, and the Noise records around them.
pub fn control(bytes: &[u8]) {
    use mesh_control::wire;
    let _ = mesh_derp::json::from_slice::<wire::RegisterRequest>(bytes);
    let _ = mesh_derp::json::from_slice::<wire::RegisterResponse>(bytes);
    let _ = mesh_derp::json::from_slice::<wire::MapRequest>(bytes);
    if let Ok(map) = mesh_derp::json::from_slice::<wire::MapResponse>(bytes) {
        let mut netmap = mesh_control::netmap::Netmap::default();
        let _ = netmap.apply(map);
    }
    let _ = mesh_control::channel::initiation_from_header(bytes);
}

/// IP packets: views over any bytes.
pub fn ip_packet(bytes: &[u8]) {
    let _ = mesh_tun::packet::destination(bytes);
    let _ = mesh_tun::packet::source(bytes);
    if let Ok(packet) = Packet::parse(bytes) {
        let _ = mesh_tun::packet::checksum::transport_is_valid(&packet);
    }
}

/// The packet filter: without rules nothing comes in but answers to what went out.
pub fn filter(bytes: &[u8]) {
    let filter = Filter::closed(Arc::new(Flows::new([0; 16])));
    if let Ok(packet) = Packet::parse(bytes) {
        let before = filter.inbound(&packet, Standing::default(), Duration::ZERO);
        filter.note_outbound(&packet, Duration::ZERO);
        let _ = (before, filter.inbound(&packet, Standing::default(), Duration::from_secs(1)));
    }
}

/// A packet whose addresses are replaced for a peer, and put back: checksums cover what they did before.
///
/// # Panics
/// When it has found a failure.
pub fn masquerade(bytes: &[u8]) {
    rewrite::masquerade(bytes);
}

/// A packet in front of a narrower link: the segment size of a SYN is lowered, and a packet that is too long is answered.
///
/// # Panics
/// When it has found a failure.
pub fn mtu(bytes: &[u8]) {
    rewrite::mtu(bytes);
}

/// Super-packets from the kernel: a virtio header and a packet are cut, and every byte of payload comes out once.
///
/// # Panics
/// When it has found a failure.
pub fn segment(bytes: &[u8]) {
    let Some((header, packet)) = bytes.split_first_chunk() else { return };
    let Ok(header) = Header::decode(header) else { return };
    let _ = cut(header, packet);
}

/// Packets from peers, each behind its length: joined and cut again, none is lost and none is longer.
///
/// # Panics
/// When it has found a failure.
pub fn coalesce(bytes: &[u8]) {
    let (mut batch, mut rest) = (Batch::new(64, 512), bytes);
    while let Some((len, behind)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_be_bytes(*len) % 512).min(behind.len());
        let (packet, behind) = behind.split_at(len);
        batch.push(packet);
        rest = behind;
    }
    let before: Vec<_> = batch.iter().filter(|packet| !packet.is_empty()).map(<[u8]>::to_vec).collect();
    let (mut coalescer, mut after) = (Coalescer::default(), Vec::new());
    coalescer.plan(&batch, true);
    for group in coalescer.groups() {
        let (header, _) = group.join(&mut batch);
        let mut whole = Vec::new();
        for index in coalescer.packets(group) {
            let from = if whole.is_empty() { 0 } else { group.payload_at() };
            whole.extend_from_slice(&batch.packet(index)[from..]);
        }
        let header = Header::decode(&header).expect("our own header");
        after.extend(cut(header, &whole).expect("our own super-packet"));
    }
    let mut lens = [&before, &after].map(|packets| packets.iter().map(Vec::len).collect::<Vec<_>>());
    lens.iter_mut().for_each(|lens| lens.sort_unstable());
    assert_eq!(lens[0], lens[1], "packets were lost or changed their length");
}

fn cut(header: Header, packet: &[u8]) -> Result<Vec<Vec<u8>>, Unusable> {
    let mut segments = Segments::new(header, packet)?;
    let (mut out, mut found) = (vec![0; packet.len()], Vec::new());
    let expected = segments.remaining();
    while let Some(len) = segments.write_next(packet, &mut out) {
        found.push(out[..len.expect("no packet is longer than the whole")].to_vec());
    }
    assert_eq!(found.len(), expected);
    Ok(found)
}

#[expect(clippy::disallowed_methods, reason = "an instant can only come from the clock; the cores never see it move")]
fn epoch() -> Instant {
    static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *EPOCH.get_or_init(Instant::now)
}

#[cfg(test)]
mod tests {
    /// Runs every file of `corpus/TARGET` through the target.
    fn replay(name: &str, target: fn(&[u8])) {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!files.is_empty(), "{} has no inputs", folder.display());
        for file in files {
            target(&std::fs::read(&file).unwrap());
        }
    }

    /// Runs `count` inputs that were made from the corpus by cutting, repeating and changing bytes; the same every time.
    fn mutate(name: &str, target: fn(&[u8]), count: usize) {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let inputs: Vec<_> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |bound: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 16).unwrap() % bound.max(1)
        };
        for _ in 0..count {
            let mut input = inputs[below(inputs.len())].clone();
            for _ in 0..=below(8) {
                let at = below(input.len());
                match below(4) {
                    0 => input.truncate(at),
                    1 => input.extend_from_within(at.min(input.len())..),
                    2 => input.insert(at, u8::try_from(below(256)).unwrap()),
                    _ => input.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << below(8)),
                }
            }
            target(&input);
        }
    }

    /// A fuzzer finds more, but not on every machine and not in every run.
    #[test]
    fn changed_inputs_are_survived() {
        mutate("wireguard_pair", super::wireguard_pair, 300);
        mutate("uapi", super::uapi, 3000);
        mutate("agent", super::agent, 300);
        mutate("relay_server", super::relay_server, 300);
        mutate("channel", super::channel, 300);
        mutate("derp_session", super::derp_session, 1000);
        mutate("derp_http", super::derp_http, 3000);
        mutate("masquerade", super::masquerade, 3000);
        mutate("mtu", super::mtu, 3000);
        mutate("portmap", super::portmap, 3000);
        mutate("upnp", super::upnp, 3000);
    }

    #[test]
    fn the_corpus_of_every_target_is_survived() {
        replay("wireguard", super::wireguard);
        replay("wireguard_pair", super::wireguard_pair);
        replay("uapi", super::uapi);
        replay("agent", super::agent);
        replay("channel", super::channel);
        replay("derp_session", super::derp_session);
        replay("derp_http", super::derp_http);
        replay("stun", super::stun);
        replay("portmap", super::portmap);
        replay("upnp", super::upnp);
        replay("disco", super::disco);
        replay("relay_server", super::relay_server);
        replay("derp_frame", super::derp_frame);
        replay("control", super::control);
        replay("ip_packet", super::ip_packet);
        replay("filter", super::filter);
        replay("masquerade", super::masquerade);
        replay("mtu", super::mtu);
        replay("segment", super::segment);
        replay("coalesce", super::coalesce);
    }
}
