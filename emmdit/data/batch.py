"""Batch of training samples, as the data loaders hand it to a training module."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import torch


class Batch(TypedDict):
    """It has `image` or `latents`; conditions are computed from `caption`."""

    caption: list[str]
    sample_id: torch.Tensor
    """(B,) int64, index in the dataset."""
    position: NotRequired[torch.Tensor]
    """(B,) int64, global position in the training stream."""
    image: NotRequired[torch.Tensor]
    """(B, 3, H, W) float32 in [-1, 1]."""
    latents: NotRequired[torch.Tensor]
    """(B, C, h, w), scaled as the autoencoder's `encode` does."""
    features: NotRequired[torch.Tensor]
    """(B, N, D) precomputed vision features, row-major patches."""
    condition: NotRequired[dict[str, torch.Tensor]]
    """Precomputed text condition of the caption, as the text encoder would give it."""
