"""Ledger of results: a JSON list with one row per line, so that a new row is one line of a diff.

`benchmarks/results/shapes.json` is written by `emmdit evaluate --ledger`, never by hand; the tables of the docs are
rendered from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from emmdit.files import atomic_path, read_json
from emmdit.legacy import modernize

Row = dict[str, Any]

TYPES = {
    "experiment": str,
    "seed": int,
    "metrics": dict,
    "command": str,
    "commit": str | None,
    "hardware": str,
    "train_seconds": int | float | None,
}
LARGEST = 1e300  # of a metric; JSON may hold whole numbers beyond any float
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # like its YAML below experiments/: no part is empty, or `..`
KEYS = ("experiment", "seed", "eval_seed", "metrics", "train_seconds", "train", "settings", "command", "commit")


def append(path: str | Path, row: Mapping[str, Any]) -> Row:
    """Add `row`, in place of one of the same experiment, seed and evaluation seed; returns it as written.

    Any number of processes may do so at once (a lock file beside the ledger), and one that is killed leaves the old
    ledger whole.

    Args:
        row: "experiment" (name of its YAML below experiments/), "seed" of the training, "metrics" {name: number},
            "command", "commit", "hardware", "train_seconds"; and, where they are known, "eval_seed" (0 by default),
            "settings" of the evaluation and "train" ({"steps", "val_loss_ema", ...}).

    Raises:
        ValueError: the row, or the existing ledger, is not valid.
    """
    path, row = Path(path), {"eval_seed": 0, **row}
    _check(row, f"The row for {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = _ordered([other for other in read(path) if key(other) != key(row)] + [row])
        try:
            lines = [json.dumps(r, ensure_ascii=False, allow_nan=False).encode() for r in rows]
        except (ValueError, TypeError) as error:
            raise ValueError(f"A row for the ledger {path} is not JSON ({error}).") from error
        with atomic_path(path) as part:
            part.write_bytes(b"[\n" + b",\n".join(lines) + b"\n]\n")
    return row


def check(path: str | Path, experiment: str) -> None:
    """Raise what `append` would for this ledger and name, before the work is done."""
    if not NAME.fullmatch(experiment):
        raise ValueError(f"--experiment {experiment}: give a name such as shapes/one_path, as of its YAML.")
    if Path(path).is_dir():
        raise ValueError(f"The ledger {path} is a folder: name a JSON file.")
    read(path)


def read(path: str | Path) -> list[Row]:
    """All rows, sorted; none where there is no ledger yet. Raises ValueError for a broken ledger."""
    path = Path(path)
    if not path.exists():
        return []
    way_out = "restore the version in git, and let `emmdit evaluate` alone write it"
    try:
        rows = modernize(read_json(path, way_out))
    except RecursionError as error:
        raise ValueError(f"The ledger {path} is nested too deeply; {way_out}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"The ledger {path} is a {type(rows).__name__}, not a list of rows; {way_out}.")
    seen: dict[tuple[str, int, int], int] = {}
    for i, row in enumerate(rows, 1):
        _check(row, f"Row {i} of the ledger {path}")
        if (first := seen.setdefault(key(row), i)) != i:
            raise ValueError(f"Rows {first} and {i} of the ledger {path} are both {key(row)}; {way_out}.")
    return _ordered(rows)


def check_commits(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise a ValueError unless all seeds of an experiment were trained at one commit, with nothing uncommitted.

    An experiment none of whose rows says where it was trained is older than this rule and passes.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["experiment"], []).append(row)
    for name, own in found.items():
        trained = {(row.get("train") or {}).get("commit") or "an unknown commit" for row in own}
        if trained == {"an unknown commit"}:
            continue
        every = sorted({part for commit in trained for part in commit.split(", ")})
        if len(every) > 1:
            raise ValueError(f"{name} was trained at {' and '.join(every)}: train all its seeds again at one commit.")
        if dirty := sorted({c for c in (*every, *(row["commit"] for row in own)) if c and c.endswith("-dirty")}):
            raise ValueError(f"{name} has rows of uncommitted changes ({', '.join(dirty)}): make them at a commit.")


def key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    """What identifies a row: experiment, training seed, evaluation seed."""
    return row["experiment"], row["seed"], row.get("eval_seed", 0)


def _ordered(rows: list[Row]) -> list[Row]:
    return [
        {k: row[k] for k in (*(k for k in KEYS if k in row), *sorted(row.keys() - set(KEYS)))}
        for row in sorted(rows, key=key)
    ]


def _check(row: Any, where: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, not a dict.")
    if missing := [name for name in TYPES if name not in row]:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    wrong = {name: row[name] for name, kind in TYPES.items() if not isinstance(row[name], kind) or row[name] == {}}
    if not wrong:
        numbers = row["metrics"] | {"seed": row["seed"], "eval_seed": row.get("eval_seed", 0)}
        numbers |= {"train_seconds": row["train_seconds"] or 0}
        wrong = {k: v for k, v in numbers.items() if not isinstance(v, int | float) or not abs(v) < LARGEST}
    if not wrong and not NAME.fullmatch(row["experiment"]):
        wrong = {"experiment": row["experiment"]}
    if wrong:
        told = ", ".join(f"{value!r} as {name}" for name, value in wrong.items())
        raise ValueError(f"{where} has {told}: names are text such as shapes/one_path, values finite numbers.")
