"""Frechet distance between feature distributions (FID, arXiv 1706.08500), exact and fast for any number of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from scipy.linalg import eigvalsh, lapack
from torch import Tensor

from emmdit.evaluation.metrics.base import Sample
from emmdit.evaluation.metrics.reference import ReferenceMetric


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians; mu (d,), sigma (d, d).

    With sigma1 = B^T B, B (r, d) and r the rank, the non-zero eigenvalues of sigma1 sigma2 are those of the symmetric
    B sigma2 B^T: real by construction, where a general matrix root turns complex once a covariance is singular. B is
    a pivoted Cholesky factor, which stops at the rank by itself: n <= d images cost O(n d^2), and any number one
    symmetric r x r eigenproblem. Put the set of fewer images first.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise ValueError(
            f"Two Gaussians of one dimension were expected, not {mu1.shape}, {sigma1.shape} and {mu2.shape}, "
            f"{sigma2.shape}."
        )
    factor, pivots, rank, _ = lapack.dpstrf(sigma1)
    rows = np.zeros((rank, len(mu1)))
    rows[:, pivots - 1] = np.triu(factor[:rank])
    # Rounding leaves eigenvalues of -1e-17 where the truth is 0.
    root = np.sqrt(eigvalsh(rows @ sigma2 @ rows.T).clip(0)).sum() if rank else 0.0
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(float(distance), 0.0)


@dataclass
class FeatureStatistics:
    """Count (int64), sum (d,) and sum of outer products (d, d) of vectors, in float64.

    Sums, not the vectors themselves: the size (34 MB at d = 2048) does not grow with the number of images, and the
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
        """Add vectors (N, d), in place."""
        vectors = vectors.to(self.outer)
        self.count += len(vectors)
        self.total += vectors.sum(0)
        self.outer.addmm_(vectors.T, vectors)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (d,) and unbiased covariance (d, d), float64. ValueError below two vectors."""
        n = int(self.count)
        if n < 2:
            raise ValueError(f"A covariance needs at least 2 images, got {n}: give more.")
        mean = self.total / n
        covariance = (self.outer - n * torch.outer(mean, mean)) / (n - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


class FID(ReferenceMetric):
    """Frechet distance between the features of the images and reference statistics; it falls as images are added.

    With `CleanInception` it is clean-fid's number, with `CLIPFeatures` CLIP-FID (FID-C in EDiT's tables).
    """

    family = "fid"
    arrays = ("mu", "sigma")

    def _states(self) -> None:
        zeros = FeatureStatistics.zeros(self.features.dim)
        for name in ("count", "total", "outer"):
            self.add_state(name, default=getattr(zeros, name), dist_reduce_fx="sum")

    def _take(self, vectors: Tensor, samples: list[Sample]) -> None:
        self._statistics().add(vectors)

    def _statistics(self) -> FeatureStatistics:
        return FeatureStatistics(self.count, self.total, self.outer)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        self._enough(int(self.count))
        reference = self._reference
        return {"": frechet_distance(*self._statistics().moments(), reference["mu"], reference["sigma"])}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"covariance": "unbiased (n - 1), float64"}
