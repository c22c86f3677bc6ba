"""The bars of `--check`, and figures that follow from others."""

import figures
from figures import Bar, ratio_to_best

OURS, PLAIN, CARRIER = "mesh-wireguard", "plain veth", "no cryptography"


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
    peers = [name for name in names if name not in (OURS, PLAIN, CARRIER)]
    figures.print_figures(turns, lambda figure: ratio_to_best(turns, OURS, peers, figure, lower_is_better))
