"""Medians, tables, ratios, and the bars of `--check`."""

import math
import statistics
from typing import NamedTuple

OURS, PLAIN, CARRIER = "mesh-wireguard", "plain veth", "no cryptography"


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


def bars():
    streams = [f"TCP x{streams} {way}" for streams in (1, 4) for way in ("a to b", "b to a")]
    for stream in streams:
        yield Bar(f"{stream}, Mbit/s", ">=", 3.6, 4, "gotatun")
        yield Bar(f"{stream}, Mbit/s", ">=", 4.5, 5, "boringtun")
        yield Bar(f"{stream}, CPU s/GB", "<=", 0.30, 0.26, "gotatun")
    for stream in streams:
        yield Bar(f"no offloads: {stream}, Mbit/s", ">=", 2.5, 3, "gotatun")
    yield Bar("UDP 64 B without loss, packets/s", ">=", 1.2, 1.35, "boringtun")
    yield Bar("ping idle, p50 us", "<=", 1.25, 1.0, "boringtun")
    yield Bar("ping under load, p99 us", "<=", 0.5, None, "gotatun")
    yield Bar("ping under load, p99 us", "<=", None, 1.2, "boringtun")
    yield Bar("share of the machine's ceiling, %", ">=", 65, 75)
    yield Bar("shaped to 1000 Mbit/s: loss, %", "<=", 6, 6)
    yield Bar("peak memory, MiB", "<=", 20, 10)
    yield Bar("memory per configured peer, bytes", "<=", 1024, 1024)
    yield Bar("memory per peer with a live session, bytes", "<=", 4096, 4096)
    yield Bar("responder / snow's, CPU", "<=", 0.6, 0.5)


def series(turns, name, figure):
    """The values of one figure, one a round."""
    return [turn[name][figure] for turn in turns if figure in turn.get(name, {})]


def ratios(turns, figure, peer):
    """Ours over the peer's, round by round. What took for ever on both sides tells nothing."""
    pairs = [(turn[OURS][figure], turn[peer][figure]) for turn in turns
             if all(figure in turn.get(name, {}) for name in (OURS, peer))]
    return [own / other for own, other in pairs if other and not (math.isinf(own) and math.isinf(other))]


def shown(values):
    if not values:
        return ""
    text = [number(value) for value in (statistics.median(values), min(values), max(values))]
    return f"{text[0]} ({text[1]} to {text[2]})" if len(values) > 1 else text[0]


def number(value):
    return "lost" if math.isinf(value) else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def lower_is_better(figure):
    return not ("Mbit/s" in figure and "loss" not in figure or "packets/s" in figure)


def derive(turn, cores):
    """Figures that follow from those of several contenders."""
    plain = turn.get(PLAIN, {})
    for name, figures in turn.items():
        for figure, rate in list(figures.items()):
            if figure.startswith("shaped") and figure.endswith("Mbit/s") and name != PLAIN and figure in plain:
                figures[figure.split(":")[0] + ": loss, %"] = 100 * (1 - rate / plain[figure])
    own, moving = turn.get(OURS, {}), turn.get(CARRIER, {}).get("TCP x1 a to b, CPU s/GB of all")
    if moving and "TCP x1 a to b, Mbit/s" in own:
        ceiling = cores / (moving + own["cipher, CPU s/GB"]) * 8000
        own["the machine's ceiling, Mbit/s"] = ceiling
        own["share of the machine's ceiling, %"] = 100 * own["TCP x1 a to b, Mbit/s"] / ceiling


def print_figures(turns):
    names = list(dict.fromkeys(name for turn in turns for name in turn))
    figures = list(dict.fromkeys(figure for turn in turns for values in turn.values() for figure in values))
    peers = [name for name in names if name not in (OURS, PLAIN, CARRIER)]
    rounds = f"Medians of {len(turns)} rounds (lowest to highest)" if len(turns) > 1 else "One round"
    print(f"\n{rounds}; the ratio is ours to the best peer's, round by round.\n")
    print("| | " + " | ".join(names) + " | ratio |\n" + "|---" * (len(names) + 2) + "|")
    for figure in figures:
        cells = [shown(series(turns, name, figure)) for name in names]
        print(f"| {figure} | " + " | ".join(cells) + f" | {to_best(turns, peers, figure)} |")


def to_best(turns, peers, figure):
    medians = {name: statistics.median(values) for name in peers if (values := series(turns, name, figure))}
    if not medians or "of others" in figure:
        return ""
    best = (min if lower_is_better(figure) else max)(medians, key=medians.get)
    values = ratios(turns, figure, best)
    return f"{statistics.median(values):.2f} x {best}" if values else ""


def print_bars(turns):
    """The table of bars; returns those that are missed, and those that nothing was measured for."""
    missed = []
    print("\n| bar | measured | must | aim | |\n|---|---|---|---|---|")
    for bar in bars():
        values = ratios(turns, bar.figure, bar.peer) if bar.peer else series(turns, OURS, bar.figure)
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
