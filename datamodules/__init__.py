"""One LightningDataModule per kind of source."""

from datamodules.base import TextImageDataModule
from datamodules.captioned import HubDataModule
from datamodules.latents import LatentsDataModule
from datamodules.mixture import MixtureDataModule
from datamodules.shapes import ShapesDataModule

__all__ = ["HubDataModule", "LatentsDataModule", "MixtureDataModule", "ShapesDataModule", "TextImageDataModule"]
