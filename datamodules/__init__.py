"""One LightningDataModule per kind of source."""

from datamodules.base import TextImageDataModule
from datamodules.shapes import ShapesDataModule

__all__ = ["ShapesDataModule", "TextImageDataModule"]
