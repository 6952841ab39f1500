"""Latents dataset: a folder made by `emmdit precompute` as training samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from emmdit.data.buckets import Bucketing, one_bucket
from emmdit.data.captions import candidates
from emmdit.data.images import load_image
from emmdit.data.precompute.manifest import read_manifest
from emmdit.data.readers.huggingface import checked, open_arrow
from emmdit.files import first_line


class LatentsDataset(Dataset):
    """Samples with `caption`, `sample_id`, `latents` (C, h, w) float32, and `features` (N, D), `image` or `condition`
    (the tensors of the text condition by their names) where kept.

    `sample_id` is the index here; `manifest["source"]` and the column of the same name on disk lead back to the source.

    Args:
        folder: made by `emmdit precompute`.
        first, last: these rows of it.
        images: read the kept images, too.
        text: read the kept text conditions, too.
        captions: where an image has several captions, give them all as `captions`, (text, weight) pairs for the loader
            to choose from; else the first alone.
        caption_weights: of the first, second, ... caption of a row; None: equal ones.

    Raises:
        FileNotFoundError, ValueError: the folder is unfinished, or a file is missing or truncated.
    """

    def __init__(
        self,
        folder: str | Path,
        first: int = 0,
        last: int | None = None,
        images: bool = True,
        text: bool = False,
        captions: bool = False,
        caption_weights: list[float] | None = None,
    ) -> None:
        import datasets

        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        if not self.manifest["shards"]:
            raise ValueError(f"'{folder}' has no samples: all rows were rejected, see its rejects.jsonl.")
        files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
        try:
            self.table = open_arrow([str(file) for file in files])
        except Exception as error:  # pyarrow and datasets raise almost anything
            raise ValueError(f"A shard of '{folder}' is damaged ({first_line(error)}): precompute again.") from error
        if len(self.table) != self.manifest["counts"]["samples"]:
            raise ValueError(f"The shards of '{folder}' have {len(self.table):,} samples, not those of its manifest.")
        if "image" in self.table.column_names:
            self.table = self.table.cast_column("image", datasets.Image(decode=False))
        names = ["caption", "latents", "features"] + ["width", "height"] * bool(self.manifest.get("buckets"))
        names += ["captions"] * captions + ["image"] * images
        names += [name for name in self.table.column_names if text and name.startswith("text.")]
        self.rows = self.table.select_columns([name for name in names if name in self.table.column_names])
        self.rows = self.rows.with_format("arrow")
        self.first, self.last = first, len(self.table) if last is None else last
        self.caption_weights = caption_weights

    def __len__(self) -> int:
        return self.last - self.first

    def buckets(self) -> Bucketing:
        """Sizes and each sample's index into them, see `emmdit.data.buckets`."""
        if not self.manifest.get("buckets"):
            return one_bucket((self.manifest["resolution"],) * 2, len(self))
        sizes, index = np.unique(self._sizes("height", "width"), axis=0, return_inverse=True)
        return list(map(tuple, sizes.tolist())), index.astype(np.int16)

    @property
    def sizes(self) -> np.ndarray:
        """(n, 2) height and width of the images before resize and crop."""
        return self._sizes("original_height", "original_width")

    def _sizes(self, *names: str) -> np.ndarray:
        columns = [self.table.data.column(name).to_numpy()[self.first : self.last] for name in names]
        return np.stack(columns, axis=1).astype(np.int32)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Reads and decodes a batch at once: a call for each row costs more than its bytes."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} is outside this dataset of {len(self)} samples.")
        numbers = [self.first + int(index) for index in indices]
        try:
            stored = checked(self.rows[numbers]).to_pydict()
        except ValueError as error:
            raise ValueError(self._unreadable(numbers[0], first_line(error))) from error
        codec, columns = self.manifest["codec"], self.manifest["columns"]
        tensors = {name for name in stored if name == "features" or name.startswith("text.")}
        if odd := ({"caption", "latents"} - stored.keys()) | (tensors - columns.keys()):
            raise ValueError(self._unreadable(numbers[0], f"{min(odd)} is not in its shard and in the manifest"))
        sizes = [(self.manifest["resolution"],) * 2] * len(numbers)
        if "height" in stored:
            sizes = list(zip(stored["height"], stored["width"], strict=True))
        grids = [(codec["latent_channels"], h // codec["downsample"], w // codec["downsample"]) for h, w in sizes]
        texts = zip(indices, stored["caption"], strict=True)
        samples: list[dict[str, Any]] = [{"sample_id": index, "caption": caption} for index, caption in texts]
        for sample, captions in zip(samples, stored.get("captions", ()), strict=False):
            if pairs := candidates(captions, self.caption_weights):
                sample |= {"caption": pairs[0][0], "captions": pairs}
        shapes: dict[str, list[tuple[int, ...]]] = {"latents": grids}
        if "features" in stored:  # their number depends on the image's size
            shapes["features"] = [(-1, columns["features"]["shape"][-1])] * len(numbers)
        shapes |= {name: [tuple(columns[name]["shape"])] * len(numbers) for name in stored if name.startswith("text.")}
        for name, each in shapes.items():
            for sample, tensor in zip(samples, self._tensors(name, stored[name], each, numbers), strict=True):
                into = sample.setdefault("condition", {}) if name.startswith("text.") else sample
                into[name.removeprefix("text.")] = tensor
        if "image" in stored:
            for sample, image, size, number in zip(samples, stored["image"], sizes, numbers, strict=True):
                try:
                    sample["image"] = load_image(image, size)
                except ValueError as error:
                    raise ValueError(self._unreadable(number, first_line(error))) from error
        return samples

    def _tensors(
        self, name: str, stored: list[bytes | None], shapes: list[tuple[int, ...]], numbers: list[int]
    ) -> list[torch.Tensor]:
        """One column's tensors, decoded together; text keeps its type, the others become float32."""
        kept = getattr(torch, self.manifest["columns"][name]["dtype"])
        for data, shape, number in zip(stored, shapes, numbers, strict=True):
            unit, held = kept.itemsize * abs(math.prod(shape)), len(data or b"")
            if not held or (held % unit if -1 in shape else held != unit):
                raise ValueError(self._unreadable(number, f"its {name} of {held:,} bytes are not of shape {shape}"))
        lengths = [len(data) // kept.itemsize for data in stored]
        values = torch.frombuffer(bytearray().join(stored), dtype=kept)
        values = values if name.startswith("text.") else values.float()
        return [part.view(shape) for part, shape in zip(values.split(lengths), shapes, strict=True)]

    def _unreadable(self, number: int, why: str) -> str:
        return f"Row {number} of '{self.folder}' cannot be read ({why})."
