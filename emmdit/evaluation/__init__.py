"""Evaluation of generated images: prompt sets, image sets, metrics, GenEval, reports.

Names are loaded when first used: the metrics pull in torchmetrics, transformers and clean-fid, which take seconds.
"""

from __future__ import annotations

from emmdit.lazy import attach

__getattr__, __all__ = attach(
    __name__,
    {  # a new metric or prompt set: its file, its line here
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
    },
)
