"""Medians, tables and ratios."""

import statistics


def series(turns, name, figure):
    """The values of one figure, one a round."""
    return [turn[name][figure] for turn in turns if figure in turn.get(name, {})]


def shown(values):
    if not values:
        return ""
    middle = statistics.median(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def lower_is_better(figure):
    return not ("Mbit/s" in figure or "packets/s" in figure)


def print_report(turns, ours):
    names = list(dict.fromkeys(name for turn in turns for name in turn))
    figures = list(dict.fromkeys(figure for turn in turns for values in turn.values() for figure in values))
    peers = [name for name in names if name not in (ours, "plain veth")]
    print("| | " + " | ".join(names) + " | to the best peer |")
    print("|" + "---|" * (len(names) + 2))
    for figure in figures:
        cells = [shown(series(turns, name, figure)) for name in names]
        print(f"| {figure} | " + " | ".join(cells) + f" | {to_best(turns, ours, peers, figure)} |")


def to_best(turns, ours, peers, figure):
    """Our median over that of the best peer, as a ratio."""
    own = series(turns, ours, figure)
    others = {name: statistics.median(values) for name in peers if (values := series(turns, name, figure))}
    if not own or not others or "others" in figure:
        return ""
    best = (min if lower_is_better(figure) else max)(others, key=others.get)
    return f"{statistics.median(own) / others[best]:.2f} x {best}" if others[best] else ""
