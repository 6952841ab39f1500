"""Networks: latents, time and text in, prediction out. They know no loss."""

from .emmdit import EMMDiTOutput, EMMDiTTransformer2DModel
from .nitro_e import load_nitro_e, save_nitro_e

__all__ = ["EMMDiTOutput", "EMMDiTTransformer2DModel", "load_nitro_e", "save_nitro_e"]
