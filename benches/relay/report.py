"""The bars of `--check`, and how ours compares with the others."""

import figures
from figures import Bar, ratio_to_best
from measure import IDLE, under_quota

OURS, IROH = "mesh relay", "iroh-relay"
PAIRS = (10, 100, 1000)


def bars():
    for pairs in PAIRS:
        yield Bar(f"{pairs} pairs, CPU s/GB", "<=", 0.67, 0.5, IROH)
        yield Bar(under_quota(pairs), ">=", 1.5, 2, IROH)
        yield Bar(f"{pairs} pairs, goodput at 300 % load / peak", ">=", 0.9, 0.95)
    yield Bar("round trip p99, at 150 % load / idle", "<=", 3, 2)
    yield Bar("goodput beside a slow receiver / without", ">=", 0.95, 0.99)
    yield Bar("idle: memory per connection, KiB", "<=", 20, 12)
    yield Bar("idle: all connected anew, s", "<=", 25, 15)
    yield Bar("idle: peak memory meanwhile / steady", "<=", 2, 1.5)
    # Twice what as many idle clients may have.
    yield Bar("silent: memory at most, MiB above before", "<=", round(2 * 20 * IDLE / 1024), None)
    yield Bar("silent: goodput beside them / without, at worst", ">=", 0.95, 0.99)


def print_figures(turns):
    peers = list(dict.fromkeys(name for turn in turns for name in turn if name != OURS))
    figures.print_figures(turns, lambda figure: ratio_to_best(turns, OURS, peers, figure, lower_is_better))


def lower_is_better(figure):
    return "goodput" not in figure
