"""Images of an evaluation on disk: generated once, in GenEval's official layout, shared by all metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from emmdit.data.images import open_image
from emmdit.evaluation.metrics.base import Sample
from emmdit.evaluation.prompts import PromptSet
from emmdit.files import atomic_path, read_json, to_uint8
from emmdit.generate import check_finite
from emmdit.legacy import modernize

Generate = Callable[[list[str], list[int]], Tensor]  # prompts and seeds -> images (B, 3, H, W) in [-1, 1]
Progress = Callable[[int, int], None]  # done, total


class ImageSet:
    """A folder with `images` images of each prompt: 00000/metadata.jsonl, 00000/samples/00000.png, ...

    `set.json` says what the images were made with. A folder made with anything else is refused, so an image found in
    it need not be generated again: a killed evaluation resumes.

    Args:
        made_with: all that decides about the images (weights, sampler, ...), fit for JSON.
        rank, world: this process' share is every `world`-th image, from number `rank` on.
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
        """Create the folder, or check that it holds images of this very set. Every process calls it, rank zero acts.

        Raises:
            ValueError, OSError: the folder holds something else, or cannot be written; on every process.
        """
        failed: list[Exception | None] = [None]
        if self.rank == 0:
            try:
                self._open()
            except (ValueError, OSError) as error:
                failed = [error]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(failed)  # and wait for the folders
        if failed[0] is not None:
            raise failed[0]

    def _open(self) -> None:
        file = self.folder / "set.json"
        if file.is_file():
            found = modernize(read_json(file, f"remove {self.folder}, or choose another folder"))
            found = found if isinstance(found, dict) else {}
            other = sorted(key for key in found.keys() | self.made_with if found.get(key) != self.made_with.get(key))
            if "prompts" not in other and not any(self.folder.glob("*/samples/*.png")):
                other = []  # nothing was made yet, such as after a size that the network refused
                self._describe()
            if other:
                raise ValueError(
                    f"{self.folder} holds images made with another {' and another '.join(other)}: choose another "
                    "folder, or remove it."
                )
        else:
            # Parts of a set.json are of an evaluation that was killed before anything else.
            if self.folder.is_dir() and not all(p.match(".set-*.json") for p in self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty and holds no set.json: choose another folder.")
            self._describe()  # before the folders of the prompts: killed among them, a set goes on
        for index, line in enumerate(self.prompts.lines):
            metadata, text = self.folder / f"{index:05d}" / "metadata.jsonl", (json.dumps(line) + "\n").encode()
            for folder in (metadata.parent, metadata.parent / "samples"):
                if folder.is_symlink():
                    raise ValueError(f"{folder} is a link, through which nothing is written: choose another folder.")
            if not metadata.is_file() or metadata.stat().st_size != len(text) or metadata.read_bytes() != text:
                (metadata.parent / "samples").mkdir(parents=True, exist_ok=True)
                metadata.unlink(missing_ok=True)  # it may be a link
                metadata.write_bytes(text)

    def _describe(self) -> None:
        with atomic_path(self.folder / "set.json") as part:
            part.write_text(json.dumps(self.made_with, indent=1) + "\n")

    def missing(self) -> list[Sample]:
        """Those of this process' share that are not there yet."""
        return [sample for sample in self.samples if not (self.folder / sample.path).is_file()]

    def write(self, sample: Sample, image: np.ndarray) -> None:
        """Write a uint8 (H, W, 3) image, whole or not at all."""
        with atomic_path(self.folder / sample.path) as part:
            Image.fromarray(image).save(part, format="PNG")

    def read(self, samples: Sequence[Sample]) -> Tensor:
        """uint8 (N, 3, H, W).

        Raises:
            FileNotFoundError, ValueError: an image is missing, broken or of another size, by its name.
        """
        paths = [self.folder / sample.path for sample in samples]
        images = [read_image(path) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(f"{path} and {paths[0]} differ in size: remove the wrong one and run again.")
        return torch.stack(images)

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[Sample]]]:
        """This process' images and what they are of."""
        for first in range(0, len(self.samples), size):
            chunk = self.samples[first : first + size]
            yield self.read(chunk), chunk

    def make(
        self, generate: Generate, batch_size: int, progress: Progress | None = None, together: bool = False
    ) -> int:
        """Generate what is missing; returns how many images were made. ValueError names one that is not finite.

        Args:
            together: all processes of a sharded network call `generate` equally often, by repeating images.
        """
        missing = self.missing()
        rounds = math.ceil((self.share if together else len(missing)) / batch_size)
        made = 0
        for number in range(rounds):
            chunk = missing[number * batch_size : (number + 1) * batch_size]
            asked = chunk or self.samples[:1] or self.all[:1]
            prompts, seeds = [s.line["prompt"] for s in asked], [s.seed for s in asked]
            images = check_finite(generate(prompts, seeds), prompts, seeds)
            for sample, image in zip(chunk, to_uint8(images), strict=False):
                self.write(sample, image)
            made += len(chunk)
            if progress is not None:
                progress(len(self.samples) - len(missing) + made, len(self.samples))
        return made


def read_image(path: Path) -> Tensor:
    """uint8 (3, H, W), RGB."""
    if not path.exists():
        raise FileNotFoundError(f"The image {path} is missing: run the same evaluation again to make it.")
    try:
        array = np.array(open_image(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The image {path} cannot be read ({error}): remove it and run the evaluation again."
        ) from error
    return torch.from_numpy(array).permute(2, 0, 1)
