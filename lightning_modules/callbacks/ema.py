"""EMA of the denoiser, kept in `pl_module.ema_denoiser`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from emmdit.ema import ema_decay, ema_update, local_tensors


class EMA(Callback):
    """Moves `pl_module.ema_denoiser` towards `pl_module.denoiser` after each training step.

    It is a frozen copy made in `configure_model` and sharded by the same calls, so it is saved and loaded with the
    module. It is updated in the callback's hook, since the module's runs after checkpoints are written: there, every
    checkpoint would hold the EMA of one step before.

    Args:
        decay: of each update.
        warmup: begin with (1 + n) / (10 + n) at update n until that exceeds `decay`.
        every_n_steps: training steps from one update to the next.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), not {decay}.")
        if every_n_steps < 1:
            raise ValueError(f"EMA every_n_steps must be at least 1, not {every_n_steps}.")
        self.decay, self.warmup, self.every_n_steps = decay, warmup, every_n_steps
        self.updates = 0
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ema = getattr(pl_module, "ema_denoiser", None)
        if ema is None:
            raise ValueError("The EMA callback found no pl_module.ema_denoiser: turn its EMA on or drop the callback.")
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in ema.parameters()):
            raise ValueError("The EMA weights are 16 bit, in which small updates are lost: use 32-true or bf16-mixed.")
        self._last_step = pl_module.training_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = pl_module.training_steps
        if step == self._last_step:  # a micro batch of gradient accumulation
            return
        self._last_step = step
        if step % self.every_n_steps == 0:
            update(pl_module.ema_denoiser, pl_module.denoiser, ema_decay(self.updates, self.decay, self.warmup))
            self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]


def update(ema: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    """One update of a whole network: parameters are averaged, buffers are copied. Works on FSDP2 shards."""
    for module in ema.modules():
        if hasattr(module, "reshard"):  # FSDP2 leaves a root unsharded after a forward without backward
            module.reshard()
    ema_update(list(ema.parameters()), list(network.parameters()), decay)
    with torch.no_grad():
        for target, source in zip(
            local_tensors(list(ema.buffers())), local_tensors(list(network.buffers())), strict=True
        ):
            target.copy_(source)
