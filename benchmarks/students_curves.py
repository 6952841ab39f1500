"""Training curves of the linear attention students: a CSV of the numbers and the figure in docs/results_shapes.md.

    python -m benchmarks.students_curves       # after `python -m benchmarks.shapes_students`

Runs that are no longer there keep the rows that they have in the CSV.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.common import ROOT, progress
from benchmarks.shapes_students import ABLATIONS, STUDENTS, base_of

TABLE = "benchmarks/results/shapes_students_curves.csv"
FIGURE = "docs/images/students_curves.png"
PANELS = {"train/task": "task", "train/output": "output", "train/features": "features, relative"}
COLUMNS = ("experiment", "seed", "step", *PANELS, "val/loss_ema", "val/loss_teacher")
Curve = list[dict[str, str]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes"), help="as benchmarks.shapes_students has it")
    parser.add_argument("--table", type=Path, default=ROOT / TABLE)
    parser.add_argument("--figure", type=Path, default=ROOT / FIGURE)
    args = parser.parse_args(argv)
    curves = {**stored(args.table), **found(ROOT / args.runs / "students")}
    if not curves:
        print(f"There are no students in {args.runs} and none in {args.table}.", file=sys.stderr)
        return 1
    write(curves, args.table)
    draw(curves, args.figure)
    progress(f"{len(curves)} runs: {args.table}, {args.figure}")
    return 0


def stored(table: Path) -> dict[tuple[str, int], Curve]:
    curves = defaultdict(list)
    if table.exists():
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                curves[row["experiment"], int(row["seed"])].append(row)
    return dict(curves)


def found(folder: Path) -> dict[tuple[str, int], Curve]:
    """Of runs that came to their end, which is when `curve.csv` is written."""
    curves = {}
    for path in sorted(folder.glob("*/seed*/curve.csv")):
        experiment, seed = path.parts[-3], int(path.parts[-2].removeprefix("seed"))
        if experiment in STUDENTS | ABLATIONS:
            with path.open(newline="") as file:
                rows = [{name: row.get(name) or "" for name in COLUMNS[2:]} for row in csv.DictReader(file)]
            curves[experiment, seed] = [{"experiment": experiment, "seed": str(seed), **row} for row in rows]
    return curves


def write(curves: dict[tuple[str, int], Curve], table: Path) -> None:
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for key in sorted(curves):
            writer.writerows(curves[key])


def draw(curves: dict[tuple[str, int], Curve], path: Path) -> None:
    """A column for each student, a row for each loss; its seeds in one colour, its ablations in others."""
    from matplotlib.figure import Figure

    students = [name for name in STUDENTS if any(base_of(experiment) == name for experiment, _ in curves)]
    figure = Figure(figsize=(4 * len(students), 7), layout="constrained")
    panels = figure.subplots(len(PANELS), len(students), squeeze=False, sharex="col")
    for axes, words in zip(panels[:, 0], PANELS.values(), strict=True):
        axes.set_ylabel(words)
    for column, student in zip(panels.T, students, strict=True):
        own = [name for name in (student, *ABLATIONS) if base_of(name) == student]
        own = [name for name in own if any(experiment == name for experiment, _ in curves)]
        column[0].set_title((STUDENTS | ABLATIONS)[student])
        for axes, metric in zip(column, PANELS, strict=True):
            for colour, name in enumerate(own):
                for k, seed in enumerate(sorted(seed for experiment, seed in curves if experiment == name)):
                    points = [(int(row["step"]), float(row[metric])) for row in curves[name, seed] if row[metric]]
                    label = None if k else (STUDENTS | ABLATIONS)[name]
                    axes.plot(*zip(*points, strict=True), color=f"C{colour}", lw=1, alpha=0.8, label=label)
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
        column[0].legend(fontsize="small")
        column[-1].set_xlabel("optimizer step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
