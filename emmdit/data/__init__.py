"""Captions and images to samples. No Lightning here."""

from .batch import Batch
from .mds import MDSDataset
from .shapes import FIXED_PROMPTS, ShapesDataset, ShapesWorld

__all__ = ["FIXED_PROMPTS", "Batch", "MDSDataset", "ShapesDataset", "ShapesWorld"]
