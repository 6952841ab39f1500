"""E-MMDiT (arXiv 2510.27135, released as Nitro-E)."""

from emmdit.networks.emmdit.model import EMMDiTOutput, EMMDiTTransformer2DModel
from emmdit.networks.emmdit.nitro_e import load_nitro_e, save_nitro_e

__all__ = ["EMMDiTOutput", "EMMDiTTransformer2DModel", "load_nitro_e", "save_nitro_e"]
