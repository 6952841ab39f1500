"""LightningModules, callbacks, strategies and the command line. They bind; the core in `emmdit` computes.

Names are loaded when first used: `emmdit --help` must not wait for torch and Lightning.
"""

from __future__ import annotations

from emmdit.lazy import attach

__getattr__, __all__ = attach(
    __name__,
    {
        "attention_distillation": ("AttentionDistillation",),
        "denoiser_module": ("DenoiserModule",),
        "text_to_image": ("TextToImage",),
    },
)
