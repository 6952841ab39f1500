"""The ablation table of E-MMDiT in the shapes world: every row trained and scored alike, three training seeds each.

    python -m benchmarks.shapes_ablation --list                     # what is done and what is not
    python -m benchmarks.shapes_ablation --dry-run                  # the commands
    python -m benchmarks.shapes_ablation                            # all that is missing, one run after the other
    python -m benchmarks.shapes_ablation --shard 1/2 --threads 1    # and 2/2 beside it: two processes share the work
    python -m benchmarks.tables                                     # then: the table in docs/results_shapes.md

A row is `emmdit fit` with base, budget (`shapes/short`) and its diff, then `emmdit evaluate`, which writes a row of
the ledger. Kill it at any time: rows in the ledger are not made again, a run goes on from its last checkpoint, and a
lock in each run folder keeps two processes out of each other's way.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from filelock import FileLock, Timeout

from benchmarks.common import ROOT, markdown_table, progress, write_json
from emmdit.evaluation import ledger
from emmdit.provenance import machine
from emmdit.weights import checkpoint_progress, find_checkpoint
from lightning_modules.mlflow_runs import read_training_record

BASE, FULL = "emmdit", "short"  # of experiments/shapes: the base, and the budget, which alone is the full model's row
# name of the diff in experiments/shapes: what the row is
ROWS = {
    FULL: "full",
    "one_path": "one compression path (2x)",
    "no_compression": "no compression",
    "no_reinforcement": "no Position Reinforcement",
    "no_subregions": "no subregion attention",
    "adaln_single": "AdaLN-single",
    "adaln_zero": "AdaLN-zero",
    "repa_clip": "REPA on the shapes CLIP",
    "adamw": "AdamW in place of Muon",
    "faithful_init": "faithful init",
}
SEEDS = (0, 1, 2)
EVALUATION = "experiments/evaluation/shapes_short.yaml"
IMAGES = 2  # of each prompt: more of them would sharpen a score less than a further training seed does
LEDGER = "benchmarks/results/shapes.json"
COLUMNS = {"experiment": "row", "seed": "seed", "state": "state"}


@dataclass(frozen=True)
class Task:
    """One training and its score."""

    images: ClassVar[int | None] = IMAGES  # of a prompt; None: as many as the evaluation says
    name: str
    seed: int
    runs: Path
    steps: int | None = None
    trainer: str | None = None

    @property
    def experiment(self) -> str:
        return f"shapes/{self.name}"

    @property
    def folder(self) -> Path:
        return self.runs / self.name / f"seed{self.seed}"

    @property
    def files(self) -> list[str]:
        names = dict.fromkeys(f"experiments/shapes/{name}.yaml" for name in (BASE, FULL, self.name))
        return [*names, *([f"experiments/trainer/{self.trainer}.yaml"] if self.trainer else [])]

    def fit(self) -> list[str]:
        """Arguments of `emmdit`; `last` begins where there is no checkpoint yet."""
        command = ["fit", *(part for file in self.files for part in ("-c", file)), f"--seed_everything={self.seed}"]
        if self.steps is not None:
            command += [
                f"--trainer.max_steps={self.steps}",
                f"--model.init_args.scheduler.init_args.total={self.steps}",
                f"--trainer.val_check_interval={max(1, self.steps // 4)}",
            ]
        run_name = f"--trainer.logger.init_args.run_name={self.name} seed {self.seed}"  # else the folder's: seed0
        return [*command, run_name, f"--trainer.default_root_dir={self.folder}", "--ckpt_path=last"]

    def evaluate(self, evaluation: str, eval_seed: int, path: str | Path) -> list[str]:
        """Arguments of `emmdit`; the pictures of each evaluation seed have a folder of their own."""
        out = self.folder / ("evaluation" if eval_seed == 0 else f"evaluation_seed{eval_seed}")
        command = ["evaluate", "--ckpt", self.folder, "-c", evaluation, "--seed", eval_seed]
        command += [] if self.images is None else ["--prompts.init_args.images", self.images]
        command += ["--out", out, "--ledger", path, "--experiment", self.experiment]
        return [str(part) for part in command]


# -- a row -------------------------------------------------------------------------------------------


def work(task: Task, args: argparse.Namespace) -> str:
    """Train and score what is missing of `task`; a word on how it went."""
    folder = ROOT / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if scored(task, args):
                return "in the ledger"
            train(task, args.threads)
            call(task.evaluate(args.evaluation, args.eval_seed, args.ledger), folder / "evaluate.log", args.threads)
            return "scored"
    except Timeout:
        return "another process is at it"


def train(task: Task, threads: int | None) -> None:
    """Fit to the end, and write `train.json`, which `emmdit evaluate` copies into the ledger."""
    folder = ROOT / task.folder
    record, steps = folder / "train.json", budget(task)
    at = position(folder)
    if at > steps:
        raise ValueError(
            f"{task.folder} was trained for {at:,} steps, beyond the {steps:,} of this budget: name other --runs."
        )
    if record.is_file() and (found := json.loads(record.read_text())["steps"]) != steps:
        raise ValueError(f"{task.folder} was trained to a budget of {found:,} steps, not {steps:,}: name other --runs.")
    if at < steps:
        call(task.fit(), folder / "fit.log", threads)
    if not record.is_file():
        found = machine("cuda" if task.trainer == "gpu" else "cpu")
        hardware = found["gpu"] or f"{found['cpu']}, {threads or found['torch_threads']} threads"
        command = shlex.join(["emmdit", *task.fit()])
        with chdir(ROOT):  # where the run was made, and its sqlite file may be named from there
            content = {**read_training_record(folder, steps), "hardware": hardware, "command": command}
        record.write_text(json.dumps(content, indent=1) + "\n")


def call(command: Sequence[str], log: Path, threads: int | None) -> None:
    """Run `emmdit COMMAND`, its words into `log`; whoever ends this process ends it, too."""
    progress(f"  emmdit {shlex.join(command)}\n  > {log}")
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "lightning_modules", *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            status = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if status:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip("( ")]
        words = [line for line in words if "EMMDIT_TRACEBACK=1" not in line] or ["it said nothing"]
        raise RuntimeError(f"emmdit {command[0]} ended with status {status} ({log}): {words[-1].strip()}")


# -- how far it is -----------------------------------------------------------------------------------


def scored(task: Task, args: argparse.Namespace) -> bool:
    wanted = (task.experiment, task.seed, args.eval_seed)
    return any(ledger.key(row) == wanted for row in ledger.read(ROOT / args.ledger))


def position(folder: Path) -> int:
    """Optimizer steps of the latest checkpoint."""
    try:
        return checkpoint_progress(find_checkpoint(folder))["step"]
    except FileNotFoundError:
        return 0


def budget(task: Task) -> int:
    """Steps that `task` is trained for: those of the last of its files that says so."""
    if task.steps is not None:
        return task.steps
    contents = [yaml.safe_load((ROOT / file).read_text()) or {} for file in task.files]
    return [c["trainer"]["max_steps"] for c in contents if "max_steps" in (c.get("trainer") or {})][-1]


def state(task: Task, args: argparse.Namespace) -> str:
    if scored(task, args):
        return "in the ledger"
    folder = ROOT / task.folder
    at = position(folder)
    words = "-" if at == 0 else f"step {at:,} of {budget(task):,}"
    if (folder / ".lock").exists():
        try:
            with FileLock(folder / ".lock", timeout=0):
                pass
        except Timeout:
            words += ", at work"
    return words


# -- the command -------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__, ROWS, Path("runs/ablation"), EVALUATION)
    parser.add_argument("--steps", type=whole(1), help="another budget than shapes/short (take another ledger, too)")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="only every N-th run, from I on")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what is missing")
    return parser.parse_args(argv)


def common_arguments(description: str, rows: Iterable[str], runs: Path, evaluation: str) -> argparse.ArgumentParser:
    """What every benchmark takes that trains and scores rows of a table."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    rows = list(rows)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROW", help=", ".join(rows))
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=list(SEEDS), help="of training; default 0 1 2")
    parser.add_argument("--threads", type=whole(1), help="of each training; default: torch's own")
    parser.add_argument(
        "--trainer",
        choices=("cpu", "gpu", "none"),
        default="gpu" if torch.cuda.is_available() else "none",
        help="file of experiments/trainer to lay over; none: the base's own precision on what Lightning finds",
    )
    parser.add_argument("--runs", type=Path, default=runs, help="folder of the runs")
    parser.add_argument("--evaluation", default=evaluation, help=f"default: {evaluation}")
    parser.add_argument("--eval-seed", type=whole(0), default=0)
    parser.add_argument("--ledger", default=LEDGER, help=f"default: {LEDGER}")
    parser.add_argument("--list", action="store_true", help="print how far each run is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the runs, their state and the machine")
    return parser


def whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, not {text}")
        return int(text)

    return number


def shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, as 1/2, not {text}")
    return int(match[1]), int(match[2])


def tasks(args: argparse.Namespace) -> list[Task]:
    """This process' share. Seed by seed, so that a first table is complete early."""
    trainer = None if args.trainer == "none" else args.trainer
    found = [Task(name, seed, args.runs, args.steps, trainer) for seed in args.seeds for name in args.rows]
    return found[args.shard[0] - 1 :: args.shard[1]]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    chosen = tasks(args)
    if args.dry_run:
        for task in chosen:
            if not scored(task, args):
                print(shlex.join(["emmdit", *task.fit()]))
                print(shlex.join(["emmdit", *task.evaluate(args.evaluation, args.eval_seed, args.ledger)]))
        return 0
    failed = False
    if not args.list:
        needed = dict.fromkeys([*(file for task in chosen for file in task.files), args.evaluation])
        if missing := [file for file in needed if not (ROOT / file).is_file()]:
            progress(f"There is no {missing[0]}: restore it, or leave out its row (--rows).")
            return 2
        for i, task in enumerate(chosen, 1):
            progress(f"{i}/{len(chosen)} {task.experiment}, seed {task.seed}")
            try:
                progress(f"  {work(task, args)}")
            except (RuntimeError, ValueError, OSError) as error:  # the other rows do not depend on this one
                failed = True
                progress(f"  {error}")
    rows: list[dict[str, Any]] = [
        {"experiment": task.experiment, "seed": task.seed, "state": state(task, args)} for task in chosen
    ]
    print(markdown_table(rows, COLUMNS))
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "list", "dry_run")}
        write_json(
            args.json, {"benchmark": "shapes_ablation", "machine": machine(), "settings": settings, "rows": rows}
        )
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the training ends with us
    sys.exit(main())
