"""The embedded world of colored shapes: scenes, captions, renders, the reader of images, text, metrics.

Names are loaded when first used: text and metrics import transformers and torchmetrics, which take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "asked_color": ("AskedColor",),
    "dataset": ("ShapesDataset",),
    "detector": ("ShapesDetector",),
    "prompts": ("ShapesPrompts",),
    "reader": ("Found", "contents_match", "read_scene"),
    "render": ("GROUND", "PALETTE", "SHAPES", "render_scene"),
    "text": ("ShapesText",),
    "world": ("FIXED_PROMPTS", "TASKS", "Scene", "ShapeObject", "ShapesWorld", "unknown_words"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
