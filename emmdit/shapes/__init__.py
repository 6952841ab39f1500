"""The embedded world of colored shapes: scenes, captions, renders, the reader of images, text encoder, metrics."""

from __future__ import annotations

from emmdit.lazy import attach

# Text and metrics import transformers and torchmetrics, which take seconds.
__getattr__, __all__ = attach(
    __name__,
    {
        "dataset": ("ShapesDataset",),
        "metrics": ("AskedColor", "ShapesDetector", "ShapesPrompts"),
        "reader": ("read_scene",),
        "render": ("render_scene",),
        "scene": ("GROUND", "PALETTE", "SHAPES", "Scene", "ShapeObject", "Spec"),
        "text": ("ShapesText",),
        "world": ("ShapesWorld",),
    },
)
