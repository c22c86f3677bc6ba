"""Rounds over the implementations, interleaved, and the report. Started by dataplane.sh."""

import argparse
import json
import os
import shutil
import signal
import sys

import measure
from lab import PEERS, Failed, Lab, Others
from report import print_report

OURS = "mesh-wireguard"
SECTIONS = ["ping", "tcp1", "tcp4", "udp64", "udp1372", "plain"]


def arguments():
    parser = argparse.ArgumentParser(prog="dataplane.sh", description="The data plane beside its peers; see dataplane.sh.")
    parser.add_argument("impl", nargs="*", help=f"{', '.join([OURS, *PEERS])}; default all that are installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of each stream; default 3")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--json", help="a file for all figures")
    return parser.parse_args()


def implementations(wanted):
    """The commands of those that are installed."""
    commands = {OURS: [os.environ["MESH_WIREGUARD"], "--foreground"]} | PEERS
    for name in wanted:
        if name not in commands:
            sys.exit(f"dataplane.sh knows {', '.join(commands)}, not {name}")
    found = {name: command for name, command in commands.items() if shutil.which(command[0])}
    for name in wanted or commands:
        if name not in found:
            print(f"{name} is not installed", file=sys.stderr)
    return {name: command for name, command in found.items() if not wanted or name in wanted}


def tunnel_figures(lab, only, seconds):
    """Everything about one tunnel."""
    figures = {}
    if "ping" in only:
        figures |= {f"ping idle, {key}": value for key, value in measure.pings(lab, 500, 0.002).items()}
    for streams in (1, 4):
        if f"tcp{streams}" in only:
            name = f"TCP x{streams}"
            figures |= measure.tcp(lab, f"{name} a to b", streams, seconds, ping=streams == 1)
            figures |= measure.tcp(lab, f"{name} b to a", streams, seconds, reverse=True)
    for size in (64, 1372):
        if f"udp{size}" in only:
            figures |= measure.datagrams(lab, os.environ["DATAGRAMS"], size, min(seconds, 1), 60_000)
    return figures


def one_round(commands, only, seconds):
    """One turn of each implementation: figures by name, with the CPU that others used."""
    turn = {}
    for name, command in commands.items():
        others = Others()
        with Lab(command) as lab:
            turn[name] = tunnel_figures(lab, only, seconds)
            turn[name]["peak memory, MiB"] = lab.peak_memory()
        turn[name]["CPU of others, cores"] = others.cores()
        print(name, {key: round(value, 2) for key, value in turn[name].items()}, file=sys.stderr)
    if "plain" in only:
        with Lab(None) as lab:
            turn["plain veth"] = tunnel_figures(lab, set(only) - {"udp64", "udp1372"}, seconds)
    return turn


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    only = options.only.split(",")
    if unknown := set(only) - set(SECTIONS):
        sys.exit(f"--only knows {','.join(SECTIONS)}, not {','.join(unknown)}")
    commands = implementations(options.impl)
    turns = []
    try:
        for _ in range(options.rounds):
            turns.append(one_round(commands, only, options.seconds))
    except Failed as reason:
        sys.exit(f"dataplane.sh: {reason}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(turns, file, indent=1)
    print_report(turns, OURS)


main()
