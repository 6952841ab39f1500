"""Muon for matrices, AdamW for everything else, as one optimizer (so that automatic optimization can drive it).

Muon: momentum, then the nearest semi-orthogonal matrix by a Newton-Schulz iteration (K. Jordan et al. 2024,
"Muon: an optimizer for hidden layers"). `torch.optim.Muon` takes matrices only; a second optimizer beside it would
force manual optimization and two checkpoint states on every user.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def parameter_groups(network: nn.Module, *others_too: nn.Module) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the matrices inside the network's blocks (`matrix: True`) and all the rest.

    AdamW ignores the mark; `MuonAdamW` reads it. Frozen parameters are left out. Blocks are a module list named
    `blocks` (E-MMDiT) or `transformer_blocks` (diffusers); parameters of `others_too` are none of the matrices.
    """
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            in_blocks = name.split(".")[0] in ("blocks", "transformer_blocks")
            is_matrix = in_blocks and parameter.ndim == 2 and name.endswith("weight")
            (matrices if is_matrix else others).append(parameter)
    others += [p for module in others_too for p in module.parameters() if p.requires_grad]
    groups = [{"params": matrices, "matrix": True}, {"params": others, "matrix": False}]
    return [group for group in groups if group["params"]]


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., m, n) -> about U V^T of each matrix; singular values end up in about [0.7, 1.2]."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):  # x <- a x + b (x x^T) x + c (x x^T)^2 x
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).reshape(matrices.shape).to(matrices.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on groups marked `matrix: True` (see `parameter_groups`), AdamW on the others.

    Args:
        params: parameter groups; a plain iterable is AdamW throughout.
        lr: learning rate of both. Muon's update is scaled by 0.2 sqrt(max(m, n)) to AdamW's usual root mean square
            (Liu et al. 2025, arXiv 2502.16982), so that one rate and one schedule serve both.
        muon_lr_scale: extra factor on Muon's rate.
        momentum: Muon's (Nesterov) momentum.
        newton_schulz_dtype: bfloat16 is several times faster where the device has it, and precise enough.
        betas, eps: AdamW's.
        weight_decay: decoupled, for both.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        muon_lr_scale: float = 1.0,
        momentum: float = 0.95,
        newton_schulz_dtype: Literal["float32", "bfloat16"] = "float32",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1:
            raise ValueError(f"MuonAdamW needs lr >= 0 and 0 <= momentum < 1, got lr {lr}, momentum {momentum}.")
        if newton_schulz_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"newton_schulz_dtype must be float32 or bfloat16, got {newton_schulz_dtype!r}.")
        defaults = dict(lr=lr, muon_lr_scale=muon_lr_scale, momentum=momentum, newton_schulz_dtype=newton_schulz_dtype)
        defaults |= dict(betas=tuple(betas), eps=eps, weight_decay=weight_decay, matrix=False)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                (self._muon if group["matrix"] else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers, grads = [self.state[p]["momentum_buffer"] for p in parameters], [p.grad for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])

        by_shape: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(parameters):
            by_shape.setdefault(p.shape, []).append(i)
        lr = group["lr"] * group["muon_lr_scale"]
        dtype = getattr(torch, group["newton_schulz_dtype"])
        for shape, indices in by_shape.items():
            # Sharded matrices are gathered: the update of a matrix needs all of it.
            full = [u.full_tensor() if isinstance(u, DTensor) else u for u in (updates[i] for i in indices)]
            for i, update in zip(indices, orthogonalize(torch.stack(full), dtype=dtype).unbind(), strict=True):
                p = parameters[i]
                if isinstance(p, DTensor):
                    update = distribute_tensor(update, p.device_mesh, p.placements)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * max(shape) ** 0.5)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p] |= dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads, states = [p.grad for p in parameters], [self.state[p] for p in parameters]
        means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        settings = dict(zip(("beta1", "beta2"), group["betas"], strict=True), lr=group["lr"], eps=group["eps"])
        settings |= dict(weight_decay=group["weight_decay"], amsgrad=False, maximize=False, foreach=True)
        adamw(parameters, grads, means, squares, [], steps, **settings)


class WarmupDecay(torch.optim.lr_scheduler.LambdaLR):
    """Linear warm-up, constant, then linear to (almost) zero over the last part of training.

    Args:
        warmup: steps of the rise from lr / warmup.
        total: steps of training, needed for the decay.
        decay: share of `total` spent falling; 0: constant after the warm-up, as in the released recipe.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, warmup: int = 500, total: int | None = None, decay: float = 0.0
    ) -> None:
        if not 0 <= decay <= 1 or (decay and total is None):
            raise ValueError(f"WarmupDecay needs 0 <= decay <= 1, and total where it decays; got {decay}, {total}.")
        if warmup < 0 or (total is not None and total < 1):
            raise ValueError(f"WarmupDecay needs warmup >= 0 and total >= 1, got warmup {warmup}, total {total}.")

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / max(warmup, 1))
            fall = max(0.0, min(1.0, (1 - step / total) / decay)) if decay else 1.0
            return rise * fall

        super().__init__(optimizer, factor)
