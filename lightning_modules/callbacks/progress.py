"""Progress that reads well on a terminal, in a notebook and in the log file of a job."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar


class ProgressBar(LightningProgressBar):
    """Step, loss, images/s and time left: one line redrawn on a terminal, plain lines elsewhere.

    Shows the loss of the latest step and whatever is logged with `prog_bar=True`. Values leave the device
    only when a line is written. The time left comes from the mean speed of this session, validation included.

    Args:
        every: seconds from one plain line to the next.
        refresh: seconds from one redrawing to the next.
    """

    def __init__(self, every: float = 10.0, refresh: float = 0.2) -> None:
        super().__init__()
        self.every, self.refresh = every, refresh
        self._enabled = True
        self._open_line = False

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on a line of its own."""
        if self._enabled:
            self._close_line()
            print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = trainer.estimated_stepping_batches  # optimizer steps in all; may be infinite
        self._first: tuple[float, int, int] | None = None  # time, step and samples after the first step, which compiles
        self._before: tuple[float, int] | None = None  # the same at the latest line
        self._rate = 0.0
        self._shown = -float("inf")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        now, step, samples = time.perf_counter(), pl_module.training_steps, pl_module.samples_seen
        if self._first is None:
            self._first = (now, step, samples)
            self._before = (now, samples)
        terminal = sys.stdout.isatty()
        done = step >= self._total
        if not done and now - self._shown < (self.refresh if terminal else self.every):
            return
        self._shown = now
        if now > self._before[0]:
            rate = (samples - self._before[1]) / (now - self._before[0])
            # a redrawn line would jitter: smooth it
            self._rate = 0.9 * self._rate + 0.1 * rate if terminal and self._rate else rate
            self._before = (now, samples)
        self._write(self._line(trainer, pl_module, outputs, now, step), terminal and not done)

    def _line(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, now: float, step: int) -> str:
        known = self._total != float("inf")
        parts = [f"step {step:,}/{self._total:,}" if known else f"step {step:,}"]
        if known and sys.stdout.isatty():
            filled = round(20 * min(1.0, step / max(1, self._total)))
            parts[0] = f"[{'#' * filled}{'.' * (20 - filled)}] {parts[0]}"
        values = {"loss": outputs["loss"] * trainer.accumulate_grad_batches} if outputs and "loss" in outputs else {}
        values |= {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
        parts += [f"{name} {float(value):.4g}" for name, value in values.items()]
        if self._rate:
            parts.append(f"{self._rate:,.1f} images/s")
        steps = step - self._first[1]
        if known and steps > 0 and step < self._total:
            parts.append(f"{clock((self._total - step) * (now - self._first[0]) / steps)} left")
        return "  ".join(parts)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking:
            values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/loss")}
            if values:
                line = "  ".join(f"{name} {float(value):.4g}" for name, value in sorted(values.items()))
                self._write(f"step {pl_module.training_steps:,}  {line}", redraw=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_line()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close_line()

    def _write(self, line: str, redraw: bool) -> None:
        start = "\r\x1b[K" if redraw or self._open_line else ""  # to the start of the line, and clear it
        print(start + line, end="" if redraw else "\n", flush=True)
        self._open_line = redraw

    def _close_line(self) -> None:
        if self._open_line:
            print(flush=True)
            self._open_line = False


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15, 90000 -> 1d 1:00:00."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}d " if days else "") + (f"{h}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}")
