"""What it cost to reach a level of GenEval: arithmetic on the curves of training runs (`benchmarks.speedrun`).

A point of a curve is an evaluation: {"step", "samples", "seconds", "core_seconds", "geneval_overall", ...}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

LEVELS = (0.5, 0.8, 0.9, 0.95)
SCORE = "geneval_overall"
COSTS = {"seconds": "seconds", "core_seconds": "core-seconds", "samples": "samples"}
Point = Mapping[str, float]
Curves = dict[int, list[Point]]  # by training seed


def curves(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """Of the runs of one experiment: a run's evaluations or, of runs of several budgets, the last one of each."""
    found: Curves = {}
    for row in rows:
        found.setdefault(row["seed"], []).extend(row["curve"][-1:] if row.get("budget") else row["curve"])
    return {seed: sorted(found[seed], key=lambda point: point["samples"]) for seed in sorted(found)}


def reached(curve: Sequence[Point], level: float) -> Point | None:
    """The first evaluation at `level` or above."""
    return next((point for point in curve if point[SCORE] >= level), None)


def within(curve: Sequence[Point], budget: Mapping[str, float]) -> Point | None:
    """The last evaluation within a budget such as {"core_seconds": 600}; without one the last of all."""
    return next((p for p in reversed(curve) if all(p[cost] <= most for cost, most in budget.items())), None)


def best(curve: Sequence[Point]) -> float:
    return max(point[SCORE] for point in curve)


def cost(found: Curves, level: float, name: str) -> str:
    """Mean and standard deviation over seeds of what it cost to reach `level`, if all of them did."""
    points = [reached(curve, level) for curve in found.values()]
    if None not in points:
        return spread([point[name] for point in points])
    reach = sum(point is not None for point in points)
    top = f"best {max(map(best, found.values())):.2f}"
    return f"not reached ({top})" if not reach else f"reached by {reach} of {len(points)} seeds"


def ratio(found: Curves, others: Curves, level: float, name: str) -> str:
    """How many times less than `others` it cost to reach `level`, seed by seed; ">" where a seed of `others` had not
    reached it by its end, so that its whole cost is a lower bound."""
    ratios, bound = [], False
    for seed in found.keys() & others.keys():
        own, other = reached(found[seed], level), reached(others[seed], level)
        if own is None:
            return ""
        bound |= other is None
        ratios.append((other or others[seed][-1])[name] / own[name])
    return ("> " if bound else "") + spread(ratios, 2) if ratios else ""


def spread(values: Sequence[float], digits: int = 0) -> str:
    shown = f"{mean(values):,.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {stdev(values):,.{digits}f}"


def seed_lines(found: Curves, levels: Iterable[float]) -> list[dict[str, str]]:
    """A table of each level and cost: a column a seed, and the mean."""
    lines = []
    for level in levels:
        for name, word in COSTS.items():
            line = {"level": f"{level:g}", "cost": word, "mean": cost(found, level, name)}
            for seed, curve in found.items():
                point = reached(curve, level)
                line[f"seed{seed}"] = f"{point[name]:,.0f}" if point else f"not reached (best {best(curve):.2f})"
            lines.append(line)
    return lines


def level_line(found: Curves, others: Curves | None, level: float) -> dict[str, str]:
    """A level with all costs, and how many times less they are than those of `others`."""
    line = {"level": f"{level:g}", "trainings": str(len(found))} | {name: cost(found, level, name) for name in COSTS}
    if others is not None:
        line |= {f"ratio_{name}": ratio(found, others, level, name) for name in ("core_seconds", "samples")}
    return line


LEVEL_COLUMNS = {"level": "GenEval", **COSTS, "ratio_core_seconds": "core-seconds, times less than the base"}
LEVEL_COLUMNS |= {"ratio_samples": "samples, times less than the base", "trainings": "seeds"}
