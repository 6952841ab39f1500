"""One LightningDataModule per kind of source."""

from datamodules.base import TextImageDataModule
from datamodules.captioned import CaptionedImagesDataModule
from datamodules.latents import LatentsDataModule
from datamodules.mixture import MixtureDataModule
from datamodules.shapes import ShapesDataModule

HubDataModule = CaptionedImagesDataModule  # its older name, in users' YAML files

__all__ = [
    "CaptionedImagesDataModule",
    "HubDataModule",
    "LatentsDataModule",
    "MixtureDataModule",
    "ShapesDataModule",
    "TextImageDataModule",
]
