"""Evaluation of generated images: prompt sets, image sets, metrics, GenEval, reports.

Names are loaded when first used: the metrics pull in torchmetrics, transformers and clean-fid, which take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {  # file: names; a new metric or prompt set needs its line here
    "metrics.base": ("ImageMetric", "Sample"),
    "metrics.clip": ("CLIP",),
    "metrics.clip_score": ("CLIPScore",),
    "metrics.cmmd": ("CMMD",),
    "metrics.features": ("CLIPFeatures", "CleanInception", "FeatureExtractor"),
    "metrics.fid": ("FID", "frechet_distance"),
    "geneval": ("CLIPColors", "GenEval", "Mask2Former"),
    "image_set": ("ImageSet",),
    "metrics.kid": ("KID",),
    "prompts": ("GenEvalPrompts", "PromptFile", "PromptSet"),
    "measure": ("Scores", "measure", "prepare"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
