"""Speedrun: what it costs to train to a level of GenEval (shapes), over several seeds (docs/speedrun.md).

    python -m benchmarks.speedrun experiments/shapes/speedrun.yaml --compare experiments/shapes/speedrun_baseline.yaml
    python -m benchmarks.speedrun experiments/shapes/speedrun.yaml --steps 500 1000 2000  # a run for each budget
    python -m benchmarks.speedrun experiments/sweeps/speedrun.yaml --seeds 0              # what helps and what does not
    python -m benchmarks.tables                                                          # then: the tables in the docs

A run is `emmdit fit` with the Evaluation callback of the first experiment; its evaluations make a row of the ledger.
It may be killed at any time: rows in the ledger are not repeated, and a run resumes from its last checkpoint. A run
folder belongs to its settings and sources, so that nothing is resumed with others.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import ROOT, markdown_table, progress, show, whole, write_json
from benchmarks.levels import COSTS, LEVEL_COLUMNS, LEVELS, SCORE, Point, best, curves, level_line, seed_lines
from benchmarks.sweep import Row, Sweep, Task, committed, laid_over, run_options, work_all
from emmdit.config_text import flatten_config, read_yaml
from emmdit.evaluation import ledger
from emmdit.files import read_json
from emmdit.provenance import cpu_name, hardware, machine, source_id
from lightning_modules.mlflow_runs import read_training_record

LEDGER = "benchmarks/results/speedrun.json"
RUNS = "runs/speedrun"


@dataclasses.dataclass(frozen=True)
class Run(Task):
    """A training whose own evaluations are its score."""

    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # the callback, as in a config
    budget: int | None = None  # steps, in place of the experiment's own
    threads: int | None = None
    source: str = ""
    stop: float | None = None
    anew = "--again"

    @property
    def name(self) -> str:
        """In the ledger."""
        return f"{self.experiment}/{self.budget}_steps" if self.budget else self.experiment

    @property
    def row(self) -> Row:
        row = super().row
        if self.budget is None:
            return row
        steps = [f"--trainer.max_steps={self.budget}", f"--trainer.val_check_interval={self.budget}"]
        scheduler = dataclasses.replace(self, budget=None).config().get("model", {}).get("init_args", {})
        if "total" in (scheduler.get("scheduler") or {}).get("init_args", {}):  # it decays by then
            steps.append(f"--model.init_args.scheduler.init_args.total={self.budget}")
        return dataclasses.replace(row, options=[*row.options, *steps])

    @cached_property
    def digest(self) -> str:
        """Of the settings, whatever the code."""
        settings = [self.config(), self.row.options, self.evaluation, self.trainer, self.threads]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]

    @property
    def folder(self) -> Path:
        return self.sweep.runs / self.name / f"{self.digest}-{self.source}" / f"seed{self.seed}"

    def fit(self) -> list[str]:
        """Arguments of `emmdit`; writes the file with the callback."""
        others = [c for c in self.config()["trainer"].get("callbacks") or [] if not is_evaluation(c)]
        file = ROOT / self.folder / "evaluation.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        stop_at = {} if self.stop is None else {"stop_at": {SCORE: self.stop}}
        evaluation = laid_over(self.evaluation, {"init_args": stop_at})
        file.write_text(yaml.safe_dump({"trainer": {"callbacks": [*others, evaluation]}}))
        command = super().fit()
        at = 1 + len(self.files())
        return [*command[:at], "-c", str(file), *command[at:]]

    def curve(self) -> list[Point]:
        """The evaluations so far."""
        found = [read_json(path) for path in (ROOT / self.folder).glob("evaluation/step_*/*/evaluation.json")]
        points = [{"step": one["step"], **one["training"], **one["ledger_metrics"]} for one in found]
        return sorted(points, key=lambda point: point["step"])

    def finished(self, curve: Sequence[Point]) -> bool:
        stopped = self.stop is not None and bool(curve) and best(curve) >= self.stop
        return stopped or (bool(curve) and curve[-1]["step"] >= self.steps())

    def trained(self, at: int) -> bool:
        return self.finished(self.curve())

    def scored(self, args: argparse.Namespace) -> bool:
        found = self.stored(args)
        if found is None or not self.finished(found["curve"]):
            return False
        return found["source"] == self.source or not (args.again or "-" in found["source"])  # "-": uncommitted changes

    def siblings(self, args: argparse.Namespace) -> list[dict[str, Any]]:
        rows = [] if args.again else [row for row in ledger.read(ROOT / args.ledger) if row["experiment"] == self.name]
        return [row for row in rows if row["settings"]["config"] == self.digest]

    def stored(self, args: argparse.Namespace) -> dict[str, Any] | None:
        """Its row of the ledger, if it is of these settings."""
        rows = [row for row in ledger.read(ROOT / args.ledger) if ledger.key(row) == (self.name, self.seed, 0)]
        return next((row for row in rows if row["settings"]["config"] == self.digest), None)

    def score(self, args: argparse.Namespace) -> None:
        curve, folder = self.curve(), ROOT / self.folder
        if not self.finished(curve):
            raise RuntimeError(f"The last step of {self.folder} has no evaluation: {folder / 'fit.log'} tells why.")
        last = next(folder.glob(f"evaluation/step_{int(curve[-1]['step']):07d}/*/evaluation.json"))
        steps = int(curve[-1]["step"])
        try:
            train = read_training_record(folder, steps)
        except OSError:  # without a tracker there are no validation losses
            train = {}
        commit = (folder / "commit").read_text()
        row = {
            "experiment": self.name,
            "of": self.experiment,
            "budget": self.budget,
            "seed": self.seed,
            "metrics": {key: value for key, value in curve[-1].items() if key not in ("step", *COSTS)},
            "train_seconds": curve[-1]["seconds"],
            "train": {k: v for k, v in train.items() if k.startswith("val_")} | {"steps": steps, "commit": commit},
            "settings": {"prompts": read_json(last)["prompts"], "threads": self.threads, "config": self.digest},
            "command": shlex.join(["python", "-m", "benchmarks.speedrun", *args.argv]),
            "commit": commit,
            "source": self.source,
            "hardware": f"{cpu_name()}, {self.threads} threads" if self.threads else hardware(default_device()),
            "machine": machine(default_device()),
            "difference": difference(read_yaml(self.paths()[0]), self.config()),
            "curve": curve,
        }
        ledger.append(ROOT / args.ledger, row)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_evaluation(callback: Any) -> bool:
    path = callback.get("class_path", "") if isinstance(callback, dict) else str(callback)
    return path.rpartition(".")[2] == "Evaluation"


def difference(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The settings that `base` does not have, or has otherwise."""
    below = flatten_config(base)
    return {key: v for key, v in flatten_config(own).items() if key != "base" and below.get(key, v is None) != v}


# -- the command -------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.speedrun", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="a file of experiments/, or a sweep without `evaluation`")
    parser.add_argument("--compare", metavar="FILE", help="experiment trained in turn with it, seed by seed")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="of a sweep, only these; default: all")
    parser.add_argument("--seeds", nargs="+", type=whole(0), help="default: 0 1 2, or the sweep's")
    words = "a run of each budget, its schedule ending with it: a level counts as reached by a run's last evaluation"
    parser.add_argument("--steps", nargs="+", type=whole(1), metavar="N", help=words)
    parser.add_argument("--levels", nargs="+", type=float, default=LEVELS, help="of GenEval; default 0.5 0.8 0.9 0.95")
    parser.add_argument("--stop", type=float, metavar="LEVEL", help="end a run when it has reached this level")
    words = "steps between evaluations; default: the experiment's, and with --steps only at the end"
    parser.add_argument("--every", type=whole(0), metavar="N", help=words)
    words = "file of experiments/trainer laid over each run; default: the experiment's own precision"
    parser.add_argument("--trainer", choices=("cpu", "gpu"), help=words)
    run_options(parser, LEDGER)
    parser.add_argument("--again", action="store_true", help="train anew what the ledger has of another commit")
    parser.add_argument("--runs", metavar="FOLDER", help=f"of the runs; default: {RUNS}, or the sweep's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables and the machine")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def sweep_of(args: argparse.Namespace) -> Sweep:
    """The sweep that is named, or one of the experiment and what it is compared with.

    Raises:
        ValueError, OSError: a file is missing or of another kind.
    """
    content = read_yaml(args.experiment)
    if "rows" not in content:
        paths = [Path(file).resolve() for file in (args.experiment, args.compare) if file]
        names = {name_of(path): str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path) for path in paths}
        rows = {name: {"label": name, "experiment": file} for name, file in names.items()}
        content = {"runs": RUNS, "seeds": [0, 1, 2], "rows": rows}
        content |= {"compare": name_of(args.compare)} if args.compare else {}
    elif args.compare:
        raise ValueError("--compare is for an experiment: a sweep names the row to compare with in `compare`.")
    return Sweep(args.experiment, content | ({"runs": args.runs} if args.runs else {}))


def name_of(file: str | Path) -> str:
    """`shapes/speedrun` of experiments/shapes/speedrun.yaml; of a file elsewhere its stem."""
    path, root = Path(file).resolve().with_suffix(""), (ROOT / "experiments").resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def runs_of(sweep: Sweep, args: argparse.Namespace) -> list[Run]:
    """Seed by seed and budget by budget, the rows in turn.

    Raises:
        ValueError: a row that the sweep does not have, or no Evaluation callback in its first.
    """
    if unknown := set(args.rows or ()) - set(sweep.rows):
        raise ValueError(f"{args.experiment} has no row {', '.join(unknown)}: choose from {', '.join(sweep.rows)}.")
    first = Task(sweep, next(iter(sweep.rows)), 0).config()["trainer"].get("callbacks") or []
    evaluation = next((callback for callback in first if is_evaluation(callback)), None)
    if evaluation is None:
        raise ValueError(f"{args.experiment} has no Evaluation in trainer.callbacks: add one, as shapes/speedrun has.")
    every = args.every if args.every is not None else 0 if args.steps else None
    settings = {} if every is None else {"every_n_steps": every}
    evaluation = laid_over(evaluation, {"init_args": settings})
    source = source_id()
    names = [name for name in sweep.rows if name in (args.rows or sweep.rows)]
    seeds = args.seeds or sorted({seed for name in names for seed in sweep.rows[name].seeds})
    return [
        Run(sweep, name, seed, args.trainer, evaluation, budget, args.threads, source, args.stop)
        for seed in seeds
        for budget in args.steps or [None]
        for name in names
    ]


def report(runs: Sequence[Run], args: argparse.Namespace) -> list[str]:
    """Tables of what the ledger has of these runs: each experiment's costs, and the ratios."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if (row := run.stored(args)) is not None:
            found.setdefault(run.experiment, []).append(row)
    made = []
    for name, rows in found.items():
        own = curves(rows)
        columns = {"level": "GenEval", "cost": "cost"} | {f"seed{seed}": f"seed {seed}" for seed in own}
        made += [f"## {name}", markdown_table(seed_lines(own, args.levels), columns | {"mean": "mean"})]
        other = runs[0].sweep.rows[name].compare
        if other in found and other != name:
            lines = [level_line(own, curves(found[other]), level) for level in args.levels]
            made += [f"{name} against {other}, seed by seed:", markdown_table(lines, LEVEL_COLUMNS)]
    return made


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        runs = runs_of(sweep_of(args), args)
        if not args.list:
            committed(args)
    except (ValueError, OSError) as error:
        progress(str(error))
        return 2
    found = machine(default_device())
    failed = False if args.list else work_all(runs, args)
    made = report(runs, args) or ["No runs yet."]
    show(f"Speedrun: {args.experiment}", found, *made)
    write_json(args.json, {"benchmark": "speedrun", "machine": found, "settings": args.argv, "tables": made})
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the training ends with us
    sys.exit(main())
