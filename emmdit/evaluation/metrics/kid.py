"""Kernel Inception distance (arXiv 1801.01401): unbiased, so the better curve with few images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from emmdit.evaluation.metrics.features import FeatureExtractor
from emmdit.evaluation.metrics.reference import VectorMetric


def kernel_distance(
    generated: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, (n, d) and (m, d), mean over random subsets.

    The subsets are those clean-fid draws after `np.random.seed(seed)`. Where both sets are one subset each, they are
    all the same and one is enough.
    """
    size = min(len(generated), len(reference), subset_size)
    if size == len(generated) == len(reference):
        subsets = 1
    draw = np.random.RandomState(seed)

    def choose(vectors: Tensor) -> Tensor:
        return vectors[torch.from_numpy(draw.choice(len(vectors), size, replace=False)).to(vectors.device)]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    total = torch.zeros((), dtype=generated.dtype, device=generated.device)
    for _ in range(subsets):
        x, y = choose(generated), choose(reference)
        within = kernel(x, x) + kernel(y, y)
        total += (within.sum() - within.trace()) / (size - 1) - 2 * kernel(x, y).sum() / size
    return float(total / subsets / size)


class KID(VectorMetric):
    """Kernel distance between the features of the images and the reference's, as clean-fid computes it (not x 1000).

    Args:
        features, reference: see `ReferenceMetric`; the file ends in `_kid.npz`.
        subsets, subset_size, seed: how many random subsets of how many images are averaged.
    """

    family = "kid"

    def __init__(
        self, features: FeatureExtractor, reference: str, subsets: int = 100, subset_size: int = 1000, seed: int = 0
    ) -> None:
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"KID needs subsets >= 1 and subset_size >= 2, got {subsets} and {subset_size}.")
        super().__init__(features, reference)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        return {"": kernel_distance(*self._both(), self.subsets, self.subset_size, self.seed)}

    def settings(self) -> dict[str, Any]:
        kernel = {"kernel": "(x.y / d + 1)^3", "estimator": "unbiased"}
        return super().settings() | kernel | {name: getattr(self, name) for name in ("subsets", "subset_size", "seed")}
