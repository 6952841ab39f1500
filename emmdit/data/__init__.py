"""Captions and images to samples. No Lightning here."""

from .batch import Batch
from .shapes import FIXED_PROMPTS, ShapesDataset, ShapesWorld

__all__ = ["FIXED_PROMPTS", "Batch", "ShapesDataset", "ShapesWorld"]
