"""The ledger of results: a JSON list with one row a line, so that a new row is one line of a diff.

`benchmarks/results/shapes.json` is written by `emmdit evaluate --ledger`, never by hand; `benchmarks/tables.py` renders
the tables of the docs from it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

Row = dict[str, Any]

KEYS = ("experiment", "seed", "eval_seed", "metrics", "train_seconds", "train", "settings", "command", "commit")
REQUIRED = ("experiment", "seed", "metrics", "command", "commit", "hardware", "train_seconds")
MAYBE_NONE = ("commit", "train_seconds")


def append(path: str | Path, row: Mapping[str, Any]) -> Row:
    """Add `row`, in place of one of the same experiment, seed and evaluation seed; returns it as written.

    Any number of processes may do so at once (a lock file beside the ledger), and one that is killed leaves the old
    ledger whole.

    Args:
        row: "experiment" (name of its YAML below experiments/), "seed" of the training, "metrics" {name: number},
            "command", "commit", "hardware", "train_seconds"; and, where they are known, "eval_seed" (0 if not
            given), "settings" of the evaluation and "train" ({"steps", "val_loss", ...}).

    Raises:
        ValueError: the row, or the ledger that is there, is not as it should be.
    """
    path = Path(path)
    row = _checked({"eval_seed": 0, **row}, f"The row for {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = [other for other in read(path) if key(other) != key(row)] + [row]
        text = "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False, allow_nan=False) for r in _ordered(rows)) + "\n]\n"
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return row


def read(path: str | Path) -> list[Row]:
    """All rows, sorted; none where there is no ledger yet.

    Raises:
        ValueError: what is wrong with the ledger, and where, in one sentence.
    """
    path = Path(path)
    if not path.exists():
        return []
    way_out = "it is written by `emmdit evaluate` alone: take the version before from git"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor text
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"The ledger {path} is not JSON{where}; {way_out}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"The ledger {path} holds a {type(rows).__name__} in place of a list of rows; {way_out}.")
    rows = [_checked(row, f"Row {i} of the ledger {path}") for i, row in enumerate(rows, 1)]
    seen: dict[tuple[str, int, int], int] = {}
    for i, row in enumerate(rows, 1):
        if (first := seen.setdefault(key(row), i)) != i:
            raise ValueError(
                f"Rows {first} and {i} of the ledger {path} are both {row['experiment']} with seed {row['seed']} and "
                f"evaluation seed {row.get('eval_seed', 0)}; {way_out}."
            )
    return _ordered(rows)


def key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    """What a row is known by: experiment, training seed, evaluation seed."""
    return row["experiment"], row["seed"], row.get("eval_seed", 0)


def _ordered(rows: list[Row]) -> list[Row]:
    return [
        {k: row[k] for k in (*(k for k in KEYS if k in row), *sorted(row.keys() - set(KEYS)))}
        for row in sorted(rows, key=key)
    ]


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, not a dict.")
    missing = [name for name in REQUIRED if name not in row or (row[name] is None and name not in MAYBE_NONE)]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    if not isinstance(row["experiment"], str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", row["experiment"]):
        raise ValueError(
            f"{where} needs an experiment named like its YAML (shapes/one_path), not {row['experiment']!r}."
        )
    for name in ("seed", "eval_seed"):
        value = row.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where} ({row['experiment']}) needs a whole number as {name}, not {value!r}.")
    if not isinstance(row["metrics"], Mapping) or not row["metrics"]:
        raise ValueError(f"{where} ({row['experiment']}) has no metrics.")
    numbers = {**row["metrics"], "train_seconds": row["train_seconds"]}
    for name, value in numbers.items():
        if name == "train_seconds" and value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{where} ({row['experiment']}) has {value!r} for {name}, which is no number.")
    return dict(row)
