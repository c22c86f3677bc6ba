#!/usr/bin/env bash
# `mesh relay` beside iroh-relay, interleaved, under the same CPU quota: what a GB costs, how much is carried, what happens
# when more is offered, how long a packet takes meanwhile, and what clients cost that do nothing or misbehave. Needs root
# for its control group; all traffic stays on the loopback interface, and everything begun ends with it.
#
#   benches/relay.sh [--quick] [--check] [--only SECTIONS] [--rounds N] [--all] [--without-peer] [--other IP:PORT] [--json FILE]
#
# --quick         one short round: three minutes after the build
# --check         the bars: exits 1 naming each figure that misses its bar
# --only          sections, with commas: load10, load100, load1000 (pairs of clients, 1,400-byte packets); latency; slow
#                 (a receiver that reads nothing); idle (15,000 TLS connections); silent (connections that never log in);
#                 ceiling (what TLS and loopback TCP alone would allow)
# --all           idle and silent clients at iroh-relay too
# --without-peer  ours alone, and iroh-relay is not built
# --other         a further DERP server, whose certificate is not verified and whose CPU time is not known
#
# iroh-relay is the crate's own server, its load generator (benches/peers) the crate's own client; pacing and counting are
# one source for both (benches/src/relay_load.rs). Both servers are release builds with the same kind of certificate,
# TLS 1.3 with AES-256-GCM, no limits and their own defaults, and have 35 % of one core where a quota is named. It is
# handed out every 2.9 ms, the shortest period that the kernel allows.
#
# MESH names another mesh than the release build.
set -euo pipefail
cd "$(dirname "$0")/.."
iroh=iroh-relay@1.4.1

[ "$(id -u)" = 0 ] || { echo 'relay.sh needs root for a control group with a CPU quota' >&2; exit 2; }
command -v python3 >/dev/null || { echo 'relay.sh needs python3' >&2; exit 2; }
packages=(-p mesh-benches --bin relay_load --bin costs)
[ -n "${MESH:-}" ] || packages+=(-p mesh --bin mesh)
cargo build -q --release "${packages[@]}"
case " $* " in
  *' --without-peer '*) ;;
  *)
    # One folder for both, so that what they have in common is built once.
    [ -x target/peers/bin/iroh-relay ] ||
      CARGO_TARGET_DIR=target/peers/build cargo install -q --locked --root target/peers "$iroh" --features server
    CARGO_TARGET_DIR=target/peers/build cargo build -q --release --locked --manifest-path benches/peers/Cargo.toml
    ;;
esac
build=$PWD/target/release
export MESH=${MESH:-$build/mesh} RELAY_LOAD=$build/relay_load COSTS=$build/costs
export IROH_RELAY=$PWD/target/peers/bin/iroh-relay PEERS=$PWD/target/peers/build/release/mesh-bench-peers
export PYTHONPATH=benches/shared PYTHONDONTWRITEBYTECODE=1
exec python3 benches/relay "$@"
