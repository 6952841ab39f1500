"""The images of an evaluation on disk: made once, in GenEval's official layout, shared by all metrics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emmdit.evaluation.metrics.base import Sample
from emmdit.evaluation.prompts import PromptSet
from emmdit.files import to_uint8

Draw = Callable[[list[str], list[int]], Tensor]  # prompts and seeds -> images (B, 3, H, W) in [-1, 1]
Progress = Callable[[int, int], None]  # done, of how many


class ImageSet:
    """A folder with `images` pictures of each prompt: 00000/metadata.jsonl, 00000/samples/00000.png, ...

    `set.json` says what the pictures were made with. A folder made with anything else is refused, so what is found
    in it need not be made again: a killed evaluation continues.

    Args:
        made_with: all that decides about the pictures (weights, sampler, ...), fit for JSON.
        rank, world: this process' share of the pictures is every `world`-th, from number `rank` on.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: PromptSet,
        seed: int,
        made_with: dict[str, Any],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder, self.prompts, self.seed = Path(folder), prompts, seed
        self.all = prompts.samples(seed)
        self.samples = self.all[rank::world]
        self.share = math.ceil(len(self.all) / world)  # the largest one
        self.made_with = json.loads(json.dumps({"prompts": prompts.describe(), "seed": seed, **made_with}))
        self.rank = rank

    def open(self) -> None:
        """Make the folder, or check that it holds pictures of this very set.

        Raises:
            ValueError: they are of another one.
        """
        file = self.folder / "set.json"
        if file.is_file():
            found = json.loads(file.read_text())
            other = sorted(key for key in found.keys() | self.made_with if found.get(key) != self.made_with.get(key))
            if other:
                raise ValueError(
                    f"{self.folder} holds pictures made with another {' and another '.join(other)}: choose another "
                    "folder, or remove it."
                )
            return
        if self.rank == 0:
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no set.json: choose another folder.")
            for index, line in enumerate(self.prompts.lines):
                sub = self.folder / f"{index:05d}"
                (sub / "samples").mkdir(parents=True, exist_ok=True)
                (sub / "metadata.jsonl").write_text(json.dumps(line) + "\n")
            _write(file, lambda path: path.write_text(json.dumps(self.made_with, indent=1) + "\n"))

    def missing(self) -> list[Sample]:
        """Those of this process' share that are not there yet."""
        return [sample for sample in self.samples if not (self.folder / sample.path).is_file()]

    def write(self, sample: Sample, image: np.ndarray) -> None:
        """A uint8 (H, W, 3) picture; whole or not at all."""
        path = self.folder / sample.path
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, lambda part: Image.fromarray(image).save(part, format="PNG"))

    def read(self, samples: Sequence[Sample]) -> Tensor:
        """uint8 (N, 3, H, W).

        Raises:
            FileNotFoundError, ValueError: a picture is missing or broken, by its name.
        """
        return torch.stack([read_image(self.folder / sample.path) for sample in samples])

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[Sample]]]:
        """This process' pictures and what they are of."""
        for first in range(0, len(self.samples), size):
            chunk = self.samples[first : first + size]
            yield self.read(chunk), chunk

    def make(self, draw: Draw, batch_size: int, progress: Progress | None = None, together: bool = False) -> int:
        """Draw what is missing; returns how many pictures were made.

        Args:
            together: all processes of a sharded network call `draw` equally often, by repeating pictures.
        """
        missing = self.missing()
        rounds = math.ceil((self.share if together else len(missing)) / batch_size)
        made = 0
        for number in range(rounds):
            chunk = missing[number * batch_size : (number + 1) * batch_size]
            asked = chunk or self.samples[:1] or self.all[:1]
            images = to_uint8(draw([s.line["prompt"] for s in asked], [s.seed for s in asked]))
            for sample, image in zip(chunk, images, strict=False):
                self.write(sample, image)
            made += len(chunk)
            if progress is not None:
                progress(len(self.samples) - len(missing) + made, len(self.samples))
        return made


def read_image(path: Path) -> Tensor:
    """uint8 (3, H, W), RGB."""
    try:
        with Image.open(path) as image:
            array = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"The picture {path} is missing: run the same evaluation again to make it.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {path} can not be read ({error}): remove it, and it is made again.") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save(part)
    os.replace(part, path)
