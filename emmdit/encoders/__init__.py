"""Frozen encoders behind small interfaces: image codecs, text conditioners, vision features.

Importing this imports neither diffusers nor transformers; they come with the first model that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emmdit.encoders.autoencoders import DCAE, SD3VAE, SDXLVAE, AutoencoderKLCodec
from emmdit.encoders.base import ImageCodec, TextConditioner, VisionFeatures
from emmdit.encoders.clip_vision import CLIPVision
from emmdit.encoders.loading import MissingModelError
from emmdit.encoders.standins import STANDINS, standin
from emmdit.encoders.text import SD3TextEncoders, TextEncoder
from emmdit.encoders.vision import DINOv2

if TYPE_CHECKING:
    from emmdit.encoders.dct import BlockDCT, DCTCodec

__all__ = [
    "BlockDCT",
    "CLIPVision",
    "DCAE",
    "DCTCodec",
    "DINOv2",
    "SD3TextEncoders",
    "SD3VAE",
    "SDXLVAE",
    "STANDINS",
    "AutoencoderKLCodec",
    "ImageCodec",
    "MissingModelError",
    "TextConditioner",
    "TextEncoder",
    "VisionFeatures",
    "standin",
]

# Their files import diffusers or transformers.
_LATER = {"BlockDCT": "dct", "DCTCodec": "dct"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
