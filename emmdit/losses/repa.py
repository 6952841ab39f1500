"""Representation alignment (REPA, arXiv 2410.06940) as E-MMDiT uses it: papers.md B8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.encoders import VisionFeatures
from emmdit.losses.base import LossComponent, TrainingStep


class REPA(LossComponent):
    """Minus the mean cosine between the network's projected tokens and a frozen vision encoder's patch features.

    Where the vision grid differs from the token grid (1024 px), the features are resized bilinearly to the tokens;
    the paper does not say what it does there.

    Args:
        vision: computes the features from `batch["image"]`; None: they come with the batch as `features` (B, N, F).
        weight: 0.5 in the paper.
    """

    name = "repa"
    network_kwargs = {"return_repa": True}

    def __init__(self, vision: VisionFeatures | None = None, weight: float = 0.5) -> None:
        super().__init__(weight)
        self.vision = vision

    def __call__(self, step: TrainingStep) -> Tensor:
        patch = step.x0.shape[-1] * step.x0.shape[-2] / step.output.repa.shape[1]
        rows, columns = (round(side / patch**0.5) for side in step.x0.shape[-2:])
        return repa_loss(step.output.repa, self.targets(step, rows, columns))

    @torch.no_grad()
    def targets(self, step: TrainingStep, rows: int, columns: int) -> Tensor:
        """(B, rows * columns, F)."""
        if "features" in step.batch:
            features = step.batch["features"]
            scale = (features.shape[1] / (rows * columns)) ** 0.5  # the same picture, so the same shape
            grid = (round(rows * scale), round(columns * scale))
            if grid[0] * grid[1] != features.shape[1]:
                raise ValueError(
                    f"The {features.shape[1]} precomputed features of an image make no grid of the shape of its "
                    f"{rows} x {columns} tokens: compute them from the same crop."
                )
        elif self.vision is None or "image" not in step.batch:
            raise ValueError(
                "REPA needs vision features: give it a vision encoder and a data set with images, or a data set with "
                "precomputed `features`."
            )
        else:
            image = step.batch["image"]
            features, grid = self.vision(image), self.vision.grid(*image.shape[-2:])
        if grid == (rows, columns):
            return features
        maps = features.float().transpose(1, 2).unflatten(2, grid)
        return F.interpolate(maps, (rows, columns), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)

    def check(self, denoiser: nn.Module) -> None:
        projector = getattr(denoiser, "repa_projector", None)
        if projector is None:
            raise ValueError("REPA needs a network with a projector: set the denoiser's repa_feature_dim.")
        width = denoiser.config.repa_feature_dim
        if self.vision is not None and self.vision.feature_dim != width:
            raise ValueError(
                f"The denoiser projects to repa_feature_dim {width}, but {type(self.vision).__name__} gives features "
                f"of width {self.vision.feature_dim}: make them equal."
            )

    def to(self, device: torch.device) -> None:
        if self.vision is not None:
            self.vision.to(device)


def repa_loss(prediction: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine similarity over tokens; both (B, N, F)."""
    return -F.cosine_similarity(prediction.float(), features.float(), dim=-1).mean()
