"""Networks: latents, time and text in, prediction out. They know no loss."""

from emmdit.networks.edit.config import BASELINES, LinearAttentionConfig
from emmdit.networks.edit.linearize import attention_layers, linearize, parameter_names, teacher_of, train_only
from emmdit.networks.edit.students import (
    EDiTTransformer2DModel,
    HybridEMMDiTTransformer2DModel,
    MMEDiTTransformer2DModel,
    teacher_class,
)
from emmdit.networks.emmdit.model import EMMDiTOutput, EMMDiTTransformer2DModel
from emmdit.networks.emmdit.nitro_e import load_nitro_e, save_nitro_e
from emmdit.networks.hooks import OutputRecorder

__all__ = [
    "BASELINES",
    "EDiTTransformer2DModel",
    "EMMDiTOutput",
    "EMMDiTTransformer2DModel",
    "HybridEMMDiTTransformer2DModel",
    "LinearAttentionConfig",
    "MMEDiTTransformer2DModel",
    "OutputRecorder",
    "attention_layers",
    "linearize",
    "load_nitro_e",
    "parameter_names",
    "save_nitro_e",
    "teacher_class",
    "teacher_of",
    "train_only",
]
