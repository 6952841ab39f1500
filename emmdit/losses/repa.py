"""Representation alignment (REPA, arXiv 2410.06940), as E-MMDiT uses it (docs/papers.md, B8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emmdit.encoders import VisionFeatures
from emmdit.losses.base import LossComponent, LossInputs
from emmdit.networks.emmdit.nitro_e import PROJECTOR
from emmdit.networks.hooks import OutputRecorder


class REPA(LossComponent):
    """Minus the mean cosine between projected tokens of one block and a frozen vision encoder's patch features.

    The projector (three Linears with SiLU between them, the released one) belongs to this component: any denoiser is
    aligned by naming one of its blocks. Where the vision grid differs from the token grid (1024 px), the features are
    resized bilinearly to the tokens; the paper does not say what it does there.

    Args:
        block: the submodule whose output tokens are aligned, such as `blocks.3`, the last one before E-MMDiT's
            compression, which is where the released code taps.
        vision: computes the features from `batch["image"]`; None: they come with the batch as `features` (B, N, F).
        feature_dim: width F of the features (DINOv2-base: 768).
        projector_dim: hidden width of the projector.
        weight: 0.5 in the paper.
        output: which of the block's outputs holds the image tokens (SD3's joint blocks give them second: 1).
    """

    name = "repa"

    def __init__(
        self,
        block: str,
        vision: VisionFeatures | None = None,
        feature_dim: int = 768,
        projector_dim: int = 2048,
        weight: float = 0.5,
        output: int = 0,
    ) -> None:
        super().__init__(repa=weight)
        self.block, self.vision, self.output = block, vision, output
        self.feature_dim, self.projector_dim = feature_dim, projector_dim

    def check(self, denoiser: nn.Module) -> None:
        try:
            denoiser.get_submodule(self.block)
        except AttributeError:
            raise ValueError(f"REPA aligns {self.block}, which {type(denoiser).__name__} does not have.") from None
        if self.vision is not None and self.vision.feature_dim != self.feature_dim:
            raise ValueError(
                f"REPA projects to feature_dim {self.feature_dim}, but {type(self.vision).__name__} gives features of "
                f"width {self.vision.feature_dim}: make them equal."
            )
        if hasattr(denoiser, "check_token_grid"):
            denoiser.check_token_grid(self.block)

    def attach(self, denoiser: nn.Module) -> None:
        width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
        hidden, features = self.projector_dim, self.feature_dim
        linears = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, features)
        self.projector = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])
        released = getattr(denoiser, "training_tensors", {})  # of a Nitro-E file from training
        if released:
            self.projector.load_state_dict({key.removeprefix(PROJECTOR): value for key, value in released.items()})
        self.recorder = OutputRecorder({self.block: denoiser.get_submodule(self.block)})

    def forward(self, inputs: LossInputs) -> Tensor:
        tokens = self.recorder.take()[self.block][self.output]
        patch = (inputs.x0.shape[-1] * inputs.x0.shape[-2] / tokens.shape[1]) ** 0.5
        rows, columns = (round(side / patch) for side in inputs.x0.shape[-2:])
        return repa_loss(self.projector(tokens), self.targets(inputs, rows, columns))

    @torch.no_grad()
    def targets(self, inputs: LossInputs, rows: int, columns: int) -> Tensor:
        """Features on the grid of the tokens, (B, rows * columns, F)."""
        if "features" in inputs.batch:
            features = inputs.batch["features"]
            scale = (features.shape[1] / (rows * columns)) ** 0.5  # the same image, so the same shape
            grid = (round(rows * scale), round(columns * scale))
            if grid[0] * grid[1] != features.shape[1]:
                raise ValueError(
                    f"The {features.shape[1]} precomputed features of an image do not form a grid of the shape of its "
                    f"{rows} x {columns} tokens: compute them from the same crop."
                )
        elif self.vision is None or "image" not in inputs.batch:
            raise ValueError(
                "REPA needs vision features: give it a vision encoder and a dataset with images, or a dataset with "
                "precomputed `features`."
            )
        else:
            image = inputs.batch["image"]
            features, grid = self.vision(image), self.vision.grid(*image.shape[-2:])
        if grid == (rows, columns):
            return features
        maps = features.float().transpose(1, 2).unflatten(2, grid)
        return F.interpolate(maps, (rows, columns), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)

    def move(self, device: torch.device) -> None:
        if self.vision is not None:
            self.vision.to(device)


def repa_loss(prediction: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine similarity over tokens; both (B, N, F)."""
    return -F.cosine_similarity(prediction.float(), features.float(), dim=-1).mean()
