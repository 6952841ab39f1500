"""What a score lies between, in the shapes world: renders of what was asked for, and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from emmdit.evaluation.image_set import Generate
from emmdit.shapes import ShapesWorld, render_scene


def renders(world: ShapesWorld | None = None) -> Generate:
    """Ground truth: for each prompt a scene that shows it."""
    world = world or ShapesWorld()

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        scenes = [world.sample_for(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        pictures = [torch.from_numpy(render_scene(scene)).permute(2, 0, 1) for scene in scenes]
        return torch.stack(pictures).float() / 127.5 - 1

    return draw


def noise(size: int) -> Generate:
    """Pictures of `size` px whose pixels are independent and uniform."""

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        pictures = [torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(pictures) * 2 - 1

    return draw
