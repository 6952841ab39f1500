"""A seeded convolution as feature extractor, and images for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor, nn

from emmdit.evaluation.metrics.base import Sample
from emmdit.evaluation.metrics.features import FeatureExtractor

LINE = {"prompt": "a photo of a red circle"}


class TinyFeatures(FeatureExtractor):
    """clean-fid's resize, a convolution, ReLU and the mean."""

    resize = "clean-fid 'clean'"

    def __init__(self, name: str = "tiny", dim: int = 16, seed: int = 0) -> None:
        self.name, self.dim, self.seed = name, dim, seed
        generator = torch.Generator().manual_seed(seed)
        self.network = nn.Conv2d(3, dim, 9, stride=8)
        with torch.no_grad():
            self.network.weight.normal_(generator=generator)
            self.network.bias.normal_(generator=generator)

    @torch.no_grad()
    def resized(self, images: Tensor) -> Tensor:
        """What clean-fid gives to a custom extractor: float (N, 3, 299, 299) in 0..255."""
        return self.network(images / 255).relu().mean((2, 3))

    def __call__(self, images: Tensor) -> Tensor:
        resizer = build_resizer("clean")
        arrays = [resizer(image) for image in images.permute(0, 2, 3, 1).numpy()]
        return self.resized(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))


def random_images(count: int, seed: int, height: int = 24, width: int = 20) -> Tensor:
    """uint8 (count, 3, H, W): noise over a random plain color, other noise with another seed."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.rand(count, 3, height, width, generator=generator)
    return ((plain + noise * (1 + seed % 3)) * 60).byte()


def samples(count: int, first: int = 0) -> list[Sample]:
    return [Sample(i // 4, i % 4, LINE, i) for i in range(first, first + count)]


def write_folder(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:05d}.png")
    return folder
