"""Timing and peak memory of function calls, fair between cases on one machine."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

Run = Callable[[], object]


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


def core_seconds() -> float:
    """CPU seconds so far of this process with all its threads, and of all that it started (loader workers, ranks on
    this machine), running or ended."""
    process = psutil.Process()
    total = sum(process.cpu_times()[:4])
    for child in process.children(recursive=True):
        with suppress(psutil.Error):  # it ended just now, and counts among the ended ones from here on
            total += sum(child.cpu_times()[:4])
    return total


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
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time warmed-up `cases` in turn, round by round, every other round backwards.

    Drift (heat, other work on the machine) then affects all cases alike, and ratios between them stay true where
    times do not. Calls shorter than `min_seconds` are repeated within a round; 0: none is.
    """
    device = torch.device(device)
    calls = dict.fromkeys(cases, 1)
    if min_seconds:
        calls = {name: max(1, math.ceil(min_seconds / clock(run, device, 1))) for name, run in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name in cases if i % 2 == 0 else reversed(cases):
            times[name].append(clock(cases[name], device, calls[name]))
        if progress is not None:
            progress(f"  round {i + 1}/{rounds}")
    return {name: Timing(statistics.median(t), min(t), max(t), rounds) for name, t in times.items()}


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int | None:
    """Bytes at the peak of one warmed-up call: the allocator's on a GPU, else the process' resident set.

    None where the system cannot tell (the resident set's peak is reset through /proc, so on Linux only).
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
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
