"""Efficient multimodal diffusion transformers: networks, flow, encoders, data, evaluation in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emmdit.pipeline import TextToImagePipeline

    EMMDiTPipeline = TextToImagePipeline

__version__ = "0.1.0"
__all__ = ["EMMDiTPipeline", "TextToImagePipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazily: the pipeline imports diffusers and transformers, which takes seconds.
    if name in ("TextToImagePipeline", "EMMDiTPipeline"):  # the latter is its older name
        from emmdit.pipeline import TextToImagePipeline

        return TextToImagePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
