"""LightningModules, callbacks, strategies and the command line. They bind; the core in `emmdit` computes.

Names are loaded when first used: `emmdit --help` must not wait for torch and Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"AttentionDistillation": "attention_distillation", "TextToImage": "text_to_image"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
