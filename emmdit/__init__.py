"""Efficient multimodal diffusion transformers: networks, flow, encoders, data, evaluation in plain torch.

The pipeline, which imports diffusers and transformers, is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emmdit.lazy import attach

if TYPE_CHECKING:
    from emmdit.pipeline import EMMDiTPipeline as EMMDiTPipeline
    from emmdit.pipeline import TextToImagePipeline as TextToImagePipeline

__version__ = "0.2.0"

__getattr__, _names = attach(__name__, {"pipeline": ("EMMDiTPipeline", "TextToImagePipeline")})
__all__ = ["__version__", *_names]
