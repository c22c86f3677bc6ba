"""What is measured of a relay. Each function returns figures by name."""

import math
import time
from typing import NamedTuple

from figures import Failed
from lab import kernel_memory

# Packets a second at which the CPU time of relays is compared: within what each of them carries under the quota.
EQUAL = 10_000
# Of a pair that is lightly loaded.
PROBES = 200
# By how much the load grows in search of what a relay carries.
STEP = 1.5
SWEEP = (10, 25, 50, 75, 100, 150, 200, 300)
MB = 1e6
PACKET = 1400


class Pace(NamedTuple):
    """How long things are measured."""

    seconds: float
    probe: float
    sweep: bool
    silent: int


QUICK = Pace(seconds=0.8, probe=3, sweep=False, silent=20_000)
FULL = Pace(seconds=2, probe=10, sweep=True, silent=100_000)
IDLE = 15_000


def cpu_per_gb(run):
    return run["server_cpu"] / (run["goodput"] * run["seconds"] / 1e9)


def equal_load(relay, load, pairs, pace):
    run = load.ask(f"{EQUAL} 0.3 {pace.seconds}")
    if run["received"] < 0.7 * EQUAL:
        raise Failed(f"{relay.name}: only {run['received']:.0f} of {EQUAL} packets/s arrive, with {pairs} pairs")
    return {f"{pairs} pairs, CPU s/GB": cpu_per_gb(run)}


def most(load, pace):
    """The run in which the most packets arrived, of several at rates about what the relay carries. Under the quota."""
    best, rate = None, EQUAL
    while best is None or best["received"] > 0.8 * rate / STEP:
        run = load.ask(f"{rate:.0f} 0.3 0.5")
        best = max(best or run, run, key=lambda run: run["received"])
        rate *= STEP
    for share in (1.0, 1.15):
        run = load.ask(f"{share * best['received']:.0f} 0.3 {pace.seconds}")
        best = max(best, run, key=lambda run: run["received"])
    return best


def capacity(load, pairs, pace, known):
    """Packets a second, from what was measured before or anew."""
    before = known.get(under_quota(pairs))
    return before * MB / PACKET if before else most(load, pace)["received"]


def under_quota(pairs):
    return f"{pairs} pairs, goodput under the quota, MB/s"


def throughput(relay, pairs, pace):
    """CPU time at a load that is the same for all; then what the relay carries under the quota, and under too much."""
    load, figures = relay.start("load", pairs), {}
    if relay.process:
        figures |= equal_load(relay, load, pairs, pace)
    relay.limit(True)
    best = most(load, pace)
    full = best["received"]
    sweep = {}
    for percent in SWEEP if pace.sweep and pairs == 100 else (300,):
        sweep[percent] = load.ask(f"{full * percent / 100:.0f} 0.5 {pace.seconds}")
    best = max([best, *sweep.values()], key=lambda run: run["received"])
    figures[under_quota(pairs)] = best["goodput"] / MB
    if relay.process:
        figures[f"{pairs} pairs, CPU s/GB under the quota"] = cpu_per_gb(best)
    figures[f"{pairs} pairs, goodput at 300 % load / peak"] = sweep[300]["goodput"] / best["goodput"]
    if len(sweep) > 1:
        for percent, run in sweep.items():
            figures[f"{pairs} pairs, goodput at {percent} % load, MB/s"] = run["goodput"] / MB
    figures[f"{pairs} pairs, CPU of the generator, cores"] = best["own_cpu"] / best["seconds"]
    load.end()
    relay.limit(False)
    relay.alive()
    return figures


def latency(relay, pace, known, pairs=100):
    """Round trips of one pair, alone and while others offer half as much again as is carried."""
    load, probe = relay.start("load", pairs), relay.start("probe", PROBES, urgent=True)
    relay.limit(True)
    full = capacity(load, pairs, pace, known)
    alone = probe.ask(pace.probe)
    load.tell(f"{1.5 * full:.0f} 0.5 {pace.probe + 1}")
    time.sleep(0.7)
    beside = probe.ask(pace.probe)
    run = load.answer(60)
    load.end()
    probe.end()
    relay.limit(False)
    relay.alive()
    return {
        "round trip idle, p50 us": alone["p50"],
        "round trip idle, p99 us": alone["p99"],
        "round trip at 150 % load, p50 us": beside["p50"],
        "round trip at 150 % load, p99 us": beside["p99"],
        "round trip at 150 % load, lost of a hundred": 100 * beside["lost"] / beside["sent"],
        "round trip p99, at 150 % load / idle": beside["p99"] / alone["p99"],
        "goodput meanwhile, MB/s": run["goodput"] / MB,
    }


def slow_receiver(relay, pace, known, pairs=10):
    """What a client that reads nothing, and is sent as much as others are, costs those."""
    load = relay.start("load", pairs)
    relay.limit(True)
    rate = 0.75 * capacity(load, pairs, pace, known)
    before = load.ask(f"{rate:.0f} 0.5 {2 * pace.seconds}")
    slow = relay.start("slow", rate / pairs)
    during = load.ask(f"{rate:.0f} 1 {2 * pace.seconds}")
    slow.end()
    load.end()
    relay.limit(False)
    relay.alive()
    return {"goodput beside a slow receiver / without": during["goodput"] / before["goodput"]}


def idle(relay, count=IDLE):
    """Memory per connection of clients that do nothing, and what it takes when all of them connect anew at once."""
    empty, kernel = relay.memory(), kernel_memory()
    clients = relay.start("idle", count)
    time.sleep(2)
    steady = relay.memory()
    figures = {
        "idle: memory per connection, KiB": (steady - empty) / count / 1024,
        # Both ends are on this machine.
        "idle: kernel memory per end of a connection, KiB": (kernel_memory() - kernel) / count / 2 / 1024,
    }
    relay.forget_peak()
    again = clients.ask(count)
    figures["idle: all connected anew, s"] = again["seconds"]
    figures["idle: attempts that failed meanwhile"] = again["failures"]
    figures["idle: peak memory meanwhile / steady"] = relay.memory(peak=True) / steady
    clients.end()
    relay.alive()
    return figures


def silent(relay, pace, at_once=IDLE):
    """Connections that never say anything, half of them with TLS, beside clients that are served."""
    load, probe, figures = relay.start("load", 10), relay.start("probe", PROBES, urgent=True), {}
    before = relay.memory()
    relay.forget_peak()
    alone = load.ask(f"{EQUAL} 0.5 {pace.seconds}")
    worst, lost = math.inf, 0.0
    for kind in ("tcp", "tls"):
        total = pace.silent // 2
        crowd = relay.start("silent", kind, min(at_once, total), total)
        crowd.tell("")
        while True:
            beside = load.ask(f"{EQUAL} 0.2 {pace.seconds}")
            trips = probe.ask(1)
            worst = min(worst, beside["goodput"] / alone["goodput"])
            lost = max(lost, trips["lost"] / trips["sent"])
            if crowd.has_answered():
                break
        done = crowd.answer(1)
        figures[f"silent {kind}: connections made"] = done["connected"]
        figures[f"silent {kind}: seconds"] = done["seconds"]
        crowd.end()
    figures["silent: memory at most, MiB above before"] = (relay.memory(peak=True) - before) / 2**20
    figures["silent: goodput beside them / without, at worst"] = worst
    figures["silent: round trips lost beside them, % at worst"] = 100 * lost
    load.end()
    probe.end()
    relay.alive()
    return figures
