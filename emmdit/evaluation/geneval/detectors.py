"""Object detector interface of GenEval."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emmdit.evaluation.geneval.judge import Detection


class Detector(ABC):
    """Detects objects of known classes in images and classifies their colors.

    `name` becomes part of the metric's name (`geneval_hf`): scores of different detectors cannot be compared.
    """

    name: str
    classes: tuple[str, ...]
    color_names: tuple[str, ...]

    def prepare(self, device: torch.device | str = "cpu") -> None:  # noqa: B027 - optional
        """Load and check everything that is needed."""

    @abstractmethod
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """uint8 (N, 3, H, W) -> the detections in each image, in any order, boxes in pixels."""

    @abstractmethod
    def colors(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        """The color of each of `detections`, all of `class_name` and found in `image`, uint8 (3, H, W)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that affects the detections, as JSON types."""
