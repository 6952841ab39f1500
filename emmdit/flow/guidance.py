"""Classifier-free guidance (arXiv 2207.12598), by default over the whole range as the released model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emmdit.flow.paths import at_least_float32
from emmdit.types import Condition


def classifier_free_guidance(
    denoise: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    null: Condition | None,
    scale: float,
    interval: tuple[float, float] = (0.0, 1000.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function ``predict(x, t)`` for the samplers: null + scale (conditional - null).

    >>> predict = classifier_free_guidance(denoise, text(prompts), text.null(len(prompts)), scale=4.5)
    >>> x = sample(predict, noise, RectifiedFlow(), schedule(20))

    The formula is linear, so it is the same for predicted noise and predicted velocity. Where guidance acts,
    one call of ``denoise`` carries 2B rows, the unconditional B first (diffusers' order) and the conditional
    B after them; elsewhere it carries the B conditional rows only. It acts where ``scale`` > 1 and low <= t
    <= high (arXiv 2404.07724 limits it to a middle range). Which calls are made depends on t alone, so all
    ranks make the same ones.

    Args:
        denoise: ``denoise(x, t, condition) -> prediction`` with x (N, ...) and t (N,).
        condition: whatever keyword tensors the network needs, batch first, B rows.
        null: the same keys and shapes for the empty prompt, with B rows or one row for all; may be None if
            ``scale`` <= 1.
        scale: guidance scale; 1 and below mean none.
        interval: (low, high) on the 0..1000 scale of t, ends included.

    Raises:
        ValueError: if the interval is empty or ``null`` does not match ``condition``.
    """
    low, high = interval
    if not 0 <= low <= high <= 1000:
        raise ValueError(f"The guidance interval must satisfy 0 <= low <= high <= 1000, but is ({low}, {high}).")
    both = _stack(null, condition) if scale > 1 else None

    def predict(x: Tensor, t: Tensor) -> Tensor:
        now = float(t)  # the samplers' t is a CPU scalar: nothing to wait for
        if both is None or not low <= now <= high:
            return denoise(x, x.new_full((x.shape[0],), now, dtype=torch.float32), condition)
        t = x.new_full((2 * x.shape[0],), now, dtype=torch.float32)
        # float32, because the difference of two close bfloat16 numbers, times the scale, is mostly rounding
        unconditional, conditional = at_least_float32(denoise(torch.cat([x, x]), t, both)).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return predict


def _stack(null: Condition | None, condition: Condition) -> Condition:
    """The rows of ``null``, then those of ``condition``, key by key."""
    if null is None:
        raise ValueError("Guidance with a scale above 1 needs the null condition: pass the encoded empty prompt.")
    if null.keys() != condition.keys():
        raise ValueError(
            f"The null condition has the keys {sorted(null)} but the condition has {sorted(condition)}: "
            "make both with the same text conditioner."
        )
    both = {}
    for key, value in condition.items():
        if null[key].shape[1:] != value.shape[1:] or null[key].shape[0] not in (1, value.shape[0]):
            raise ValueError(
                f"'{key}' of the null condition has the shape {tuple(null[key].shape)}, which does not match "
                f"{tuple(value.shape)} of the condition: pad both to one length."
            )
        both[key] = torch.cat([null[key].expand_as(value), value])
    return both
