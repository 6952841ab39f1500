"""Map-style dataset of the shapes world, rendered on the fly."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from emmdit.shapes.render import render_scene
from emmdit.shapes.scene import Scene
from emmdit.shapes.world import ShapesWorld


class ShapesDataset(Dataset):
    """`length` scenes of stream `seed`.

    `ds[i]` is `{"image": (3, H, W) float32 in [-1, 1], "caption": str, "sample_id": int64 scalar}` and
    depends on (world, seed, i) only, not on the process, the worker or earlier reads.
    """

    def __init__(self, world: ShapesWorld | None = None, seed: int = 0, length: int = 100_000) -> None:
        if length < 1:
            raise ValueError(f"ShapesDataset needs length >= 1, got {length}.")
        self.world = world if world is not None else ShapesWorld()
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} is outside this dataset of {self.length} scenes.")
        return self.world.sample(self.seed, int(index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        image = torch.from_numpy(render_scene(scene)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
        return {
            "image": image.contiguous(),
            "caption": scene.caption,
            "sample_id": torch.tensor(index, dtype=torch.int64),
        }
