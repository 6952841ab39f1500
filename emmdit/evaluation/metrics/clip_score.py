"""CLIP score: cosine of the CLIP vectors of each image and its prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emmdit.evaluation.metrics.base import ImageMetric, Sample
from emmdit.evaluation.metrics.clip import CLIP


class CLIPScore(ImageMetric):
    """100 times the mean cosine of each image with its own prompt, not below zero.

    As in torchmetrics the clip at zero is on the mean, not on each image (the paper's, arXiv 2104.08718, is
    2.5 max(cos, 0)). Unlike torchmetrics, whose cut of longer captions takes the end token that CLIP reads, captions
    over the model's 77 tokens lose only words. Values of different CLIPs cannot be compared.

    Args:
        clip: the model; its name is part of the metric's.
    """

    kind = "clip_score"
    scores: dict[str, float]  # of each image that this process saw, by its path

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip
        self.scores = {}
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        return f"clip_score_{self.clip.name}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        self.clip.prepare(device)

    def reset(self) -> None:
        super().reset()
        self.scores = {}

    def update(self, images: Tensor, samples: list[Sample]) -> None:
        """Add uint8 images (N, 3, H, W). Raises ValueError for other images."""
        if len(images) != len(samples):
            raise ValueError(f"{self.name} needs a prompt for each image, got {len(images)} and {len(samples)}.")
        seen, said = self.clip.images(images), self.clip.texts([str(sample.line["prompt"]) for sample in samples])
        cosines = (seen.double() * said.double()).sum(1)
        self.scores |= {s.path: 100 * c for s, c in zip(samples, cosines.tolist(), strict=True)}
        self.total += cosines.sum().to(self.total.device)
        self.count += len(samples)

    def compute(self) -> dict[str, float]:
        if self.count == 0:
            raise ValueError(f"{self.name} has seen no images: update it with at least one.")
        return {"": max(100 * float(self.total / self.count), 0.0)}

    def settings(self) -> dict[str, Any]:
        return {**self.clip.settings(), "formula": "max(100 * mean cosine, 0)"}
