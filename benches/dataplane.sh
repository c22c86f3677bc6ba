#!/usr/bin/env bash
# The data plane in two network namespaces: mesh-wireguard beside the WireGuard implementations that are installed,
# interleaved (A B C A B C), medians with lowest and highest, and ratios to the best peer. Needs root; touches nothing but
# namespaces and processes of its own, which end with it.
#
#   benches/dataplane.sh [--install] [--quick | --check] [--only SECTIONS] [--rounds N] [--seconds S] [--json FILE] [IMPL...]
#
# IMPL       of mesh-wireguard, wireguard-go, boringtun, gotatun; default all that are installed
# --install  installs what is missing: packages from Debian, boringtun-cli and gotatun-cli from crates.io into target/peers
# --quick    one short round: three minutes
# --check    five rounds and the bars: exits 1 naming each figure that misses its bar, or the peer that is not installed.
#            Prints the CPU that others used meanwhile, and measures again where that was above a tenth of a core
# --only     sections, with commas: ping, tcp1, tcp4, udp64, udp1372; offloads (veth without any: no UDP segmentation, no
#            gathering, no checksums); shaped (to 100, 1,000 and 2,500 Mbit/s: what is lost compared with the plain link);
#            ceiling (packets carried without cryptography); costs (cipher, handshake, memory per peer)
#
# MESH_WIREGUARD names another binary than the release build.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:$PWD/target/peers/bin

install_missing() {
  local pair packages=()
  for pair in ip:iproute2 ethtool:ethtool ping:iputils-ping iperf3:iperf3 wg:wireguard-tools wireguard-go:wireguard-go python3:python3; do
    command -v "${pair%:*}" >/dev/null || packages+=("${pair#*:}")
  done
  if [ ${#packages[@]} -gt 0 ]; then
    echo "installing from Debian: ${packages[*]}" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  fi
  for pair in boringtun-cli:boringtun-cli@0.7.1 gotatun:gotatun-cli@0.10.2; do
    command -v "${pair%:*}" >/dev/null || cargo install -q --locked --root target/peers "${pair#*:}"
  done
}

[ "$(id -u)" = 0 ] || { echo 'dataplane.sh needs root for network namespaces' >&2; exit 2; }
arguments=()
for argument in "$@"; do
  if [ "$argument" = --install ]; then install_missing; else arguments+=("$argument"); fi
done
for program in ip ss tc ethtool ping iperf3 wg python3; do
  command -v "$program" >/dev/null || { echo "dataplane.sh needs $program (--install)" >&2; exit 2; }
done
packages=(-p mesh-benches --bin datagrams --bin carrier --bin costs)
[ -n "${MESH_WIREGUARD:-}" ] || packages+=(-p mesh --bin mesh-wireguard)
cargo build -q --release "${packages[@]}"
build=$PWD/target/release
export MESH_WIREGUARD=${MESH_WIREGUARD:-$build/mesh-wireguard}
export DATAGRAMS=$build/datagrams CARRIER=$build/carrier COSTS=$build/costs
export PYTHONPATH=benches/shared PYTHONDONTWRITEBYTECODE=1
exec python3 benches/dataplane "${arguments[@]}"
