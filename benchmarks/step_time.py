"""Milliseconds of a training step, of several experiments in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.common import interleaved
from emmdit.timing import synchronize
from lightning_modules.callbacks import EMA, NonFinite
from lightning_modules.commands.fit import SuiteCLI


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


def step_seconds(files: Sequence[str], steps: int, device: torch.device) -> tuple[float, int]:
    """Median seconds of a step after a warm-up, of a short training in this process, and the denoiser's parameters."""
    trainer = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1, "max_steps": steps}
    trainer |= {"limit_val_batches": 0, "logger": "false"}
    with TemporaryDirectory() as folder:
        options = [f"--trainer.{key}={value}" for key, value in (trainer | {"default_root_dir": folder}).items()]
        run = SuiteCLI(args=[*files, *options], run=False, exit_on_error=False)
        timer = StepTimer()  # last: the EMA update belongs to the step
        run.trainer.callbacks = [c for c in run.trainer.callbacks if isinstance(c, EMA | NonFinite)] + [timer]
        run.trainer.fit(run.model, run.datamodule)
    return statistics.median(timer.seconds[steps // 3 :]), sum(p.numel() for p in run.model.denoiser.parameters())


def time_steps(
    files: Mapping[str, Sequence[str]], compare: str | None, device: torch.device, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Rows of the table of step times: the experiments take turns, so that drift falls on all alike.

    Args:
        files: `-c FILE ...` of each experiment.
        compare: experiment that ratios are to.
    """
    parameters: dict[str, int] = {}

    def clock(name: str) -> float:
        seconds, parameters[name] = step_seconds(files[name], steps, device)
        return seconds

    runs = {name: lambda name=name: clock(name) for name in files}
    timings = interleaved(runs, device, rounds, min_seconds=0, clock=lambda once, device, calls: once())
    rows = []
    for name, timing in timings.items():
        ms = {"ms": timing.median * 1e3, "ms_low": timing.low * 1e3, "ms_high": timing.high * 1e3}
        ratio = timing.median / timings[compare].median if compare in timings else None
        rows.append({"experiment": name, "parameters": parameters[name], **ms, "ratio": ratio})
    return rows
