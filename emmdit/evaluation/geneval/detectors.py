"""What looks for objects in pictures: the interface, and the shapes world's own reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emmdit.evaluation.geneval.judge import Detection


class Detector(ABC):
    """Finds the objects of known classes in pictures, and says what colour they have.

    `name` goes into the metric's name (`geneval_hf`): scores of two detectors can not be compared.
    """

    name: str
    classes: tuple[str, ...]
    color_names: tuple[str, ...]

    def prepare(self, device: torch.device | str = "cpu") -> None:  # noqa: B027 - nothing to do is fine
        """Load and check all that is needed."""

    @abstractmethod
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """uint8 (N, 3, H, W) -> the detections in each picture, in any order, boxes in its pixels."""

    @abstractmethod
    def colors(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        """The colour of each of `detections`, which are of `class_name` and were found in `image`, uint8 (3, H, W)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides about what is found, fit for JSON."""


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` are uint8 (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"A detector reads uint8 images (N, 3, H, W), not {images.dtype} {tuple(images.shape)}.")
