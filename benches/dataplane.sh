#!/usr/bin/env bash
# One TCP stream through a WireGuard tunnel between two network namespaces: mesh-wireguard beside Debian's wireguard-go,
# interleaved, with medians. Needs root, iperf3, wireguard-tools and wireguard-go; loads nothing but its own namespaces.
#
#   benches/dataplane.sh [ROUNDS [SECONDS]]      default 5 rounds of 4 seconds
#
# IPERF adds iperf3 options (IPERF="-P 4"); MESH_WIREGUARD names another binary than the release build.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5} seconds=${2:-4}
for program in ip iperf3 wg wireguard-go python3; do
  command -v "$program" >/dev/null || { echo "dataplane.sh needs $program" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo 'dataplane.sh needs root for network namespaces' >&2; exit 2; }
ours=${MESH_WIREGUARD:-target/release/mesh-wireguard}
[ -x "$ours" ] || cargo build -q --release -p mesh --bin mesh-wireguard

id=mp$$
work=$(mktemp -d)
end_round() {
  local ns pid
  for ns in "${id}a" "${id}b"; do
    for pid in $(ip netns pids "$ns" 2>/dev/null); do kill "$pid" 2>/dev/null || true; done
  done
  sleep 0.3
  for ns in "${id}a" "${id}b"; do ip netns del "$ns" 2>/dev/null || true; done
}
trap 'end_round; rm -rf "$work"' EXIT

ticks() { # CPU time of the two tunnel processes, in clock ticks
  local total=0 pid fields
  for pid in "$@"; do
    read -r -a fields <<<"$(sed 's/.*) //' "/proc/$pid/stat")"
    total=$((total + fields[11] + fields[12]))
  done
  echo "$total"
}

round() { # round NAME BINARY : one measurement, one line into $work/lines
  local name=$1 binary=$2 end number before after pids=()
  ip netns add "${id}a"
  ip netns add "${id}b"
  ip link add e0 netns "${id}a" type veth peer name e0 netns "${id}b"
  for end in a b; do
    [ $end = a ] && number=1 || number=2
    ip -n "$id$end" link set lo up
    ip -n "$id$end" addr add 192.168.77.$number/24 dev e0
    ip -n "$id$end" link set e0 up
    LOG_LEVEL=error RUST_LOG=error ip netns exec "$id$end" "$binary" --foreground "$id$end" >"$work/log" 2>&1 &
    pids+=($!)
    until [ -S "/var/run/wireguard/$id$end.sock" ]; do kill -0 "${pids[-1]}"; sleep 0.05; done
    (umask 077 && wg genkey >"$work/$end.key")
    wg pubkey <"$work/$end.key" >"$work/$end.pub"
    ip netns exec "$id$end" wg set "$id$end" private-key "$work/$end.key" listen-port 5182$number
    ip -n "$id$end" addr add 10.9.0.$number/24 dev "$id$end"
    ip -n "$id$end" link set "$id$end" mtu 1420 up
  done
  ip netns exec "${id}a" wg set "${id}a" peer "$(cat "$work/b.pub")" allowed-ips 10.9.0.2/32 endpoint 192.168.77.2:51822
  ip netns exec "${id}b" wg set "${id}b" peer "$(cat "$work/a.pub")" allowed-ips 10.9.0.1/32 endpoint 192.168.77.1:51821
  ip netns exec "${id}a" ping -q -c 3 -i 0.2 10.9.0.2 >/dev/null
  ip netns exec "${id}b" iperf3 -s -1 >/dev/null 2>&1 &
  sleep 0.5
  before=$(ticks "${pids[@]}")
  # shellcheck disable=SC2086
  ip netns exec "${id}a" iperf3 -c 10.9.0.2 -t "$seconds" -J ${IPERF:-} >"$work/iperf.json"
  after=$(ticks "${pids[@]}")
  python3 - "$name" "$work/iperf.json" $((after - before)) "$(getconf CLK_TCK)" >>"$work/lines" <<'PY'
import json, sys
name, file, ticks, per_second = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
received = json.load(open(file))["end"]["sum_received"]
print(name, received["bits_per_second"] / 1e6, ticks / per_second / (received["bytes"] / 1e9))
PY
  tail -n 1 "$work/lines"
  end_round
}

for _ in $(seq "$rounds"); do
  round mesh-wireguard "$ours"
  round wireguard-go wireguard-go
done
python3 - "$work/lines" <<'PY'
import statistics, sys
rows = {}
for line in open(sys.argv[1]):
    name, rate, cpu = line.split()
    rows.setdefault(name, []).append((float(rate), float(cpu)))
print("| tunnel | Mbit/s median (min to max) | CPU seconds per GB, median |\n|---|---|---|")
for name, values in rows.items():
    rates, cpus = [rate for rate, _ in values], [cpu for _, cpu in values]
    print(f"| {name} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | {statistics.median(cpus):.2f} |")
pairs = [a[0] / b[0] for a, b in zip(rows["mesh-wireguard"], rows["wireguard-go"])]
print(f"\nratio, pair by pair: median {statistics.median(pairs):.1f} ({min(pairs):.1f} to {max(pairs):.1f})")
PY
