"""Rounds over settings and contenders, interleaved, and the report. Started by dataplane.sh, whose head explains it."""

import argparse
import json
import os
import shutil
import signal
import sys

import measure
from figures import QUIET, Failed, Others, costs, number, print_bars, print_head
from lab import PEERS, Carrier, Lab
from report import CARRIER, OURS, PLAIN, bars, derive, print_figures

MAIN = ["ping", "tcp1", "tcp4", "udp64", "udp1372"]
SECTIONS = [*MAIN, "offloads", "shaped", "ceiling", "costs"]
RATES = [100, 1000, 2500]

ATTEMPTS = 5


def arguments():
    parser = argparse.ArgumentParser(prog="dataplane.sh")
    parser.add_argument("impl", nargs="*", help=f"of {', '.join([OURS, *PEERS])}; default all that are installed")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections: of {','.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, help="default 3; 5 with --check, 1 with --quick")
    parser.add_argument("--seconds", type=float, help="of each stream; default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="about three minutes")
    parser.add_argument("--check", action="store_true", help="exit 1 naming each figure that misses its bar")
    parser.add_argument("--json", help="a file for all figures of all rounds")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5 if options.check else 3)
    options.seconds = options.seconds or (1 if options.quick else 3)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only knows {','.join(SECTIONS)}, not {','.join(unknown)}")
    if options.check and (options.impl or set(options.only) != set(SECTIONS) or options.rounds < 5):
        parser.error("--check wants everything, and at least 5 rounds")
    return options


def implementations(wanted, all_of_them):
    """The commands of those that are installed."""
    commands = {OURS: [os.environ["MESH_WIREGUARD"], "--foreground"]} | PEERS
    for name in wanted:
        if name not in commands:
            sys.exit(f"dataplane.sh knows {', '.join(commands)}, not {name}")
    missing = [name for name in wanted or commands if not shutil.which(commands[name][0])]
    if missing:
        print(f"not installed (--install does that): {', '.join(missing)}", file=sys.stderr)
        if all_of_them and set(missing) - {"wireguard-go"}:
            sys.exit(1)
    return {name: commands[name] for name in wanted or commands if name not in missing}


def tcp_figures(lab, streams, seconds, ping):
    figures = measure.tcp(lab, f"TCP x{streams} a to b", streams, seconds, ping=ping)
    return figures | measure.tcp(lab, f"TCP x{streams} b to a", streams, seconds, reverse=True)


def main_figures(lab, only, seconds):
    figures = {}
    if "ping" in only:
        # Below 10 ms ping spins instead of sleeping, and keeps one of the cores from being idle.
        figures |= {f"ping idle, {key}": value for key, value in measure.pings(lab, 200, 0.02).items()}
    for streams in (1, 4):
        if f"tcp{streams}" in only:
            figures |= tcp_figures(lab, streams, seconds, ping=streams == 1)
    for size in (64, 1372):
        if f"udp{size}" in only and lab.tunnels:
            figures |= measure.datagrams(lab, os.environ["DATAGRAMS"], size, min(seconds, 0.7), 60_000)
    if lab.tunnels:
        figures["peak memory, MiB"] = lab.peak_memory()
    return figures


def no_offload_figures(lab, seconds):
    figures = tcp_figures(lab, 1, seconds, ping=False) | tcp_figures(lab, 4, seconds, ping=False)
    return {f"no offloads: {key}": value for key, value in figures.items()}


def shaped_figures(lab, seconds):
    # What TCP needs to find the rate is not what the link loses.
    rate = measure.tcp(lab, "TCP x1 a to b", 1, max(seconds, 2), settle=1)["TCP x1 a to b, Mbit/s"]
    return {f"shaped to {lab.rate} Mbit/s: TCP x1 a to b, Mbit/s": rate}


def cost_figures():
    figures = costs(os.environ["COSTS"], "cipher", "handshake", "memory")
    figures["responder / snow's, CPU"] = (
        figures["responder, CPU us"] / figures["responder by snow's default resolver, CPU us"])
    return figures


def settings(commands, only, seconds):
    """Every setting of a round: for each contender, what makes its lab, and what is measured there."""
    contenders = commands | {PLAIN: None}
    if set(only) & set(MAIN):
        yield {name: (lambda command=command: Lab(command), lambda lab: main_figures(lab, only, seconds))
               for name, command in contenders.items()}
    if "ceiling" in only:
        yield {CARRIER: (lambda: Carrier(os.environ["CARRIER"]), lambda lab: tcp_figures(lab, 1, seconds, ping=True))}
    if "offloads" in only:
        yield {name: (lambda command=command: Lab(command, offloads=False),
                      lambda lab: no_offload_figures(lab, seconds)) for name, command in contenders.items()}
    if "shaped" in only:
        for rate in RATES:
            yield {name: (lambda command=command, rate=rate: Lab(command, mtu=1280, rate=rate),
                          lambda lab: shaped_figures(lab, seconds)) for name, command in contenders.items()}


def one_setting(contenders, turn):
    """Each contender once; returns the most CPU that others used beside one of them, in cores."""
    busiest = 0.0
    for name, (make, take) in contenders.items():
        others = Others()
        with make() as lab:
            figures = take(lab)
        busiest = max(busiest, others.cores())
        turn.setdefault(name, {}).update(figures)
        line = ", ".join(f"{key} {number(value)}" for key, value in figures.items())
        print(f"{name}: {line}; others used {others.cores():.2f} cores", file=sys.stderr, flush=True)
    return busiest


def one_round(commands, options):
    """All settings once, each again while others disturb it and `--check` wants it quiet."""
    turn = {}
    for contenders in settings(commands, options.only, options.seconds):
        for attempt in range(ATTEMPTS):
            busiest = one_setting(contenders, turn)
            if busiest <= QUIET or not options.check:
                break
            print(f"again: others used {busiest:.2f} cores", file=sys.stderr)
        own = turn.setdefault(OURS, {})
        own["CPU of others, cores"] = max(busiest, own.get("CPU of others, cores", 0.0))
    if set(options.only) & {"costs", "ceiling"}:
        turn.setdefault(OURS, {}).update(cost_figures())
    derive(turn, os.cpu_count())
    return turn


def main():
    options = arguments()
    for number_of_signal, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
        signal.signal(number_of_signal, lambda *_, code=code: sys.exit(code))
    commands = implementations(options.impl, options.check)
    turns = []
    try:
        for _ in range(options.rounds):
            turns.append(one_round(commands, options))
    except Failed as reason:
        sys.exit(f"dataplane.sh: {reason}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(turns, file, indent=1)
    print_head("dataplane.sh")
    print_figures(turns)
    if options.check:
        missed = print_bars(turns, OURS, bars())
        busiest = max(turn[OURS]["CPU of others, cores"] for turn in turns)
        if busiest > QUIET:
            missed.append(f"no quiet machine: others used up to {busiest:.2f} cores in {ATTEMPTS} attempts")
        for line in missed:
            print(f"missed: {line}")
        sys.exit(1 if missed else 0)


main()
