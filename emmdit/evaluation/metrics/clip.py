"""CLIP for evaluation: images and texts to unit vectors, with one fixed preprocessing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from emmdit.encoders.base import FrozenModel, frozen
from emmdit.encoders.loading import MissingModelError, load_processor, load_tokenizer, one_sentence
from emmdit.evaluation.metrics.base import check_images
from emmdit.files import sha256_of

# sha256 of `model.safetensors` of hub repositories, as their page at huggingface.co shows it: metrics of a CLIP that
# somebody exchanged there, or in the local cache, would be of another one.
PUBLISHED = {"openai/clip-vit-large-patch14": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"}
_SIZES = {"base": "b", "large": "l", "huge": "h", "giant": "g"}


class CLIP(FrozenModel):
    """`CLIPModel` of transformers with its tokenizer and the preprocessing its folder states.

    Images are resized by Pillow (short side to `size`, antialiased, with the folder's `resample`, bicubic for
    every CLIP known), center-cropped and normalized, on the CPU: the same bits whatever device the model is
    on. Nothing is loaded before `prepare` or the first use.

    Args:
        source: local folder or hub id of a CLIP with safetensors weights, e.g. `assets/shapes_clip`.
        revision: branch, tag or commit of a hub repository.
        dtype: type the networks compute in; what comes out is float32.
        name: what numbers made with it are called; by default from the last part of `source`
            ("openai/clip-vit-large-patch14" -> "vitl14", "assets/shapes_clip" -> "shapes").
    """

    def __init__(
        self,
        source: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        dtype: str = "float32",
        name: str | None = None,
    ) -> None:
        super().__init__(source, dtype, revision=revision)
        self.name = name or short_name(self.source)
        self._tokenizer: Any = None
        self._pixels: dict[str, Any] = {}

    def _build(self) -> nn.Module:
        from transformers import CLIPImageProcessor, CLIPModel

        check_published(self.source, self.revision)
        model = self._load(CLIPModel, ("clip",))
        self._tokenizer = load_tokenizer(self.source, revision=self.revision)
        processor = load_processor(CLIPImageProcessor, self.source, revision=self.revision)
        self._pixels = _pixels(processor, self.source)
        return model

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Load and move. Raises MissingModelError, which says how to get the model."""
        self.to(device).load()

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.model.config.projection_dim

    @property
    def max_length(self) -> int:
        """Longest text in tokens, start and end among them; 77 for OpenAI's."""
        return min(self.model.config.text_config.max_position_embeddings, self._tokenizer.model_max_length)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (N,3,H,W) -> float32 pixels (N,3,h,w) as the image tower takes them, on the model's device."""
        check_images(images, "CLIP")
        self.load()
        height, width = _resized(*images.shape[-2:], self._pixels["size"])
        if (height, width) != tuple(images.shape[-2:]):
            resample = Image.Resampling[self._pixels["resample"].upper()]
            rows = [
                np.asarray(Image.fromarray(image).resize((width, height), resample))
                for image in images.permute(0, 2, 3, 1).cpu().numpy()
            ]
            images = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
        crop_height, crop_width = self._pixels["crop"] or (height, width)
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        images = images[:, :, top : top + crop_height, left : left + crop_width].to(self.device)
        mean, std = (torch.tensor(self._pixels[k], device=self.device).view(1, 3, 1, 1) for k in ("mean", "std"))
        return (images.float() / 255 - mean) / std

    def images(self, images: Tensor) -> Tensor:
        """uint8 (N,3,H,W) -> (N,dim) float32 of length 1."""
        pixels = self.preprocess(images).to(self.dtype)
        with frozen(self.device):
            return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def texts(self, texts: list[str]) -> Tensor:
        """-> (N,dim) float32 of length 1.

        Longer texts lose words at their end, never the end token, where CLIP reads the text's meaning. Raises
        ValueError for words that the tokenizer does not know.
        """
        if isinstance(texts, str):
            raise ValueError("texts is a list of strings, not one string.")
        self.load()
        known = self._tokenizer
        tokens = known(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        if known.unk_token_id not in (None, known.eos_token_id):
            for text, row in zip(texts, tokens["input_ids"], strict=True):
                if known.unk_token_id in row:
                    raise ValueError(f"The CLIP in '{self.source}' has no word for all of {text!r}.")
        tokens = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
        with frozen(self.device):
            return F.normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)

    def settings(self) -> dict[str, Any]:
        """The weights (sha256 of a folder's files, commit of a hub's), type and preprocessing; loads the model."""
        self.load()
        return {
            "clip": self.source,
            **self.weights_identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "preprocessing": {"resize": "pillow", **self._pixels},
            "max_length": self.max_length,
        }


def check_published(source: str, revision: str | None) -> None:
    """Raise MissingModelError if the weights of a hub repository are known and are not these; `revision`: not asked."""
    known = PUBLISHED.get(source)
    if known is None or revision is not None or Path(source).is_dir():
        return
    with one_sentence(source):
        file = Path(huggingface_hub.hf_hub_download(source, "model.safetensors"))
    if (found := sha256_of([file])) != known:
        raise MissingModelError(
            f"'{file}' is not the published model of '{source}' (its sha256 is {found[:8]}..., not {known[:8]}...): "
            "remove it, so that it is downloaded again, or name a revision that you trust."
        )


def short_name(source: str) -> str:
    """'openai/clip-vit-base-patch32' -> 'vitb32', '.../clip-vit-large-patch14-336' -> 'vitl14_336',
    'assets/shapes_clip' -> 'shapes'; else the last part in lower case, with underscores."""
    last = re.sub(r"[^a-z0-9]+", "_", source.partition("?")[0].rstrip("/").split("/")[-1].lower())
    last = "_".join(word for word in last.split("_") if word not in ("clip", "openai", "")) or "clip"
    return re.sub(r"vit_(base|large|huge|giant)_patch(\d+)", lambda m: f"vit{_SIZES[m[1]]}{m[2]}", last)


def _pixels(processor: Any, source: str) -> dict[str, Any]:
    """What of a CLIPImageProcessor matters, JSON-able: size (short side or [height, width]), crop, mean, std."""
    size, crop = processor.size, processor.crop_size
    if not (processor.do_resize and processor.do_rescale and processor.do_normalize):
        raise ValueError(f"The CLIP in '{source}' does not resize, rescale and normalize its images: name another.")
    return {
        "size": int(size["shortest_edge"]) if size.get("shortest_edge") else [int(size["height"]), int(size["width"])],
        "resample": Image.Resampling(int(processor.resample)).name.lower(),
        "antialias": True,
        "crop": [int(crop["height"]), int(crop["width"])] if processor.do_center_crop else None,
        "mean": [float(x) for x in processor.image_mean],
        "std": [float(x) for x in processor.image_std],
    }


def _resized(height: int, width: int, size: int | list[int]) -> tuple[int, int]:
    if not isinstance(size, int):
        return size[0], size[1]
    short = min(height, width)  # the long side is cut off, not rounded, as in torchvision and transformers
    return int(size * height / short), int(size * width / short)
