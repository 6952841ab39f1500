"""Networks: latents, time and text in, prediction out. They know no loss."""

from emmdit.networks.edit.config import BASELINES, AttentionChoices
from emmdit.networks.edit.linearize import (
    EDiTTransformer2DModel,
    HybridEMMDiTTransformer2DModel,
    MMEDiTTransformer2DModel,
    attention_layers,
    linearize,
    parameter_names,
    train_only,
)
from emmdit.networks.emmdit.model import EMMDiTOutput, EMMDiTTransformer2DModel
from emmdit.networks.emmdit.nitro_e import load_nitro_e, save_nitro_e
from emmdit.networks.hooks import attention_outputs

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
