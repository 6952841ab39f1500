"""Patch features of a CLIP's image tower, a target of REPA."""

from __future__ import annotations

import torch
from torch import nn

from emmdit.encoders.loading import locate, one_sentence, read_config
from emmdit.encoders.vision import PatchFeatures


class CLIPVision(PatchFeatures):
    """Patch tokens of the image tower's last layer, without CLS (`last_hidden_state`: no LayerNorm behind it).

    Position embeddings are stretched where the model was trained at another size. Mean and standard deviation of the
    pixels are those of the folder's preprocessor_config. The shapes world's own CLIP gives one feature per token of its
    models' 8 x 8 grid: `source: assets/shapes_clip, image_size: 32, feature_dim: 128, patch_size: 4`.

    Args:
        source: local folder or hub id of a CLIP with both towers, or of its image tower alone.
        image_size, feature_dim, patch_size, antialias: see `PatchFeatures`.
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
        super().__init__(source, image_size, feature_dim, patch_size, antialias, dtype, subfolder, revision)

    def _build(self) -> nn.Module:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel

        both = read_config(self.source, self.subfolder, self.revision).get("model_type") == "clip"
        # Of a whole CLIP the text tower is dropped again: a CLIPVisionModel would log its weights as unexpected.
        model = self._load(CLIPModel).vision_model if both else self._load(CLIPVisionModel, ("clip_vision_model",))
        place, subfolder = locate(self.source, self.subfolder)
        with one_sentence(place):
            processor = CLIPImageProcessor.from_pretrained(
                place, subfolder=subfolder or "", revision=self.revision or "main"
            )
        self.mean_std = tuple(processor.image_mean), tuple(processor.image_std)
        return self._check_sizes(model)

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        stretched = pixels.shape[-2:] != (self.model.config.image_size,) * 2
        tokens = self.model(pixel_values=pixels, interpolate_pos_encoding=stretched).last_hidden_state
        return tokens[:, 1:]  # CLS comes first
