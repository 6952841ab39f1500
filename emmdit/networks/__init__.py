"""Networks: latents, time and text in, prediction out. They know no loss."""

from .attention_choices import BASELINES, AttentionChoices
from .capture import attention_outputs
from .emmdit import EMMDiTOutput, EMMDiTTransformer2DModel
from .linearize import (
    EDiTTransformer2DModel,
    HybridEMMDiTTransformer2DModel,
    MMEDiTTransformer2DModel,
    attention_layers,
    linearize,
    parameter_names,
    train_only,
)
from .nitro_e import load_nitro_e, save_nitro_e

__all__ = [
    "BASELINES",
    "AttentionChoices",
    "EDiTTransformer2DModel",
    "EMMDiTOutput",
    "EMMDiTTransformer2DModel",
    "HybridEMMDiTTransformer2DModel",
    "MMEDiTTransformer2DModel",
    "attention_layers",
    "attention_outputs",
    "linearize",
    "load_nitro_e",
    "parameter_names",
    "save_nitro_e",
    "train_only",
]
