"""What the benches that compare programs have in common: bars, medians, tables, and who else used the machine."""

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")

# Above this, in cores, others disturb a measurement.
QUIET = 0.1


class Failed(Exception):
    """A measurement could not be made."""


def run(*command, **options):
    """Runs a command to its end and returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Bar(NamedTuple):
    """What a figure of ours must be, and what we aim at: by itself, or as a ratio to a peer's of the same round."""

    figure: str
    relation: str
    must: float | None
    aim: float | None
    peer: str | None = None

    def meets(self, value, limit):
        return limit is None or (value >= limit if self.relation == ">=" else value <= limit)

    def __str__(self):
        return f"{self.figure}{f' / {self.peer}' if self.peer else ''}"


def series(turns, name, figure):
    """The values of one figure, one a round."""
    return [turn[name][figure] for turn in turns if figure in turn.get(name, {})]


def ratios(turns, ours, figure, peer):
    """Ours over the peer's, round by round. What took for ever on both sides tells nothing."""
    pairs = [(turn[ours][figure], turn[peer][figure]) for turn in turns
             if all(figure in turn.get(name, {}) for name in (ours, peer))]
    return [own / other for own, other in pairs if other and not (math.isinf(own) and math.isinf(other))]


def shown(values):
    if not values:
        return ""
    text = [number(value) for value in (statistics.median(values), min(values), max(values))]
    return f"{text[0]} ({text[1]} to {text[2]})" if len(values) > 1 else text[0]


def number(value):
    return "lost" if math.isinf(value) else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def print_figures(turns, to_best):
    """One row a figure, one column a contender, and what `to_best` says of ours beside the best peer."""
    names = list(dict.fromkeys(name for turn in turns for name in turn))
    figures = list(dict.fromkeys(figure for turn in turns for values in turn.values() for figure in values))
    rounds = f"Medians of {len(turns)} rounds (lowest to highest)" if len(turns) > 1 else "One round"
    print(f"\n{rounds}; the ratio is ours to the best peer's, round by round.\n")
    print("| | " + " | ".join(names) + " | ratio |\n" + "|---" * (len(names) + 2) + "|")
    for figure in figures:
        cells = [shown(series(turns, name, figure)) for name in names]
        print(f"| {figure} | " + " | ".join(cells) + f" | {to_best(figure)} |")


def ratio_to_best(turns, ours, peers, figure, lower_is_better):
    """Ours to the best peer's figure, in words; nothing where no peer has it."""
    medians = {name: statistics.median(values) for name in peers if (values := series(turns, name, figure))}
    if not medians or "of others" in figure:
        return ""
    best = (min if lower_is_better(figure) else max)(medians, key=medians.get)
    values = ratios(turns, ours, figure, best)
    return f"{statistics.median(values):.2f} x {best}" if values else ""


def print_bars(turns, ours, bars):
    """The table of bars; returns those that are missed, and those that nothing was measured for."""
    missed = []
    print("\n| bar | measured | must | aim | |\n|---|---|---|---|---|")
    for bar in bars:
        values = ratios(turns, ours, bar.figure, bar.peer) if bar.peer else series(turns, ours, bar.figure)
        limits = [f"{bar.relation} {limit}" if limit is not None else "" for limit in (bar.must, bar.aim)]
        if not values:
            verdict = "not measured"
        elif not bar.meets(statistics.median(values), bar.must):
            verdict = "MISSED"
        else:
            verdict = "aim reached" if bar.meets(statistics.median(values), bar.aim) else "met" if bar.must else "above aim"
        if verdict == "MISSED" or verdict == "not measured" and bar.must is not None:
            missed.append(f"{bar}: {shown(values) or 'not measured'}, must be {limits[0]}")
        print(f"| {bar} | {shown(values)} | {limits[0]} | {limits[1]} | {verdict} |")
    return missed


def print_head(script):
    """The command, the commit and the machine."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    print(f"`benches/{' '.join([script, *sys.argv[1:]])}` at {commit}; {os.cpu_count()} x {models[0] if models else '?'}, "
          f"Linux {platform.release()}")


def costs(program, *what):
    """Figures of single things, by `costs.rs`."""
    figures = {}
    for each in what:
        for line in run(program, each).splitlines():
            name, value = line.split("\t")
            figures[name] = float(value)
    return figures


def process_ticks(pid):
    """Clock ticks of a process, those of its ended children, and its parent."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14]), int(fields[1])


class Others:
    """CPU that other programs, and other guests of this machine's host, use while we measure."""

    def __init__(self):
        self.before, self.start = self.seconds(), time.monotonic()

    def cores(self):
        return max(0.0, self.seconds() - self.before) / (time.monotonic() - self.start)

    @staticmethod
    def seconds():
        """All processes but ourselves and our children, living or ended; kernel threads work for us."""
        ticks, parents = {}, {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    own, ended, parents[int(entry.name)] = process_ticks(entry.name)
                    ticks[int(entry.name)] = own + ended
                except (FileNotFoundError, ProcessLookupError):
                    pass
        passed_over = {2, os.getpid()}
        total = 0
        for pid, used in ticks.items():
            line = pid
            while line and line not in passed_over:
                line = parents.get(line, 0)
            total += 0 if line else used
        stolen = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[8]
        return (total + int(stolen)) / TICKS
