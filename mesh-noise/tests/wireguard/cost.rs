//! What a handshake costs the responder, beside `snow` with its own curve, cipher and hash.

use std::time::{Duration, Instant};

use mesh_noise::key::{NodePrivate, PresharedKey};
use mesh_noise::wireguard::{Interface, PeerConfig};

use crate::pair::{keys, millis, origin, wall};

const ROUNDS: u32 = 600;

#[expect(clippy::disallowed_methods, reason = "this measures")]
fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// One initiation answered by `snow` alone: no MACs, no indices, no session.
fn by_snow(responder: &NodePrivate, psk: &[u8; 32], noise: &[u8]) {
    let params = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s".parse().expect("a constant");
    let mut state = snow::Builder::new(params)
        .prologue(b"WireGuard v1 zx2c4 Jason@zx2c4.com")
        .and_then(|builder| builder.local_private_key(responder.expose_secret()))
        .and_then(snow::Builder::build_responder)
        .expect("it has all it needs");
    let mut payload = [0; 12];
    state.read_message(noise, &mut payload).expect("it is for this responder");
    state.set_psk(2, psk).expect("32 bytes");
    let mut answer = [0; 48];
    state.write_message(&[], &mut answer).expect("it is its turn");
    let _ = state.dangerously_get_raw_split();
}

#[test]
#[ignore = "it takes times, and wants a quiet machine: cargo test -p mesh-noise -- --ignored --nocapture cost"]
fn a_handshake_costs_the_responder_at_most_six_tenths_of_snows_default() {
    let (start, [a, b], psk) = (origin(), keys(), [7; 32]);
    let config = PeerConfig { preshared: PresharedKey::from_bytes(psk), ..PeerConfig::default() };
    let mut initiator = Interface::<u8>::new(start, wall(), &a, [1; 32]);
    let mut responder = Interface::<u8>::new(start, wall(), &b, [2; 32]);
    responder.set_peer(start, a.public(), config.clone());
    let (mut ours, mut snows) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let now = start + millis(50) * round;
        initiator.remove_peer(&b.public());
        initiator.set_peer(now, b.public(), config.clone());
        initiator.want_session(now, &b.public());
        let initiation = initiator.poll_transmit().expect("a handshake was wanted").datagram;
        ours.push(timed(|| responder.handle_datagram(now, &0, None, &initiation).unwrap()));
        assert!(responder.poll_transmit().is_some());
        while responder.poll_event().is_some() {}
        while initiator.poll_event().is_some() {}
        snows.push(timed(|| by_snow(&b, &psk, &initiation[8..116])));
    }
    let (ours, snows) = (median(ours), median(snows));
    let ratio = ours.as_secs_f64() / snows.as_secs_f64();
    println!(
        "a handshake costs the responder {ours:?}; snow alone, with its default resolver: {snows:?}; ratio {ratio:.2}"
    );
    assert!(ratio <= 0.6, "ratio {ratio:.2}");
}
