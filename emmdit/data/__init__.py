"""Data: readers of storage formats, samples, buckets, the training stream, precomputed latents."""

from emmdit.data.batch import Batch
from emmdit.data.readers.mds import MDSDataset

__all__ = ["Batch", "MDSDataset"]
