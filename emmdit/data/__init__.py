"""Captions and images to samples. No Lightning here."""

from emmdit.data.batch import Batch
from emmdit.data.readers.mds import MDSDataset

__all__ = ["Batch", "MDSDataset"]
