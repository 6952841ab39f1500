"""Patch features of pretrained vision encoders (DINOv2, CLIP), the targets of REPA."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from emmdit.encoders.base import FrozenModel, VisionFeatures, frozen
from emmdit.encoders.loading import load_processor, read_config

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of images in [0,1]


class PatchFeatures(FrozenModel, VisionFeatures):
    """Base class of vision transformers with square patches.

    The short side is resized to `image_size` and the long one to the multiple of the patch nearest to the aspect ratio.

    Args:
        image_size: short side of the encoder's input in pixels, a multiple of `patch_size`.
        feature_dim, patch_size: known before loading, checked afterwards.
        antialias: low-pass filter when the bicubic resize shrinks.
        source, dtype, subfolder, revision: see `FrozenModel`.
    """

    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = _IMAGENET

    def __init__(
        self,
        source: str,
        feature_dim: int,
        image_size: int = 224,
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

    @abstractmethod
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Preprocessed (B,3,h,w) -> patch tokens (B,rows*columns,feature_dim), without CLS and registers."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the features of a height x width image."""
        patches, short = self.image_size // self.patch_size, min(height, width)
        return round(patches * height / short), round(patches * width / short)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1,1] -> resized bicubically and normalized as in the training of the model, float32."""
        self.load()  # may set mean and standard deviation
        rows, columns = self.grid(*images.shape[-2:])
        size = (rows * self.patch_size, columns * self.patch_size)
        images = images.float()
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=self.antialias)
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in self.mean_std)
        return ((images + 1) / 2 - mean) / std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1,1] -> (B,rows*columns,feature_dim) float32, row-major."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{type(self).__name__} reads images (B,3,H,W), not {tuple(images.shape)}.")
        with frozen(self.device):
            return self.tokens(self.preprocess(images.to(self.device)).to(self.dtype)).float()

    def _check_sizes(self, model: nn.Module) -> nn.Module:
        self._check_argument("feature_dim", self.feature_dim, model.config.hidden_size)
        self._check_argument("patch_size", self.patch_size, model.config.patch_size)
        return model


class DINOv2(PatchFeatures):
    """Patch tokens after the final LayerNorm, without CLS (DINOv2's `x_norm_patchtokens`).

    A square 512px image gives 16x16 features at 224: one per DC-AE latent, as in Nitro-E.

    Args:
        source: local folder or hub id of a DINOv2 model, with or without registers; else see `PatchFeatures`.
    """

    def __init__(self, source: str = "facebook/dinov2-base", feature_dim: int = 768, **options) -> None:
        super().__init__(source, feature_dim, **options)

    def _build(self) -> nn.Module:
        from transformers import AutoModel

        return self._check_sizes(self._load(AutoModel, ("dinov2", "dinov2_with_registers")))

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = pixels.shape[-2] * pixels.shape[-1] // self.patch_size**2
        return self.model(pixel_values=pixels).last_hidden_state[:, -patches:]  # CLS and registers come first


class CLIPVision(PatchFeatures):
    """Patch tokens of the last layer of CLIP's image tower, without CLS (`last_hidden_state`, before the LayerNorm).

    Position embeddings are interpolated where the model was trained at another size. Mean and standard deviation of the
    pixels are those of the folder's preprocessor_config. The CLIP of the shapes world gives one feature per token of an
    8 x 8 grid: `source: assets/shapes_clip, image_size: 32, feature_dim: 128, patch_size: 4`.

    Args:
        source: local folder or hub id of a whole CLIP or of its image tower alone; else see `PatchFeatures`.
    """

    def __init__(self, source: str = "openai/clip-vit-large-patch14", feature_dim: int = 1024, **options) -> None:
        super().__init__(source, feature_dim, **options)

    def _build(self) -> nn.Module:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel

        both = read_config(self.source, self.subfolder, self.revision).get("model_type") == "clip"
        # The text tower of a whole CLIP is loaded and dropped: CLIPVisionModel would log its weights as unexpected.
        model = self._load(CLIPModel).vision_model if both else self._load(CLIPVisionModel, ("clip_vision_model",))
        processor = load_processor(CLIPImageProcessor, self.source, self.subfolder, self.revision)
        self.mean_std = tuple(processor.image_mean), tuple(processor.image_std)
        return self._check_sizes(model)

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        resized = pixels.shape[-2:] != (self.model.config.image_size,) * 2
        tokens = self.model(pixel_values=pixels, interpolate_pos_encoding=resized).last_hidden_state
        return tokens[:, 1:]  # CLS comes first
