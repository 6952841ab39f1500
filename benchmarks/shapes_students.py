"""Linear attention students of the shapes world beside their teachers: every one trained and scored alike.

    python -m benchmarks.shapes_students --list        # what is done and what is not
    python -m benchmarks.shapes_students               # teachers, then students, then ablations; resumable
    python -m benchmarks.shapes_students --rows edit mm_edit --seeds 0 --threads 1
    python -m benchmarks.tables                        # then: the tables in docs/results_shapes.md

Teachers are trained once, E-MMDiT's is `assets/shapes_emmdit`. A student is `emmdit fit` with its experiment (of its
teacher in `--runs`, or else in `assets/`), then `emmdit evaluate` with the teacher's prompts and noise, which writes a
row of the ledger. Kill it at any time, as `benchmarks.shapes_ablation`, which it is built of.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.common import ROOT, markdown_table, progress, write_json
from benchmarks.shapes_ablation import COLUMNS, Task, common_arguments, state, work
from emmdit.provenance import machine

# name in experiments/shapes: what the row is
TEACHERS = {"pixart_teacher": "PixArt", "mmdit_teacher": "SD3.5 kind"}
STUDENTS = {"edit": "EDiT", "mm_edit": "MM-EDiT", "emmdit_hybrid": "E-MMDiT, hybrid attention"}
ABLATIONS = {
    "edit_no_conv_fusion": "no ConvFusion (-, SC, SC)",
    "edit_no_compressor": "no compressor (CF, -, -)",
    "edit_keys_conv_fusion": "ConvFusion on keys, too (CF, CF, -)",
    "edit_linear": "plain linear (-, -, -)",
    "edit_sana": "SANA-style",
    "edit_linfusion": "LinFusion-style",
    "edit_kv_compression": "KV compression (softmax)",
    "mm_edit_no_conv_fusion": "MM-EDiT, no ConvFusion",
    "mm_edit_linear": "MM-DiT, fully linear",
    "mm_edit_exact": "MM-EDiT, exact mixture",
    "mm_edit_sana": "MM-DiT, SANA-style",
    "emmdit_hybrid_no_compressor": "E-MMDiT, hybrid attention, no compressor",
}
ROWS = TEACHERS | STUDENTS | ABLATIONS
TEACHER_OF = {"edit": "pixart_teacher", "mm_edit": "mmdit_teacher", "emmdit_hybrid": "emmdit"}
EVALUATION = "experiments/evaluation/shapes.yaml"


def base_of(name: str) -> str:
    """The student that a row is, or is an ablation of."""
    return next((base for base in STUDENTS if name.startswith(f"{base}_")), name)


@dataclass(frozen=True)
class Student(Task):
    """One training and its score; a teacher's, too."""

    images: ClassVar[int | None] = None

    @property
    def folder(self) -> Path:
        """A teacher lies where its students look for it."""
        return (
            self.runs / self.name if self.name in TEACHERS else self.runs / "students" / self.name / f"seed{self.seed}"
        )

    @property
    def files(self) -> list[str]:
        names = dict.fromkeys(f"experiments/shapes/{name}.yaml" for name in (base_of(self.name), self.name))
        return [*names, *([f"experiments/trainer/{self.trainer}.yaml"] if self.trainer else [])]

    def fit(self) -> list[str]:
        command = super().fit()
        teacher = TEACHER_OF.get(base_of(self.name))
        if teacher in TEACHERS and (ROOT / self.runs / teacher).exists():  # or else the one that the experiment names
            command.insert(-2, f"--model.init_args.teacher={self.runs / teacher}")
        return command


def tasks(args: argparse.Namespace) -> list[Student]:
    """Teachers once, in front; then seed by seed."""
    trainer = None if args.trainer == "none" else args.trainer
    rows = [name for name in ROWS if name in args.rows]
    pairs = [(name, 0) for name in rows if name in TEACHERS]
    pairs += [(name, seed) for seed in args.seeds for name in rows if name not in TEACHERS]
    return [Student(name, seed, args.runs, None, trainer) for name, seed in pairs]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return common_arguments(__doc__, ROWS, Path("runs/shapes"), EVALUATION).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    chosen, failed = tasks(args), False
    for i, task in enumerate([] if args.list else chosen, 1):
        progress(f"{i}/{len(chosen)} {task.experiment}, seed {task.seed}")
        try:
            progress(f"  {work(task, args)}")
        except (RuntimeError, ValueError, OSError) as error:  # of the rest, what does not depend on it goes on
            failed = True
            progress(f"  {error}")
    rows: list[dict[str, Any]] = [
        {"experiment": task.experiment, "seed": task.seed, "state": state(task, args)} for task in chosen
    ]
    print(markdown_table(rows, COLUMNS))
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "list")}
        found = {"benchmark": "shapes_students", "machine": machine(), "settings": settings, "rows": rows}
        write_json(args.json, found)
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the training ends with us
    sys.exit(main())
