#!/usr/bin/env bash
# The data plane in two network namespaces: mesh-wireguard beside the WireGuard implementations that are installed,
# interleaved, with medians. Needs root; touches nothing but namespaces of its own.
#
#   benches/dataplane.sh [--only tcp1,ping] [--rounds N] [--seconds S] [--json FILE] [IMPL...]
#
# IMPL is any of mesh-wireguard, wireguard-go, boringtun, gotatun. MESH_WIREGUARD names another binary than the release build.
set -euo pipefail
cd "$(dirname "$0")/.."
for program in ip ss tc ethtool ping iperf3 wg python3; do
  command -v "$program" >/dev/null || { echo "dataplane.sh needs $program" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo 'dataplane.sh needs root for network namespaces' >&2; exit 2; }
if [ -z "${MESH_WIREGUARD:-}" ]; then
  cargo build -q --release -p mesh --bin mesh-wireguard
  MESH_WIREGUARD=$PWD/target/release/mesh-wireguard
fi
cargo build -q --release -p mesh-benches --bins
export MESH_WIREGUARD DATAGRAMS=$PWD/target/release/datagrams
exec python3 benches/dataplane "$@"
