"""Exponential moving average of parameters, as pure functions over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ema_decay(step: int, decay: float, warmup: bool = True) -> float:
    """Decay of update number `step` (from 0): min(decay, (1 + step) / (10 + step)) with warm-up.

    The warm-up forgets the initial weights: without it 0.9999 still carries 37% of them after 10,000 updates.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def ema_update(ema_params: Sequence[torch.Tensor], params: Sequence[torch.Tensor], decay: float) -> None:
    """In place: ema <- decay * ema + (1 - decay) * param, for lists of tensors of equal shapes.

    Computed in the dtype of `ema_params`, which should be float32: in bfloat16 a step of 1 - 0.9999 is lost
    in rounding. Sharded tensors (DTensor) are averaged shard by shard, without communication; both lists must
    be sharded alike.
    """
    ema_params, params = local_tensors(ema_params), local_tensors(params)
    if len(ema_params) != len(params):
        raise ValueError(f"The EMA has {len(ema_params)} tensors, the network {len(params)}: they must be alike.")
    if not params:
        return
    # same dtype on both sides: mixed dtypes fall off the fused path and, with lerp, fail
    params = [p.to(e.dtype) for e, p in zip(ema_params, params, strict=True)]
    torch._foreach_mul_(ema_params, decay)
    torch._foreach_add_(ema_params, params, alpha=1 - decay)


def local_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The data itself: this rank's shard of a DTensor, a plain tensor as it is; not copies."""
    return [t._local_tensor if hasattr(t, "_local_tensor") else t.detach() for t in tensors]
