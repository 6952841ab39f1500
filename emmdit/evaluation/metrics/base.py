"""Base class of image metrics.

A metric is a subclass of `ImageMetric` in a file of its own and a line in `emmdit/evaluation/__init__.py`.
Then YAML files name it as `emmdit.evaluation.NAME`, for `emmdit evaluate` and for the `Evaluation` callback.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class Sample:
    """One image of a set: image `number` of prompt `index`, whose `line` has at least "prompt"."""

    index: int
    number: int
    line: Mapping[str, Any]
    seed: int

    @property
    def path(self) -> str:
        """Path within the set's folder, in GenEval's official layout."""
        return f"{self.index:05d}/samples/{self.number:05d}.png"


def check_images(images: Tensor, reader: str) -> None:
    """Raise ValueError unless `images` are uint8 (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"{reader} reads uint8 images (N, 3, H, W), not {images.dtype} {tuple(images.shape)}: scale others to "
            f"0..255 first."
        )


class ImageMetric(Metric, ABC):
    """A torchmetrics metric of images and the prompts they were made from.

    States are sums or concatenations, so ranks may hold different numbers of images. Networks are held by plain
    objects: none of their weights is in a state dict.
    """

    kind: str  # family, by which runs are compared: "fid", "clip_score", "geneval", ...
    counted = False  # whether the number of images belongs to the name, as in fid_clean_5k
    full_state_update = False

    def __init__(self) -> None:
        # A metric is computed once per set: no cache of the previous step.
        super().__init__(sync_on_compute=True, compute_with_cache=False)

    @property
    @abstractmethod
    def name(self) -> str:
        """The family and the variant: "fid_clean", "clip_score_vitl14"."""

    def begin(self, samples: Sequence[Sample]) -> None:
        """Receive the list of all images, over all processes, before the first of them."""

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load and check everything needed, before an image is generated."""

    @abstractmethod
    def update(self, images: Tensor, samples: list[Sample]) -> None:
        """Add uint8 images (N, 3, H, W)."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The headline under "", its parts under their names."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides about the number, fit for JSON."""

    def label(self, n: int, part: str = "") -> str:
        """The name to report: `fid_clean_5k`, `geneval_hf_position`."""
        size = f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)
        return self.name + (f"_{size}" if self.counted else "") + (f"_{part}" if part else "")
