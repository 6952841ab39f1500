"""How fast training goes, and what share of the device it uses."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

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
    checkpoint fell into are left out; a callback that does other work between steps should say so, by
    `Throughput.exclude(trainer)`.

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

    def exclude_step(self) -> None:
        """Leave the step that is going on out of the window."""
        self._mark = None

    @staticmethod
    def exclude(trainer: Trainer) -> None:
        """The same for other callbacks to call, after work of their own that is not training."""
        for callback in trainer.callbacks:
            if isinstance(callback, Throughput):
                callback.exclude_step()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        self.exclude_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.exclude_step()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.exclude_step()
