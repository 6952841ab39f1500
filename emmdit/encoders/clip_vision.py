"""Patch features of a CLIP's image tower, a target of REPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from emmdit.encoders.base import FrozenModel, VisionFeatures, frozen
from emmdit.encoders.loading import locate, one_sentence, read_config


class CLIPVision(FrozenModel, VisionFeatures):
    """Patch tokens of the image tower's last layer, without CLS (`last_hidden_state`: no LayerNorm behind it).

    The short side is resized to `image_size` and the long one to the nearest multiple of the patch that keeps the
    aspect ratio; position embeddings are stretched where the model was trained at another size. Mean and standard
    deviation of the pixels are those of the folder's preprocessor_config. The shapes world's own CLIP gives one
    feature per token of its models' 8 x 8 grid: `source: assets/shapes_clip, image_size: 32, feature_dim: 128,
    patch_size: 4`.

    Args:
        source: local folder or hub id of a CLIP with both towers, or of its image tower alone.
        image_size: short side the encoder sees, in pixels; a multiple of `patch_size`.
        feature_dim, patch_size: known before loading, checked after.
        antialias: low-pass filter when the bicubic resize shrinks.
    """

    def __init__(
        self,
        source: str = "openai/clip-vit-large-patch14",
        image_size: int = 224,
        feature_dim: int = 1024,
        patch_size: int = 14,
        antialias: bool = True,
        dtype: str | torch.dtype = "float32",
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(source, dtype, subfolder, revision)
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of the {patch_size}px patch.")
        self.image_size, self.feature_dim, self.patch_size = image_size, feature_dim, patch_size
        self.antialias = antialias
        self._mean_std: tuple[list[float], list[float]] = ([0.5] * 3, [0.5] * 3)

    def _build(self) -> nn.Module:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel

        both = read_config(self.source, self.subfolder, self.revision).get("model_type") == "clip"
        # Of a whole CLIP the text tower is dropped again: a CLIPVisionModel would log its weights as unexpected.
        model = self._load(CLIPModel).vision_model if both else self._load(CLIPVisionModel, ("clip_vision_model",))
        self._agree("feature_dim", self.feature_dim, model.config.hidden_size)
        self._agree("patch_size", self.patch_size, model.config.patch_size)
        place, subfolder = locate(self.source, self.subfolder)
        with one_sentence(place):
            processor = CLIPImageProcessor.from_pretrained(
                place, subfolder=subfolder or "", revision=self.revision or "main"
            )
        self._mean_std = (list(processor.image_mean), list(processor.image_std))
        return model

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the features of a height x width image."""
        patches, short = self.image_size // self.patch_size, min(height, width)
        return round(patches * height / short), round(patches * width / short)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1,1] -> resized bicubically and normalised as the model was trained, float32."""
        self.load()
        rows, columns = self.grid(*images.shape[-2:])
        size = (rows * self.patch_size, columns * self.patch_size)
        images = images.float()
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=self.antialias)
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in self._mean_std)
        return ((images + 1) / 2 - mean) / std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1,1] -> (B,rows*columns,feature_dim) float32, row-major."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"CLIPVision reads images (B,3,H,W), not {tuple(images.shape)}.")
        with frozen(self.device):
            pixels = self.preprocess(images.to(self.device)).to(self.dtype)
            stretched = pixels.shape[-2:] != (self.model.config.image_size,) * 2
            tokens = self.model(pixel_values=pixels, interpolate_pos_encoding=stretched).last_hidden_state
        return tokens[:, 1:].float()  # CLS comes first
