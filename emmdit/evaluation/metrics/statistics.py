"""Mean and covariance of features from sums that add up over batches and over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass
class FeatureStatistics:
    """Count (int64), sum (d,) and sum of outer products (d, d) of vectors, in float64.

    Sums and not the vectors themselves: the size (34 MB at d = 2048) does not grow with the number of images, and the
    statistics of all ranks are the sum of each rank's.
    """

    count: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, dim: int, device: torch.device | str = "cpu") -> Self:
        options = {"dtype": torch.float64, "device": device}
        return cls(torch.tensor(0, device=device), torch.zeros(dim, **options), torch.zeros(dim, dim, **options))

    def add(self, vectors: Tensor) -> None:
        """Take in (N, d), in place."""
        vectors = vectors.to(self.outer)
        self.count += len(vectors)
        self.total += vectors.sum(0)
        self.outer.addmm_(vectors.T, vectors)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) and unbiased covariance (d, d), float64. ValueError below two vectors."""
        n = int(self.count)
        if n < 2:
            raise ValueError(f"A covariance needs at least 2 images, got {n}: give more.")
        mean = self.total / n
        covariance = (self.outer - n * torch.outer(mean, mean)) / (n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()
