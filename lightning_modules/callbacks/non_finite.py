"""What to do when a gradient is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class NonFinite(Callback):
    """Looks at the gradient norm before each optimizer step; skips the step, or stops, if it is not finite.

    `on_before_optimizer_step` comes when gradients are unscaled and not yet clipped: the logged `grad_norm` is the true
    one. To skip, gradients are set to None, so that optimizers leave parameters and their own state untouched (with
    zeros, momentum and weight decay would still move them); global step, schedule and samples seen move on.

    It costs one pass over the gradients and one wait for the device at each optimizer step. All ranks decide alike:
    under DDP gradients are equal, under FSDP2 the norm is over all shards, and the flag is summed over the ranks.

    What was in the batches of a skipped step, on all ranks, goes to `non_finite.jsonl` in the run folder.

    Args:
        policy: "skip" the step, or "raise" at once.
        limit: stop after this many skipped steps in a row.
    """

    def __init__(self, policy: Literal["skip", "raise"] = "skip", limit: int = 10) -> None:
        self.policy, self.limit = policy, limit
        self.skipped = 0  # in all
        self.consecutive = 0
        self._batches: list[tuple[Tensor | None, Tensor | None]] = []  # of this optimizer step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, dict):
            self._batches.append((batch.get("sample_id"), batch.get("position")))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = grad_norm([p.grad for p in params]).to(pl_module.device)
        bad = (~torch.isfinite(norm)).float()
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="sum")
        value, is_bad = torch.stack([norm.float(), bad]).tolist()  # the one wait
        pl_module.log("grad_norm", value, on_step=True, on_epoch=False)
        pl_module.log("skipped_steps", float(self.skipped + bool(is_bad)), on_step=True, on_epoch=False)
        batches, self._batches = self._batches, []
        if not is_bad:
            self.consecutive = 0
            return
        self.skipped += 1
        self.consecutive += 1
        ids = self._report(trainer, pl_module, value, batches)
        for p in params:
            p.grad = None
        if self.policy == "raise" or self.consecutive >= self.limit:
            many = f"for {self.consecutive} steps in a row " if self.policy == "skip" else ""
            raise ValueError(
                f"Gradients were not finite {many}(step {pl_module.training_steps}, sample ids {ids}): look at "
                "these samples (non_finite.jsonl), lower the learning rate, or resume earlier."
            )

    def _report(self, trainer: Trainer, pl_module: LightningModule, norm: float, batches: list) -> str:
        """Write down what was in the step, on every rank together; returns the first sample ids as text."""
        columns = []
        for column in zip(*batches, strict=True):
            column = [part.to(pl_module.device) for part in column if part is not None]
            columns.append(pl_module.all_gather(torch.cat(column)).flatten().tolist() if column else [])
        ids, positions = columns or ([], [])
        trained = ((name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None)
        where = [name for name, grad in trained if not _finite(grad)][:5]
        folder = trainer.log_dir  # broadcasts
        if trainer.is_global_zero and folder is not None:
            row = {"step": pl_module.training_steps, "grad_norm": str(norm), "sample_id": ids, "position": positions}
            Path(folder).mkdir(parents=True, exist_ok=True)
            with open(Path(folder) / "non_finite.jsonl", "a") as file:
                file.write(json.dumps({**row, "parameters_on_rank_zero": where}) + "\n")
        shown = ", ".join(map(str, ids[:16])) + (", ..." if len(ids) > 16 else "") if ids else "unknown"
        if self.policy == "skip":
            rank_zero_warn(
                f"Skipped step {pl_module.training_steps}: gradient norm {norm}, sample ids {shown} "
                f"({self.skipped} skipped so far)."
            )
        return shown

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.consecutive = state_dict["skipped"], state_dict["consecutive"]


def grad_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm of all gradients together, all shards of a DTensor included; a plain scalar tensor."""
    sharded = [g for g in grads if hasattr(g, "full_tensor")]
    plain = [g for g in grads if not hasattr(g, "full_tensor")]
    norms = [torch.nn.utils.get_total_norm(group) for group in (sharded, plain) if group]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if not norms:
        return torch.tensor(0.0)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _finite(grad: Tensor) -> bool:
    local = getattr(grad, "_local_tensor", grad)
    return math.isfinite(local.float().abs().max().item()) if local.numel() else True
