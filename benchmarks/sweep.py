"""Sweep runner: trains and scores every row of a sweep (`experiments/sweeps/*.yaml`) with the same seeds and settings.

    python -m benchmarks.sweep experiments/sweeps/ablation.yaml --list      # what is done and what is not
    python -m benchmarks.sweep experiments/sweeps/ablation.yaml --dry-run   # the commands of what is missing
    python -m benchmarks.sweep experiments/sweeps/ablation.yaml             # train and score it
    python -m benchmarks.sweep experiments/sweeps/ablation.yaml --time --json benchmarks/results/shapes_step_time.json
    python -m benchmarks.tables                                             # then: the tables in the docs

A run is `emmdit fit`, then `emmdit evaluate`, which writes a row of the ledger. The sweep may be killed at any time:
rows in the ledger are not repeated and a run resumes from its last checkpoint. Several processes may work on one sweep:
each run folder has a lock. All seeds of a row are trained at one commit, with nothing uncommitted. `--time` measures a
training step of each row, the rows in turn: read the ratios.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from benchmarks.common import ROOT, markdown_table, progress, show, whole, write_json
from benchmarks.step_time import time_steps
from emmdit.config_text import read_yaml
from emmdit.evaluation import ledger
from emmdit.provenance import git_commit, machine
from emmdit.weights import checkpoint_progress, find_checkpoint
from lightning_modules.commands.config_files import config_files, with_bases
from lightning_modules.commands.main import quiet
from lightning_modules.runs import latest_config

LEDGER = "benchmarks/results/shapes.json"
COLUMNS = {"experiment": "row", "seed": "seed", "state": "state"}
TIME_COLUMNS = {"experiment": "row", "parameters": "parameters", "ms": "ms per step", "ms_low": "fastest round"}
TIME_COLUMNS |= {"ms_high": "slowest round", "ratio": "ratio to the row compared with"}
NEEDED = {"runs", "seeds", "rows"}
KEYS = NEEDED | {"evaluation", "over", "compare", "evaluation_options", "teacher_option", "budget"}


@dataclass(frozen=True)
class Row:
    """One line of a sweep's table: its label, the seeds of its trainings (none: it is trained elsewhere), the
    row whose results it is compared with, the one that it is distilled from, the experiment that it is (by default of
    the row's own name), and options laid over that, `--key value` or `--key=value` each."""

    label: str
    seeds: list[int]
    compare: str | None = None
    teacher: str | None = None
    experiment: str | None = None
    options: Sequence[str] = ()


class Sweep:
    """A sweep's YAML file, or its content. Without `evaluation` it is one of `benchmarks.speedrun`.

    Raises:
        ValueError: unknown or missing keys, or an experiment without a file.
    """

    def __init__(self, path: str | Path, content: dict[str, Any] | None = None) -> None:
        content = content or read_yaml(path)
        if wrong := set(content) - KEYS or NEEDED - set(content):
            raise ValueError(f"{path}: unknown or missing keys: {', '.join(sorted(wrong))}.")
        self.runs, self.evaluation = Path(content["runs"]), content.get("evaluation")
        self.budget = content.get("budget")
        self.evaluation_options = content.get("evaluation_options", [])
        self.teacher_option = content.get("teacher_option")
        self.over, self.compare = content.get("over", []), content.get("compare")
        self.rows: dict[str, Row] = {}
        for name, row in content["rows"].items():
            row = row if isinstance(row, dict) else {"label": row}
            row = {"seeds": content["seeds"], "compare": self.compare, "experiment": name} | row
            self.rows[name] = Row(**row | {"options": joined(row.get("options", ()))})
        for name in (*self.over, *(row.experiment for row in self.rows.values())):
            if not (ROOT / experiment_file(name)).is_file():
                raise ValueError(f"{path}: there is no {experiment_file(name)}: restore it, or remove {name}.")


def experiment_file(name: str) -> str:
    """Of the experiment of a name; a path of a YAML file stands for itself."""
    return name if name.endswith(".yaml") else f"experiments/{name}.yaml"


def joined(options: Sequence[str]) -> list[str]:
    """`--key value` as `--key=value`, as many of them in a text as there are."""
    parts: list[str] = []
    for part in (part for option in options for part in shlex.split(option)):
        if part.startswith("--") or not parts:
            parts.append(part)
        else:
            parts[-1] += f"={part}"
    return parts


def laid_over(below: Any, above: Any) -> Any:
    """Merged as config files are: mappings key by key, of all else the upper one."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: laid_over(below.get(key), value) for key, value in above.items()}


@dataclass(frozen=True)
class Task:
    """One training and its score."""

    sweep: Sweep
    experiment: str
    seed: int
    trainer: str | None = None

    @property
    def row(self) -> Row:
        return self.sweep.rows[self.experiment]

    @property
    def folder(self) -> Path:
        return self.sweep.runs / Path(self.experiment).name / f"seed{self.seed}"

    def files(self, root: str = "") -> list[str]:
        """`-c FILE` for what lies under every row, the row, and the trainer; below `root`."""
        names = dict.fromkeys([*self.sweep.over, self.row.experiment])
        names = [*names, f"trainer/{self.trainer}"] if self.trainer else names
        return [part for name in names for part in ("-c", os.path.join(root, experiment_file(name)))]

    def fit(self) -> list[str]:
        """Arguments of `emmdit`; `last` starts from scratch where there is no checkpoint yet."""
        options = [f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.folder}"]
        if self.config()["trainer"].get("logger", True):
            options.append(f"--trainer.logger.init_args.run_name={self.experiment} seed {self.seed}")  # not "seed0"
        return ["fit", *self.files(), *options, *self.teacher(), *self.row.options, "--ckpt_path=last"]

    def teacher(self) -> list[str]:
        """The teacher's run in this sweep, if there is one; else the one that the experiment names."""
        rows, row = self.sweep.rows, self.row
        name = row.teacher or (rows[row.compare].teacher if row.compare else None)
        if name is None or not rows[name].seeds:
            return []
        folder = Task(self.sweep, name, rows[name].seeds[0]).folder
        return [f"{self.sweep.teacher_option}={folder}"] if (ROOT / folder).exists() else []

    def evaluate(self, eval_seed: int, path: str | Path) -> list[str]:
        """Arguments of `emmdit`."""
        command = ["evaluate", "--ckpt", str(self.folder), "-c", self.sweep.evaluation, "--seed", str(eval_seed)]
        return [*command, *self.sweep.evaluation_options, "--ledger", str(path), "--experiment", self.experiment]

    def paths(self) -> list[str]:
        """All config files, bases first."""
        return config_files(with_bases(Task.files(self, str(ROOT))))

    def config(self) -> dict[str, Any]:
        """What the files and the row's options set."""
        merged: dict[str, Any] = {"trainer": {}}
        for file in self.paths():
            merged = laid_over(merged, read_yaml(file))
        for option in self.row.options:
            key, _, value = option.removeprefix("--").partition("=")
            value = yaml.safe_load(value)
            for part in reversed(key.split(".")):
                value = {part: value}
            merged = laid_over(merged, value)
        return merged

    def steps(self) -> int:
        """The training budget."""
        return self.config()["trainer"]["max_steps"]

    def scored(self, args: argparse.Namespace) -> bool:
        wanted = (self.experiment, self.seed, args.eval_seed)
        return any(ledger.key(row) == wanted for row in ledger.read(ROOT / args.ledger))

    anew = "remove its runs and its rows of the ledger"

    def siblings(self, args: argparse.Namespace) -> list[dict[str, Any]]:
        """Rows of the ledger that must be of the same commit."""
        return [row for row in ledger.read(ROOT / args.ledger) if row["experiment"] == self.experiment]

    def trained(self, at: int) -> bool:
        return at >= self.steps()

    def score(self, args: argparse.Namespace) -> None:
        call(self.evaluate(args.eval_seed, args.ledger), ROOT / self.folder / "evaluate.log", args.threads)


# -- a run -------------------------------------------------------------------------------------------


def work(task: Task, args: argparse.Namespace) -> str:
    """Train and score what is missing of `task`; what was done, in a few words."""
    folder = ROOT / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".sweep.lock", timeout=0):  # `.lock` is that of the training
            if task.scored(args):
                return "in the ledger"
            at, steps = position(folder), task.steps()
            if at and (found := read_yaml(latest_config(folder))["trainer"]["max_steps"]) != steps:
                raise ValueError(f"{task.folder} was trained for {found:,} steps, not {steps:,}: move it away.")
            if not task.trained(at):
                check_commit(task, folder, args)
                call(task.fit(), folder / "fit.log", args.threads)
            task.score(args)
            return "scored"
    except Timeout:
        return "locked by another process"


def committed(args: argparse.Namespace) -> str | None:
    """The commit of what is measured. Raises ValueError for one with uncommitted changes."""
    commit = git_commit()
    if commit and commit.endswith("-dirty") and not args.allow_dirty:
        raise ValueError(f"Tracked files differ from commit {commit[:10]}: commit them, or try out with --allow-dirty.")
    return commit


def check_commit(task: Task, folder: Path, args: argparse.Namespace) -> None:
    """Raise ValueError where this run, or another seed of its row, was trained at another commit; note this one."""
    commit = committed(args) or "unknown"
    known = {str((row.get("train") or {}).get("commit")): f"seed {row['seed']}" for row in task.siblings(args)}
    note = folder / "commit"
    if note.is_file():
        known[note.read_text()] = str(task.folder)
    if wrong := next((other for other in known if other not in (commit, "None")), None):
        told = f"{task.experiment} was trained at {wrong} ({known[wrong]}), and this is {commit}"
        raise ValueError(f"{told}: check that out, or train all its seeds anew ({task.anew}).")
    note.write_text(commit)


def work_all(tasks: Sequence[Task], args: argparse.Namespace) -> bool:
    """Train and score all; whether any failed."""
    failed = False
    for i, task in enumerate(tasks, 1):
        progress(f"{i}/{len(tasks)} {task.experiment}, seed {task.seed}")
        try:
            progress(f"  {work(task, args)}")
        except (RuntimeError, ValueError, OSError) as error:  # the other rows do not depend on this one
            failed = True
            progress(f"  {error}")
    return failed


def call(command: Sequence[str], log: Path, threads: int | None) -> None:
    """Run `emmdit COMMAND` with its output in `log`; it ends when this process does."""
    progress(f"  emmdit {shlex.join(command)}\n  > {log}")
    limits = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    arguments = [sys.executable, "-m", "lightning_modules", *command]
    with log.open("a") as file:
        child = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | limits, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if status:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line and "EMMDIT_TRACEBACK" not in line] or ["no output"]
        raise RuntimeError(f"emmdit {command[0]} ended with status {status} ({log}): {lines[-1]}")


def position(folder: Path) -> int:
    """Optimizer steps of the latest checkpoint."""
    try:
        return checkpoint_progress(find_checkpoint(folder))["step"]
    except FileNotFoundError:
        return 0


def state(task: Task, args: argparse.Namespace) -> str:
    if task.scored(args):
        return "in the ledger"
    at = position(ROOT / task.folder)
    return f"step {at:,} of {task.steps():,}" if at else "-"


# -- the command -------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="a file of experiments/sweeps")
    parser.add_argument("--rows", nargs="+", metavar="EXPERIMENT", help="only these; default: all of the sweep")
    parser.add_argument("--seeds", nargs="+", type=whole(0), help="of training; default: the sweep's")
    run_options(parser, LEDGER)
    default = "gpu" if torch.cuda.is_available() else "none"
    words = "file of experiments/trainer laid over each row; none: the row's own precision on what Lightning finds"
    parser.add_argument("--trainer", choices=("cpu", "gpu", "none"), default=default, help=words)
    parser.add_argument("--eval-seed", type=whole(0), default=0, help="seed of the first generated image")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what is missing and exit")
    parser.add_argument("--time", action="store_true", help="measure milliseconds per training step instead")
    parser.add_argument("--rounds", type=whole(1), default=11, help="of --time: turns of each row; default 11")
    parser.add_argument("--steps", type=whole(3), default=15, help="of --time: optimizer steps in a turn; default 15")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table and the machine")
    return parser.parse_args(argv)


def run_options(parser: argparse.ArgumentParser, results: str) -> None:
    """Those of every command that trains over seeds."""
    parser.add_argument("--threads", type=whole(1), help="CPU threads of each training; default: torch's own")
    parser.add_argument("--ledger", default=results, help=f"JSON file of the results; default: {results}")
    parser.add_argument("--list", action="store_true", help="print the state of each run and exit")
    parser.add_argument("--allow-dirty", action="store_true", help="with uncommitted changes, for trials alone")


def tasks(sweep: Sweep, args: argparse.Namespace) -> list[Task]:
    """Teachers first, then seed by seed, so that a first table is complete early.

    Raises:
        ValueError: a row that the sweep does not have.
    """
    if unknown := set(args.rows or ()) - set(sweep.rows):
        raise ValueError(f"{args.sweep} has no row {', '.join(sorted(unknown))}: choose from {', '.join(sweep.rows)}.")
    trainer = None if args.trainer == "none" else args.trainer
    rows = {name: row for name, row in sweep.rows.items() if name in (args.rows or sweep.rows)}
    teachers = {row.teacher for row in sweep.rows.values()}
    found = [Task(sweep, name, seed, trainer) for name, row in rows.items() if name in teachers for seed in row.seeds]
    seeds = args.seeds or sorted({seed for row in rows.values() for seed in row.seeds})
    return found + [Task(sweep, name, seed, trainer) for seed in seeds for name in rows if name not in teachers]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        sweep = Sweep(args.sweep)
        if sweep.evaluation is None:
            raise ValueError(f"{args.sweep} names no evaluation: run it with python -m benchmarks.speedrun.")
        chosen = tasks(sweep, args)
        if not (args.time or args.dry_run or args.list):
            committed(args)
    except (ValueError, OSError) as error:
        progress(str(error))
        return 2
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "list", "dry_run")}
    if args.time:
        quiet()
        for logger in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        device = torch.device("cuda" if args.trainer == "gpu" else "cpu")
        found, files = machine(device), {task.experiment: task.files(str(ROOT)) for task in chosen}
        rows = time_steps(files, sweep.compare, device, args.rounds, args.steps)
        show(f"Time of a training step: {args.sweep}", found, markdown_table(rows, TIME_COLUMNS))
        write_json(args.json, {"benchmark": "step_time", "machine": found, "settings": settings, "rows": rows})
        return 0
    if args.dry_run:
        for task in chosen:
            if not task.scored(args):
                print(shlex.join(["emmdit", *task.fit()]))
                print(shlex.join(["emmdit", *task.evaluate(args.eval_seed, args.ledger)]))
        return 0
    failed = False if args.list else work_all(chosen, args)
    rows = [{"experiment": task.experiment, "seed": task.seed, "state": state(task, args)} for task in chosen]
    print(markdown_table(rows, COLUMNS))
    write_json(args.json, {"benchmark": "sweep", "machine": machine(), "settings": settings, "rows": rows})
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the training ends with us
    sys.exit(main())
