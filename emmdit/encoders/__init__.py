"""Frozen encoders: image codecs, text conditioners, vision features, and stand-ins for them.

Importing this imports neither diffusers nor transformers; they come with the first model that needs them.
"""

from __future__ import annotations

from emmdit.encoders.autoencoders import DCAE, SD3VAE, SDXLVAE, AutoencoderKLCodec
from emmdit.encoders.base import ImageCodec, TextConditioner, VisionFeatures
from emmdit.encoders.loading import MissingModelError
from emmdit.encoders.standins import STANDINS, standin
from emmdit.encoders.text import SD3TextEncoders, TextEncoder
from emmdit.encoders.vision import CLIPVision, DINOv2
from emmdit.lazy import attach

__getattr__, _lazy = attach(__name__, {"dct": ("BlockDCT", "DCTCodec")})

__all__ = [
    "CLIPVision",
    "DCAE",
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
    *_lazy,
]
