"""Shared parts of the benchmarks: arguments, Markdown tables, JSON files, and the clock of one CPU thread."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from emmdit import timing
from emmdit.provenance import machine_line

ROOT = Path(__file__).parents[1]


def markdown_table(rows: Iterable[dict[str, Any]], columns: dict[str, str], digits: int = 3) -> str:
    """GitHub Markdown of `rows`; `columns` maps keys to headings; floats to `digits` significant digits."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            shown = f"{value:.{digits}g}"
            return f"{value:.0f}" if "e" in shown and abs(value) >= 1 else shown
        return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)

    rows = list(rows)
    numeric = {key: any(isinstance(row.get(key), int | float) for row in rows) for key in columns}
    lines = ["| " + " | ".join(columns.values()) + " |"]
    lines += ["|" + "|".join("---:" if numeric[key] else "---" for key in columns) + "|"]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_json(path: str | Path | None, content: dict[str, Any]) -> None:
    """Write `content`; nothing without a path."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
        progress(f"written: {path}")


def show(title: str, found: dict[str, Any], *tables: str) -> None:
    """Print a Markdown page: title, machine, tables."""
    print("\n\n".join([f"# {title}", machine_line(found), *tables]))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def whole(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, not {text}")
        return int(text)

    return number


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """With the options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    parser.add_argument("--quick", action="store_true", help="a reduced table, for two CPU cores")
    return parser


interleaved = functools.partial(timing.interleaved, progress=progress)


def clock_of(device: torch.device) -> Callable[[timing.Run, torch.device, int], float]:
    """Of one CPU thread the seconds in which it ran, which other processes do not lengthen; else the wall clock."""
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return timing.seconds_of

    def running_seconds(run: timing.Run, device: torch.device, calls: int = 1) -> float:
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls

    return running_seconds
