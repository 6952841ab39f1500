"""The embedded world of colored shapes, rendered on the fly: no download, no disk."""

from __future__ import annotations

from typing import Any

from datamodules.base import TextImageDataModule
from emmdit.shapes import ShapesDataset, ShapesWorld


class ShapesDataModule(TextImageDataModule):
    """Captioned images of 1-4 colored shapes; every sample is a function of (seed, index).

    Args:
        world: shapes, colors, image size, weights of the six tasks, split; by default compositions are held out.
        length: samples in an epoch. The training and validation scenes come from different seeds.
        stream: `batch_size`, `seed`, `validation_samples`, ... of `TextImageDataModule`.
    """

    source = "rendered by emmdit.shapes"
    license = "Apache-2.0"
    card = "docs/shapes_world.md"

    def __init__(
        self, world: ShapesWorld | None = None, length: int = 1_000_000, num_workers: int = 0, **stream: Any
    ) -> None:
        super().__init__(num_workers=num_workers, **stream)
        self.world = world or ShapesWorld()
        self.length = length

    def train_dataset(self) -> ShapesDataset:
        return ShapesDataset(self.world, seed=self.seed, length=self.length)

    def validation_dataset(self) -> ShapesDataset:
        return ShapesDataset(self.world, seed=self.seed + 1_000_003, length=self.validation_samples)

    def provenance(self) -> dict[str, str]:
        return super().provenance() | {"digest": f"seed {self.seed}, {self.length} samples, {self.world}"}
