"""LightningModules, callbacks, strategies and the command line. They bind; the core in `emmdit` computes."""

from lightning_modules.attention_distillation import AttentionDistillation
from lightning_modules.denoiser_module import DenoiserModule
from lightning_modules.text_to_image import TextToImage

__all__ = ["AttentionDistillation", "DenoiserModule", "TextToImage"]
