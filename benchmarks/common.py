"""What the benchmarks share: the machine's description, fair timing, peak memory, tables and their files."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emmdit.machine import machine_line

ROOT = Path(__file__).parents[1]
Run = Callable[[], object]


# -- time --------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds of one call: the median of the rounds, and their range."""

    median: float
    low: float
    high: float
    rounds: int


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, device: torch.device, calls: int = 1) -> float:
    """Seconds of one of `calls` calls, the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def interleaved(
    cases: dict[str, Run],
    device: torch.device | str = "cpu",
    rounds: int = 5,
    min_seconds: float = 0.1,
    clock: Callable[[Run, torch.device, int], float] = seconds_of,
) -> dict[str, Timing]:
    """Time warmed-up `cases` in turn, round by round, every other round backwards.

    What drifts (heat, a neighbour on the machine) then falls on all cases alike, and ratios between them stay
    true where times do not. Calls shorter than `min_seconds` are repeated within a round; 0: none is.
    """
    device = torch.device(device)
    calls = dict.fromkeys(cases, 1)
    if min_seconds:
        calls = {name: max(1, math.ceil(min_seconds / clock(run, device, 1))) for name, run in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        names = list(cases) if i % 2 == 0 else list(reversed(cases))
        for name in names:
            times[name].append(clock(cases[name], device, calls[name]))
        progress(f"  round {i + 1}/{rounds}")
    return {name: Timing(statistics.median(t), min(t), max(t), rounds) for name, t in times.items()}


# -- memory ------------------------------------------------------------------------------------------


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int | None:
    """Bytes at the peak of one warmed-up call: the allocator's on a GPU, else the process' resident set.

    None where the system can not tell (the resident set's peak is reset through /proc, so on Linux only).
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier cases freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts here
        run()
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def tensor_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    storages = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


# -- tables and files --------------------------------------------------------------------------------


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
    lines = [
        "| " + " | ".join(columns.values()) + " |",
        "|" + "|".join("---:" if numeric[key] else "---" for key in columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    progress(f"written: {path}")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """With the options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    parser.add_argument("--quick", action="store_true", help="a reduced table, for two CPU cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def show(title: str, found: dict[str, Any], tables: Sequence[str]) -> None:
    """Print a Markdown page: title, machine, tables."""
    print("\n\n".join([f"# {title}", machine_line(found), *tables]))
