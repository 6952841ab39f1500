"""GenEval's detector without mmdetection: transformers' Mask2Former between mmdet's own pre- and post-processing.

The library's image processor and instance post-processing are not used: they resize masks of the padded image to a
fixed 384 x 384, which shifts them, and let instances overwrite each other. The weights also differ from the official
evaluator's (Detectron2's, not mmdet's), so its scores have their own name: geneval_hf.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.encoders.base import FrozenModel, frozen
from emmdit.evaluation.geneval.colors import CLIPColors
from emmdit.evaluation.geneval.detectors import Detector
from emmdit.evaluation.geneval.judge import SCORE_THRESHOLD, Detection
from emmdit.evaluation.geneval.prompts import CLASSES
from emmdit.evaluation.metrics.base import check_images

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet, RGB in 0..255
PAD_TO = 32  # pixels; zeros at the right and the bottom, after normalization
MAX_INSTANCES = 100  # best (query, class) pairs
# Relative difference of two devices' outputs. With random weights of the full size TF32 rounding gave 0.01, deformable
# attention that returns zeros 0.6 and more.
SELF_CHECK_TOLERANCE = 0.1


class Mask2Former(FrozenModel, Detector):
    """Instance segmentation with transformers' Mask2Former trained on COCO, in float32.

    Too slow on a CPU for more than a few images: about 25 s each on two cores.

    Args:
        source: local folder or hub id; 80 classes in COCO's order, mapped to GenEval's names by index.
        color_classifier: default CLIP ViT-L/14, as in the official evaluator.
        revision: branch, tag or commit of a hub repository.
        img_scale: long and short side that images are resized to fit into, keeping the aspect ratio.
        batch_size: images in one forward pass; their masks are upsampled to full resolution one image at a time.
        score_threshold: detections must score higher; the judge applies the same threshold.
        name: part of the name of the scores; choose another one for another detector than the default.
    """

    classes = CLASSES

    def __init__(
        self,
        source: str = "facebook/mask2former-swin-small-coco-instance",
        color_classifier: CLIPColors | None = None,
        revision: str | None = None,
        img_scale: tuple[int, int] = (1333, 800),
        batch_size: int = 4,
        score_threshold: float = SCORE_THRESHOLD,
        name: str = "hf",
    ) -> None:
        super().__init__(source, "float32", revision=revision)
        self.color_classifier = CLIPColors() if color_classifier is None else color_classifier
        self.color_names = self.color_classifier.color_names
        self.img_scale, self.batch_size = (int(img_scale[0]), int(img_scale[1])), batch_size
        self.score_threshold, self.name = score_threshold, name
        self._checked: torch.device | None = None

    def _build(self) -> nn.Module:
        from transformers import Mask2FormerForUniversalSegmentation

        model = self._load(Mask2FormerForUniversalSegmentation, ("mask2former",))
        if model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"The Mask2Former in '{self.source}' knows {model.config.num_labels} classes, not COCO's "
                f"{len(CLASSES)}: name one trained for COCO instance segmentation."
            )
        return model

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load both networks and check that this device computes what the CPU does.

        GPUs that a kernel was not built for have returned garbage without an error, and scores near zero.

        Raises:
            MissingModelError: the weights cannot be loaded.
            RuntimeError: the check failed.
        """
        device = torch.device(device)
        self.color_classifier.prepare(device)
        if self._checked != device:
            expected = self.to("cpu").load()._self_check_outputs()
            found = expected if device.type == "cpu" else self.to(device)._self_check_outputs()
            same_outputs(found, expected, device)
            self._checked = device
        self.to(device)

    def _self_check_outputs(self) -> list[Tensor]:
        """Outputs for a test image: features after the deformable attention, classes and masks."""
        pixels, _ = self.preprocess(probe_image()[None], (256, 256))
        with frozen(self.device):
            out = self.model(pixel_values=pixels.to(self.device))
        found = (out.pixel_decoder_last_hidden_state, out.class_queries_logits, out.masks_queries_logits)
        return [tensor.cpu().float() for tensor in found]

    def preprocess(self, images: Tensor, img_scale: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
        """uint8 (N,3,H,W) -> pixels (N,3,h,w) for the network, and their height and width without padding."""
        height, width = fit(*images.shape[-2:], img_scale or self.img_scale)
        pixels = F.interpolate(images.float(), (height, width), mode="bilinear", align_corners=False).round()
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
        return F.pad((pixels - mean) / std, (0, -width % PAD_TO, 0, -height % PAD_TO)), (height, width)

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """uint8 (N,3,H,W) -> detections with boxes in pixels of the image and bool masks (H,W) on the CPU."""
        check_images(images, self.name)
        found = []
        for chunk in images.split(self.batch_size):
            with frozen(self.device):
                pixels, resized = self.preprocess(chunk.to(self.device))
                # No pixel mask: neither mmdet's test mode nor the library's network separates padding from image.
                out = self.model(pixel_values=pixels)
                for logits, masks in zip(out.class_queries_logits, out.masks_queries_logits, strict=True):
                    found.append(self._detections(logits, masks, pixels.shape[-2:], resized, images.shape[-2:]))
        return found

    def _detections(self, *args: Any) -> list[Detection]:
        *found, masks = instances(*args)
        chosen, masks = found[0] > self.score_threshold, masks.cpu()
        rows = zip(*(x[chosen].tolist() for x in found), strict=True)
        return [Detection(CLASSES[label], score, box, masks[query]) for score, label, box, query in rows]

    def colors(self, image: Tensor, detections: Sequence[Detection], class_name: str) -> list[str]:
        return self.color_classifier(image, detections, class_name)

    def settings(self) -> dict[str, Any]:
        self.load()
        return {
            "detector": self.source,
            **self.weights_identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "img_scale": list(self.img_scale),
            "resize": "bilinear, no antialias, rounded to whole levels",
            "postprocessing": "mmdet",
            "max_instances": MAX_INSTANCES,
            "score_threshold": self.score_threshold,
            "transformers": version("transformers"),
            "colors": self.color_classifier.settings(),
        }


def fit(height: int, width: int, img_scale: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of the same aspect ratio within `img_scale` (long and short side)."""
    factor = min(max(img_scale) / max(height, width), min(img_scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def instances(
    class_logits: Tensor, mask_logits: Tensor, padded: Sequence[int], resized: Sequence[int], original: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mmdet's instances of one image; sizes are (height, width).

    Args:
        class_logits: (Q, classes + 1), the last one for "no object".
        mask_logits: (Q, h, w), of the padded image.

    Returns:
        for the K best (query, class) pairs: score (K), class (K), tight box (K, 4) with x2 and y2 exclusive (zeros for
        an empty mask), query (K); and the masks of all queries (Q, H, W) bool.
    """
    logits = F.interpolate(mask_logits[None].float(), tuple(padded), mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, tuple(original), mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    certainty = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    best, place = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    query, label = place // probabilities.shape[1], place % probabilities.shape[1]
    return best * certainty[query], label, _tight_boxes(masks)[query], query, masks


def _tight_boxes(masks: Tensor) -> Tensor:
    ends = []
    for along in (masks.any(1), masks.any(2)):  # columns (Q, W), rows (Q, H)
        # argmax gives the first of equal values
        first, last = along.int().argmax(1), along.shape[1] - along.flip(1).int().argmax(1)
        ends.append((first, last))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], 1) * masks.any(2).any(1)[:, None]


def probe_image() -> Tensor:
    """A fixed test image, uint8 (3, 256, 256): discs of many colors and sizes on a ramp."""
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.stack([x, y, 255 - (x + y) // 2])
    for i in range(12):
        disc = (x - 37 * i % 256) ** 2 + (y - 91 * i % 256) ** 2 < (10 + 4 * i) ** 2
        color = torch.tensor([i * 83 % 256, i * 151 % 256, i * 199 % 256])
        image = torch.where(disc, color.view(3, 1, 1), image)
    return image.to(torch.uint8)


def same_outputs(found: Sequence[Tensor], expected: Sequence[Tensor], device: torch.device) -> None:
    """Raise RuntimeError unless the outputs `found` on a device equal the `expected` ones."""
    difference = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
    if not difference < SELF_CHECK_TOLERANCE:  # false for nan, too
        raise RuntimeError(
            f"On {device} the detector's outputs differ from those on the CPU by {difference:.0%} for a test image: "
            f"use a torch built for this device, or another device."
        )
