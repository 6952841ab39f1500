"""Interfaces of the frozen models (image codec, text conditioner, vision features), and their common base class.

An image codec is the autoencoder (VAE) of latent diffusion, or anything else with its interface.

They are plain Python objects that hold the diffusers/transformers modules, not `nn.Module`s: as attributes of a
LightningModule they are then not saved, averaged, sharded or optimized. The interfaces are base classes and not
protocols because jsonargparse takes a protocol with `__call__` for a function signature, and then a config could not
name a class for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from emmdit.encoders.loading import load_model, locate
from emmdit.types import Condition


class Movable(ABC):
    """Base class of the interfaces."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> Self: ...


class ImageCodec(Movable):
    """Images to latents and back. `latent_channels` and `downsample` are known before weights are loaded."""

    latent_channels: int
    downsample: int

    @abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1,1] -> scaled latents (B,latent_channels,H/downsample,W/downsample), float32."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents -> images (B,3,H,W) clamped to [-1,1], float32."""


class TextConditioner(Movable):
    """Captions to the condition of a denoiser."""

    caption_channels: int
    max_length: int

    @abstractmethod
    def __call__(self, captions: list[str]) -> Condition: ...

    def check(self, captions: list[str]) -> None:
        """Raise a ValueError for captions that cannot be encoded, as far as that is known without any weights."""

    @abstractmethod
    def null(self, batch_size: int) -> Condition:
        """The condition of the empty caption, encoded once; the tensors are views, so do not write into them."""


class VisionFeatures(Movable):
    """Images to the patch features of a pretrained vision encoder (the target of REPA)."""

    feature_dim: int

    @abstractmethod
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1,1] -> (B,rows*columns,feature_dim) float32, row-major."""

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the features of an image of this height and width in pixels."""


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """`"bfloat16"` (as a config writes it) or `torch.bfloat16` -> `torch.bfloat16`."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{dtype!r} is not a floating-point dtype of torch: use float32, bfloat16 or float16.")
    return found


def clamped(images: torch.Tensor) -> torch.Tensor:
    """Decoded images in [-1, 1]; what overflowed is NaN, not black or white."""
    return images.clamp(-1.0, 1.0).masked_fill(images.isinf(), torch.nan)


@contextmanager
def frozen(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast: an encoder computes in its own dtype, whatever the precision of the trainer (an
    SDXL autoencoder in float32 must not run in float16 under `16-mixed`)."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class FrozenModel:
    """One pretrained module, loaded at first use (or by `load()`), in eval mode and without gradients.

    Args:
        source: local folder made by `save_pretrained`, hub id, or `standin:NAME` (see `standins.py`).
        dtype: dtype the module computes in.
        subfolder: of the module inside `source`, as in a diffusers pipeline.
        revision: branch, tag or commit of a hub repository.
    """

    def __init__(
        self, source: str, dtype: str | torch.dtype, subfolder: str | None = None, revision: str | None = None
    ) -> None:
        self.source, self.subfolder, self.revision = str(source), subfolder, revision
        self.dtype = as_dtype(dtype)
        self.device = torch.device("cpu")
        self._model: nn.Module | None = None

    def _build(self) -> nn.Module:
        """Load the module and check it against the arguments of the constructor."""
        raise NotImplementedError

    def _load(self, cls: type, kinds: Collection[str] = ()) -> nn.Module:
        return load_model(
            cls, self.source, subfolder=self.subfolder, revision=self.revision, dtype=self.dtype, kinds=kinds
        )

    @cached_property
    def weights_identity(self) -> dict[str, Any]:
        """The sha256 of each file of a local folder, or the commit of a hub repository (loads the model)."""
        from emmdit.files import sha256_of  # which needs this package

        place, _ = locate(self.source)
        files = sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
        if files:
            return {"sha256": {file.name: sha256_of([file]) for file in files}}
        return {"revision": self.model.config._commit_hash or self.revision}

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> nn.Module:
        """The module, loaded if necessary."""
        if self._model is None:
            self._model = self._build().eval().requires_grad_(False).to(self.device)
        return self._model

    def load(self) -> Self:
        """Load now. Raises MissingModelError (an OSError), or ValueError for a model that does not fit."""
        _ = self.model
        return self

    def adopt(self, model: nn.Module) -> None:
        """Use a module that is already loaded (by a pipeline) in place of the one that `source` names."""
        self._model = model.eval().requires_grad_(False)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> Self:
        """Move, or change the dtype; loads nothing. The rounding of a narrower dtype is not undone."""
        if device is not None:
            self.device = torch.device(device)
            if self._model is not None:
                self._model.to(self.device)
        if dtype is not None and as_dtype(dtype) != self.dtype:
            self.dtype = as_dtype(dtype)
            # Not module.to(dtype), which would also round buffers that from_pretrained keeps in float32, such as
            # Llama's rotary frequencies.
            for parameter in self._model.parameters() if self._model is not None else ():
                parameter.data = parameter.data.to(self.dtype)
        return self

    def _check_argument(self, name: str, given: float | int, found: float | int) -> None:
        """Raise ValueError unless the constructor's `given` equals what was `found` in the loaded model."""
        if abs(given - found) > 1e-6 * max(abs(given), abs(found)):
            raise ValueError(
                f"{type(self).__name__}: {name} is {given}, but the model in '{self.source}' has {found}; "
                f"set {name} to {found}, or source to another model."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, dtype={self.dtype}, loaded={self.loaded})"
