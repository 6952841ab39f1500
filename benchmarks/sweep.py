"""Sweep runner: trains and scores every row of a sweep (`experiments/sweeps/*.yaml`) with the same seeds and settings.

    python -m benchmarks.sweep experiments/sweeps/ablation.yaml --list      # what is done and what is not
    python -m benchmarks.sweep experiments/sweeps/ablation.yaml --dry-run   # the commands of what is missing
    python -m benchmarks.sweep experiments/sweeps/ablation.yaml             # train and score it
    python -m benchmarks.sweep experiments/sweeps/ablation.yaml --time --json benchmarks/results/shapes_step_time.json
    python -m benchmarks.tables                                             # then: the tables in the docs

A run is `emmdit fit`, then `emmdit evaluate`, which writes a row of the ledger. The sweep may be killed at any time:
rows in the ledger are not repeated and a run resumes from its last checkpoint. Several processes may work on one sweep:
each run folder has a lock. `--time` measures a training step of each row, the rows in turn: read the ratios.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch import Callback

from benchmarks.common import ROOT, interleaved, markdown_table, progress, show, whole, write_json
from emmdit.evaluation import ledger
from emmdit.provenance import machine
from emmdit.timing import synchronize
from emmdit.weights import checkpoint_progress, find_checkpoint
from lightning_modules.callbacks import EMA, NonFinite
from lightning_modules.commands.config_files import config_files, with_bases
from lightning_modules.commands.fit import SuiteCLI
from lightning_modules.commands.main import quiet
from lightning_modules.runs import latest_config

LEDGER = "benchmarks/results/shapes.json"
COLUMNS = {"experiment": "row", "seed": "seed", "state": "state"}
TIME_COLUMNS = {"experiment": "row", "parameters": "parameters", "ms": "ms per step", "ms_low": "fastest round"}
TIME_COLUMNS |= {"ms_high": "slowest round", "ratio": "ratio to the row compared with"}
KEYS = {"runs", "seeds", "evaluation", "rows", "over", "compare", "evaluation_options", "teacher_option"}


@dataclass(frozen=True)
class Row:
    """One line of a sweep's table: its label, the seeds of its trainings (none: it is trained elsewhere), the
    experiment whose results it is compared with, and the one that it is distilled from."""

    label: str
    seeds: list[int]
    compare: str | None = None
    teacher: str | None = None


class Sweep:
    """A sweep's YAML file.

    Raises:
        ValueError: unknown or missing keys, or an experiment without a file.
    """

    def __init__(self, path: str | Path) -> None:
        content = yaml.safe_load(Path(path).read_text())
        if wrong := set(content) - KEYS or {"runs", "seeds", "evaluation", "rows"} - set(content):
            raise ValueError(f"{path}: unknown or missing keys: {', '.join(sorted(wrong))}.")
        self.runs, self.evaluation = Path(content["runs"]), content["evaluation"]
        self.evaluation_options = content.get("evaluation_options", [])
        self.teacher_option = content.get("teacher_option")
        self.over, self.compare = content.get("over", []), content.get("compare")
        self.rows: dict[str, Row] = {}
        for name, row in content["rows"].items():
            row = row if isinstance(row, dict) else {"label": row}
            self.rows[name] = Row(**{"seeds": content["seeds"], "compare": self.compare} | row)
        for name in (*self.over, *self.rows):
            if not (ROOT / experiment_file(name)).is_file():
                raise ValueError(f"{path}: there is no {experiment_file(name)}: restore it, or remove {name}.")


def experiment_file(name: str) -> str:
    return f"experiments/{name}.yaml"


@dataclass(frozen=True)
class Task:
    """One training and its score."""

    sweep: Sweep
    experiment: str
    seed: int
    trainer: str | None = None

    @property
    def folder(self) -> Path:
        return self.sweep.runs / Path(self.experiment).name / f"seed{self.seed}"

    def files(self, root: str = "") -> list[str]:
        """`-c FILE` for what lies under every row, the row, and the trainer; below `root`."""
        names = dict.fromkeys([*self.sweep.over, self.experiment])
        names = [*names, f"trainer/{self.trainer}"] if self.trainer else names
        return [part for name in names for part in ("-c", os.path.join(root, experiment_file(name)))]

    def fit(self) -> list[str]:
        """Arguments of `emmdit`; `last` starts from scratch where there is no checkpoint yet."""
        options = [f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.folder}"]
        options.append(f"--trainer.logger.init_args.run_name={self.experiment} seed {self.seed}")  # not "seed0"
        return ["fit", *self.files(), *options, *self.teacher(), "--ckpt_path=last"]

    def teacher(self) -> list[str]:
        """The teacher's run in this sweep, if there is one; else the one that the experiment names."""
        rows = self.sweep.rows
        row = rows[self.experiment]
        name = row.teacher or (rows[row.compare].teacher if row.compare else None)
        if name is None or not rows[name].seeds:
            return []
        folder = Task(self.sweep, name, rows[name].seeds[0]).folder
        return [f"{self.sweep.teacher_option}={folder}"] if (ROOT / folder).exists() else []

    def evaluate(self, eval_seed: int, path: str | Path) -> list[str]:
        """Arguments of `emmdit`."""
        command = ["evaluate", "--ckpt", str(self.folder), "-c", self.sweep.evaluation, "--seed", str(eval_seed)]
        return [*command, *self.sweep.evaluation_options, "--ledger", str(path), "--experiment", self.experiment]

    def steps(self) -> int:
        """The training budget: `trainer.max_steps` of the last file that sets it."""
        contents = [yaml.safe_load(Path(file).read_text()) for file in config_files(with_bases(self.files(str(ROOT))))]
        trainers = [(content or {}).get("trainer") or {} for content in contents]
        return [trainer["max_steps"] for trainer in trainers if "max_steps" in trainer][-1]


# -- a run -------------------------------------------------------------------------------------------


def work(task: Task, args: argparse.Namespace) -> str:
    """Train and score what is missing of `task`; what was done, in a few words."""
    folder = ROOT / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if scored(task, args):
                return "in the ledger"
            at, steps = position(folder), task.steps()
            if at and (found := yaml.safe_load(latest_config(folder).read_text())["trainer"]["max_steps"]) != steps:
                raise ValueError(f"{task.folder} was trained for {found:,} steps, not {steps:,}: move it away.")
            if at < steps:
                call(task.fit(), folder / "fit.log", args.threads)
            call(task.evaluate(args.eval_seed, args.ledger), folder / "evaluate.log", args.threads)
            return "scored"
    except Timeout:
        return "locked by another process"


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


def scored(task: Task, args: argparse.Namespace) -> bool:
    wanted = (task.experiment, task.seed, args.eval_seed)
    return any(ledger.key(row) == wanted for row in ledger.read(ROOT / args.ledger))


def position(folder: Path) -> int:
    """Optimizer steps of the latest checkpoint."""
    try:
        return checkpoint_progress(find_checkpoint(folder))["step"]
    except FileNotFoundError:
        return 0


def state(task: Task, args: argparse.Namespace) -> str:
    if scored(task, args):
        return "in the ledger"
    at = position(ROOT / task.folder)
    return f"step {at:,} of {task.steps():,}" if at else "-"


# -- time of a step ----------------------------------------------------------------------------------


class StepTimer(Callback):
    """Seconds of each training batch: loss, backward pass, clipping, optimizer, EMA; without loading the data."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        synchronize(trainer.strategy.root_device)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        synchronize(trainer.strategy.root_device)
        self.seconds.append(time.perf_counter() - self.start)


def step_seconds(task: Task, steps: int, device: torch.device) -> tuple[float, int]:
    """Median seconds of a step after a warm-up, of a short training in this process, and the denoiser's parameters."""
    trainer = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1, "max_steps": steps}
    trainer |= {"limit_val_batches": 0, "logger": "false"}
    with TemporaryDirectory() as folder:
        options = [f"--trainer.{key}={value}" for key, value in (trainer | {"default_root_dir": folder}).items()]
        run = SuiteCLI(args=[*task.files(str(ROOT)), *options], run=False, exit_on_error=False)
        timer = StepTimer()  # last: the EMA update belongs to the step
        run.trainer.callbacks = [c for c in run.trainer.callbacks if isinstance(c, EMA | NonFinite)] + [timer]
        run.trainer.fit(run.model, run.datamodule)
    return statistics.median(timer.seconds[steps // 3 :]), sum(p.numel() for p in run.model.denoiser.parameters())


def time_steps(sweep: Sweep, names: list[str], device: torch.device, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Rows of the table of step times: the rows of the sweep take turns, so that drift falls on all alike."""
    parameters: dict[str, int] = {}

    def clock(name: str) -> float:
        seconds, parameters[name] = step_seconds(Task(sweep, name, 0), steps, device)
        return seconds

    runs = {name: lambda name=name: clock(name) for name in names}
    timings = interleaved(runs, device, rounds, min_seconds=0, clock=lambda once, device, calls: once())
    rows = []
    for name, timing in timings.items():
        ms = {"ms": timing.median * 1e3, "ms_low": timing.low * 1e3, "ms_high": timing.high * 1e3}
        ratio = timing.median / timings[sweep.compare].median if sweep.compare in timings else None
        rows.append({"experiment": name, "parameters": parameters[name], **ms, "ratio": ratio})
    return rows


# -- the command -------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="a file of experiments/sweeps")
    parser.add_argument("--rows", nargs="+", metavar="EXPERIMENT", help="only these; default: all of the sweep")
    parser.add_argument("--seeds", nargs="+", type=whole(0), help="of training; default: the sweep's")
    parser.add_argument("--threads", type=whole(1), help="CPU threads of each training; default: torch's own")
    default = "gpu" if torch.cuda.is_available() else "none"
    words = "file of experiments/trainer laid over each row; none: the row's own precision on what Lightning finds"
    parser.add_argument("--trainer", choices=("cpu", "gpu", "none"), default=default, help=words)
    parser.add_argument("--eval-seed", type=whole(0), default=0, help="seed of the first generated image")
    parser.add_argument("--ledger", default=LEDGER, help=f"JSON file of the results; default: {LEDGER}")
    parser.add_argument("--list", action="store_true", help="print the state of each run and exit")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what is missing and exit")
    parser.add_argument("--time", action="store_true", help="measure milliseconds per training step instead")
    parser.add_argument("--rounds", type=whole(1), default=11, help="of --time: turns of each row; default 11")
    parser.add_argument("--steps", type=whole(3), default=15, help="of --time: optimizer steps in a turn; default 15")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table and the machine")
    return parser.parse_args(argv)


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
        chosen = tasks(sweep, args)
    except (ValueError, OSError) as error:
        progress(str(error))
        return 2
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "list", "dry_run")}
    if args.time:
        quiet()
        for logger in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        device = torch.device("cuda" if args.trainer == "gpu" else "cpu")
        found, names = machine(device), list(dict.fromkeys(task.experiment for task in chosen))
        rows = time_steps(sweep, names, device, args.rounds, args.steps)
        show(f"Time of a training step: {args.sweep}", found, markdown_table(rows, TIME_COLUMNS))
        write_json(args.json, {"benchmark": "step_time", "machine": found, "settings": settings, "rows": rows})
        return 0
    if args.dry_run:
        for task in chosen:
            if not scored(task, args):
                print(shlex.join(["emmdit", *task.fit()]))
                print(shlex.join(["emmdit", *task.evaluate(args.eval_seed, args.ledger)]))
        return 0
    failed = False
    for i, task in enumerate([] if args.list else chosen, 1):
        progress(f"{i}/{len(chosen)} {task.experiment}, seed {task.seed}")
        try:
            progress(f"  {work(task, args)}")
        except (RuntimeError, ValueError, OSError) as error:  # the other rows do not depend on this one
            failed = True
            progress(f"  {error}")
    rows = [{"experiment": task.experiment, "seed": task.seed, "state": state(task, args)} for task in chosen]
    print(markdown_table(rows, COLUMNS))
    write_json(args.json, {"benchmark": "sweep", "machine": machine(), "settings": settings, "rows": rows})
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the training ends with us
    sys.exit(main())
