"""A callback for tests: writes what each step saw, and can kill its own process without warning."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback


class Recorder(Callback):
    """Appends a JSON line a step to `<folder>/rank<r>.jsonl`; after step `kill_at` the process dies by SIGKILL."""

    def __init__(self, folder: str, kill_at: int | None = None) -> None:
        self.folder, self.kill_at = Path(folder), kill_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {
            "step": trainer.global_step,
            "ids": batch["sample_id"].tolist(),
            "loss": float(outputs["loss"]),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "samples_seen": pl_module.samples_seen,
            "ema": float(sum(full(p).double().square().sum() for p in pl_module.ema_denoiser.parameters())),
            "raw": float(sum(full(p).double().square().sum() for p in pl_module.denoiser.parameters())),
        }
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def read(folder: str | Path, rank: int = 0) -> list[dict]:
    lines = Path(folder, f"rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
