"""Rounds over sections and relays, interleaved, and the report. Started by relay.sh, whose head explains it."""

import argparse
import json
import os
import signal
import sys

import measure
from figures import QUIET, Failed, Others, costs, number, print_bars, print_head
from lab import IrohRelay, MeshRelay, OtherRelay
from report import IROH, OURS, PAIRS, bars, print_figures

SECTIONS = [*(f"load{pairs}" for pairs in PAIRS), "latency", "slow", "idle", "silent", "ceiling"]
# What is asked of ours alone unless `--all`.
OWN = ("idle", "silent")
ATTEMPTS = 3


def arguments():
    parser = argparse.ArgumentParser(prog="relay.sh")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections: of {','.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="about three minutes")
    parser.add_argument("--check", action="store_true", help="exit 1 naming each figure that misses its bar")
    parser.add_argument("--all", action="store_true", help="idle and silent clients at iroh-relay too")
    parser.add_argument("--without-peer", action="store_true", help="ours alone")
    parser.add_argument("--other", metavar="IP:PORT", help="a further DERP server, measured from outside")
    parser.add_argument("--json", help="a file for all figures of all rounds")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.only = options.only.split(",")
    options.pace = measure.QUICK if options.quick else measure.FULL
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"--only knows {','.join(SECTIONS)}, not {','.join(unknown)}")
    if options.check and (set(options.only) != set(SECTIONS) or options.without_peer):
        parser.error("--check wants everything")
    return options


def contenders(options):
    """What makes each relay, by name."""
    makers = {OURS: lambda: MeshRelay(OURS)}
    if not options.without_peer:
        makers[IROH] = lambda: IrohRelay(IROH)
    if options.other:
        makers[options.other] = lambda: OtherRelay(options.other)
    return makers


def take(section, relay, pace, known):
    """The section's figures of a relay of which others of this round are known."""
    if section.startswith("load"):
        return measure.throughput(relay, int(section.removeprefix("load")), pace)
    if section == "latency":
        return measure.latency(relay, pace, known)
    if section == "slow":
        return measure.slow_receiver(relay, pace, known)
    if section == "idle":
        return measure.idle(relay)
    return measure.silent(relay, pace)


def one_section(section, makers, options, turn):
    """Each relay once; returns the most CPU that others used beside one of them, in cores."""
    busiest = 0.0
    for name, make in makers.items():
        if section in OWN and (name == options.other or name != OURS and not options.all):
            continue
        others = Others()
        with make() as relay:
            figures = take(section, relay, options.pace, turn.get(name, {}))
        cores = others.cores()
        busiest = max(busiest, cores)
        turn.setdefault(name, {}).update(figures)
        line = ", ".join(f"{key} {number(value)}" for key, value in figures.items())
        print(f"{name}: {line}; others used {cores:.2f} cores", file=sys.stderr, flush=True)
    return busiest


def one_round(makers, options):
    """All sections once, each again while others disturb it and `--check` wants it quiet."""
    turn = {}
    for section in options.only:
        if section == "ceiling":
            continue
        for _ in range(ATTEMPTS if options.check and not options.quick else 1):
            busiest = one_section(section, makers, options, turn)
            if busiest <= QUIET:
                break
        own = turn.setdefault(OURS, {})
        own["CPU of others, cores"] = max(busiest, own.get("CPU of others, cores", 0.0))
    if "ceiling" in options.only:
        ceiling(turn.setdefault(OURS, {}))
    return turn


def ceiling(own):
    """What one core could relay if it did nothing but cryptography and system calls, and how much of that is reached."""
    single = costs(os.environ["COSTS"], "relay")
    moving = single["loopback TCP in and out, CPU s/GB"]
    for name, cost in single.items():
        own[name] = cost
    for suite in ("AES-256-GCM", "ChaCha20-Poly1305"):
        own[f"ceiling of one core with {suite}, MB/s"] = 1000 / (moving + single[f"{suite}, CPU s/GB"])
    if reached := own.get("10 pairs, CPU s/GB under the quota"):
        own["share of the ceiling with AES-256-GCM, %"] = 100 * (moving + single["AES-256-GCM, CPU s/GB"]) / reached


def main():
    options = arguments()
    for number_of_signal, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
        signal.signal(number_of_signal, lambda *_, code=code: sys.exit(code))
    makers, turns = contenders(options), []
    try:
        for _ in range(options.rounds):
            turns.append(one_round(makers, options))
    except Failed as reason:
        sys.exit(f"relay.sh: {reason}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(turns, file, indent=1)
    print_head("relay.sh")
    print_figures(turns)
    if options.check:
        missed = print_bars(turns, OURS, list(bars()))
        busiest = max(turn[OURS]["CPU of others, cores"] for turn in turns)
        if busiest > QUIET:
            missed.append(f"no quiet machine: others used up to {busiest:.2f} cores")
        for line in missed:
            print(f"missed: {line}")
        sys.exit(1 if missed else 0)


main()
