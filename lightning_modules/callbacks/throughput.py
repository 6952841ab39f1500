"""How fast training goes, and what share of the device it uses."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from emmdit.timing import core_seconds, synchronize

# Dense bfloat16 peak in TFLOP/s (NVIDIA's data sheets state twice that, with sparsity), by the words of
# `torch.cuda.get_device_name()`. The first match counts, so the longer names come first.
PEAK_TFLOPS = {
    "MI325X": 1307.4,  # AMD Instinct MI325X data sheet
    "MI300X": 1307.4,  # AMD Instinct MI300X data sheet
    "MI300A": 980.6,  # AMD Instinct MI300A data sheet
    "MI250X": 191.5,  # AMD CDNA 2 white paper: 383 for the card, which is two devices to the driver
    "MI210": 181.0,  # AMD Instinct MI210 data sheet
    "B200": 2250.0,  # NVIDIA HGX B200 data sheet, 4,500 with sparsity
    "H200": 989.4,  # NVIDIA H200 data sheet (SXM), 1,979 with sparsity
    "H100 PCIe": 756.0,  # NVIDIA H100 data sheet, 1,513 with sparsity
    "H100 NVL": 835.0,  # NVIDIA H100 NVL data sheet, 1,671 with sparsity
    "H100": 989.4,  # NVIDIA H100 data sheet (SXM), 1,979 with sparsity
    "A100": 312.0,  # NVIDIA A100 data sheet, 624 with sparsity
    "L40S": 362.0,  # NVIDIA L40S data sheet, 733 with sparsity
    "L4": 121.0,  # NVIDIA L4 data sheet, 242 with sparsity
    "RTX 4090": 165.2,  # NVIDIA Ada architecture white paper, fp32 accumulation
    "RTX 3090": 71.0,  # NVIDIA Ampere GA102 white paper, fp32 accumulation
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device by its name, None if it is not in the table."""
    words = device_name.replace("-", " ")
    return next((peak for key, peak in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", words, re.IGNORECASE)), None)


class Throughput(Callback):
    """Logs `throughput/*` at each logging step, over the latest `window` training steps.

    - `images_per_second` of all ranks together and `seconds_per_step`, by the wall clock;
    - `data_wait`: share of that time spent waiting for the loader (if the loader counts `wait_seconds`);
    - `mfu`: model FLOPs utilization, if the FLOPs of a sample and the device's peak are known;
    - `peak_memory_gib`: the most the allocator of rank zero's device has held since the start.

    Nothing is synchronized: the device's queue is short against a window. Steps that a validation or a
    checkpoint fell into are left out; a callback that does other work between steps does it within
    `Throughput.paused(trainer)`.

    `totals` counts the training since its beginning, through every resume: data, steps and checkpoints, without
    validation and the work of other callbacks. Core-seconds are CPU time of all threads and of the processes that rank
    zero started; the clocks are read at pauses alone.

    Args:
        window: training steps to average over.
        peak_tflops: of one device in the precision used; by default looked up by its name, for bfloat16.
        flops_per_sample: of a training step (forward and backward) on one sample; by default
            `pl_module.flops_per_sample` if there is one.
    """

    def __init__(
        self, window: int = 50, peak_tflops: float | None = None, flops_per_sample: float | None = None
    ) -> None:
        self.peak_tflops, self.flops_per_sample = peak_tflops, flops_per_sample
        self.latest: dict[str, float] = {}
        # (seconds, samples, seconds waited) of each step
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=window)
        self._mark: tuple[float, int, float] | None = None
        self._last_step = 0
        self._total = (0.0, 0.0)  # seconds and core-seconds until `_since`
        self._since: tuple[float, float] | None = None  # both clocks when training began to run; None: it does not
        self._validates = False  # within training, and not as `emmdit validate`

    @property
    def totals(self) -> dict[str, float]:
        """Seconds and core-seconds of training."""
        now = (time.perf_counter(), core_seconds()) if self._since else (0.0, 0.0)
        spent = (t + n - s for t, n, s in zip(self._total, now, self._since or (0.0, 0.0), strict=True))
        return dict(zip(("seconds", "core_seconds"), spent, strict=True))

    def _run(self, runs: bool, device: torch.device) -> bool:
        """Start or stop the clocks, and leave the step that is going on out of the window; whether they ran before."""
        ran, self._mark = self._since is not None, None
        if ran and not runs:
            synchronize(device)  # what the device still has to do is training
            self._total, self._since = tuple(self.totals.values()), None
        elif runs and not ran:
            self._since = time.perf_counter(), core_seconds()
        return ran

    @staticmethod
    def of(trainer: Trainer) -> list[Throughput]:
        return [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]

    @staticmethod
    @contextmanager
    def paused(trainer: Trainer) -> Iterator[None]:
        """For work of other callbacks that is not training."""
        device = trainer.strategy.root_device
        stopped = [meter for meter in Throughput.of(trainer) if meter._run(False, device)]
        try:
            yield
        finally:
            for meter in stopped:
                meter._run(True, device)

    def state_dict(self) -> dict[str, Any]:
        return self.totals

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._total = state_dict["seconds"], state_dict["core_seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(True, pl_module.device)
        self._steps.clear()
        self._mark, self._last_step = None, pl_module.training_steps
        if self.peak_tflops is None and pl_module.device.type == "cuda":
            self.peak_tflops = peak_tflops(torch.cuda.get_device_name(pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.training_steps == self._last_step:  # a micro batch of gradient accumulation
            return
        self._last_step = pl_module.training_steps
        waited = getattr(trainer.train_dataloader, "wait_seconds", 0.0)
        mark = (time.perf_counter(), pl_module.samples_seen, waited)
        if self._mark is not None:
            self._steps.append(tuple(now - then for now, then in zip(mark, self._mark, strict=True)))
        self._mark = mark
        if self._steps and trainer._logger_connector.should_update_logs:
            if self.flops_per_sample is None:
                self.flops_per_sample = getattr(pl_module, "flops_per_sample", None)
            seconds, samples, waited = (sum(column) for column in zip(*self._steps, strict=True))
            speed = samples / seconds
            self.latest = {"images_per_second": speed, "seconds_per_step": seconds / len(self._steps)}
            if hasattr(trainer.train_dataloader, "wait_seconds"):
                self.latest["data_wait"] = waited / seconds
            if self.peak_tflops and self.flops_per_sample:
                peak = self.peak_tflops * 1e12 * trainer.world_size
                self.latest["mfu"] = speed * self.flops_per_sample / peak
            if pl_module.device.type == "cuda":
                self.latest["peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step that Lightning logs by
            for logger in trainer.loggers:
                logger.log_metrics({f"throughput/{k}": v for k, v in self.latest.items()}, step=step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validates = self._run(False, pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(self._validates, pl_module.device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._mark = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(False, pl_module.device)
