"""Color classification of detected objects with CLIP, as in GenEval's official evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emmdit.evaluation.geneval.judge import COLORS, Detection
from emmdit.evaluation.metrics.clip import CLIP

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = 0x99  # gray #999 in place of everything that is not the object


class CLIPColors:
    """Zero-shot CLIP classifier over GenEval's ten colors, applied to the object cut out onto gray.

    The embedding of a color is the mean of three templates' unit vectors, normalized again; the image is masked first
    and then cropped to the box. The official evaluator runs ViT-L/14 with OpenAI's weights in half precision; the
    default here is float32.

    Args:
        clip: default OpenAI's ViT-L/14.
    """

    color_names = COLORS

    def __init__(self, clip: CLIP | None = None) -> None:
        self.clip = CLIP() if clip is None else clip
        self._texts: dict[str, Tensor] = {}  # by class, (10, d) on the CPU

    def prepare(self, device: torch.device | str = "cpu") -> None:
        self.clip.prepare(device)
        self._texts.clear()

    def __call__(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        """The color of each of `detections` of `class_name` in `image`, uint8 (3, H, W)."""
        texts = self._classifier(class_name)
        # One at a time: crops differ in size, and only the objects that a prompt asks for are classified.
        vectors = [self.clip.images(cut_out(image, detection)[None]).cpu().float() for detection in detections]
        return [self.color_names[int((texts @ vector[0]).argmax())] for vector in vectors]

    def _classifier(self, class_name: str) -> Tensor:
        if class_name not in self._texts:
            texts = [t.format(color=color, name=class_name) for color in self.color_names for t in TEMPLATES]
            vectors = F.normalize(self.clip.texts(texts).cpu().float(), dim=-1)
            self._texts[class_name] = F.normalize(vectors.unflatten(0, (-1, len(TEMPLATES))).mean(1), dim=-1)
        return self._texts[class_name]

    def settings(self) -> dict[str, Any]:
        return {"clip": self.clip.settings(), "templates": list(TEMPLATES), "background": "#999999"}


def cut_out(image: Tensor, detection: Detection) -> Tensor:
    """The object on gray, cropped to its box (whole pixels, at least one): uint8 (3, h, w)."""
    height, width = image.shape[-2:]
    x1, y1, x2, y2 = (round(v) for v in detection.box)
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    x2, y2 = min(max(x2, x1 + 1), width), min(max(y2, y1 + 1), height)
    part = image[:, y1:y2, x1:x2]
    if detection.mask is None:
        return part
    mask = torch.as_tensor(detection.mask, device=image.device)[y1:y2, x1:x2]
    return torch.where(mask, part, torch.full_like(part, BACKGROUND))
