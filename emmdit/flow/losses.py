"""The loss of the flow; what else is learned (REPA, distillation) is added by its own component."""

from __future__ import annotations

from torch import Tensor


def flow_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, (B, ...) -> (B,), in float32; ``weight`` (B,) multiplies it."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"Prediction and target must have one shape, but have {tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    loss = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return loss if weight is None else loss * weight
