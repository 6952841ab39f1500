"""A folder made by `emmdit precompute` as training samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from emmdit.data.buckets import code
from emmdit.data.captions import candidates
from emmdit.data.images import first_line, load_image
from emmdit.data.manifest import read_manifest


class LatentsRows(Dataset):
    """Samples with `caption`, `sample_id`, `latents` (C, h, w) float32, and `features` (N, D), `image` or `condition`
    (the tensors of the text condition by their names) where kept.

    `sample_id` is the index here; `manifest["source"]` and the column of the same name on disk lead back to the source.

    Args:
        folder: made by `emmdit precompute`.
        first, last: these rows of it.
        images: read the kept pictures, too.
        text: read the kept text conditions, too.
        captions: where a picture has several captions, give them all as `captions`, (text, weight) pairs for the loader
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
        rows = datasets.load_from_disk(str(self.folder))
        names = [name for name in ("caption", "latents", "features", "width", "height") if name in rows.column_names]
        names += ["captions"] if captions and "captions" in rows.column_names else []
        names += [name for name in rows.column_names if text and name.startswith("text.")]
        self.table, self.caption_weights = rows, caption_weights
        if images and "image" in rows.column_names:
            rows = rows.cast_column("image", datasets.Image(decode=False))
            names.append("image")
        self.rows = rows.select_columns(names)
        self.first, self.last = first, len(self.rows) if last is None else last

    def __len__(self) -> int:
        return self.last - self.first

    def buckets(self) -> np.ndarray | int:
        """Size of each sample, or of all, as `emmdit.data.buckets.code`."""
        if not self.manifest.get("buckets"):
            return code(self.manifest["resolution"], self.manifest["resolution"])
        sizes = self._sizes("height", "width")
        return sizes[:, 0] << 16 | sizes[:, 1]

    @property
    def sizes(self) -> np.ndarray:
        """(n, 2) height and width of the pictures before resize and crop."""
        return self._sizes("original_height", "original_width")

    def _sizes(self, *names: str) -> np.ndarray:
        columns = [self.table.data.column(name).to_numpy()[self.first : self.last] for name in names]
        return np.stack(columns, axis=1).astype(np.int32)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Reads a batch at once: four times as fast as one by one."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} is outside this data set of {len(self)} samples.")
        numbers = [self.first + int(index) for index in indices]
        columns = self.rows[numbers]
        samples = []
        for place, (index, number) in enumerate(zip(indices, numbers, strict=True)):
            row = {name: column[place] for name, column in columns.items()}
            try:
                samples.append(self._sample(index, row))
            except (ValueError, RuntimeError, TypeError) as error:
                raise ValueError(f"Row {number} of '{self.folder}' can not be read ({first_line(error)}).") from error
        return samples

    def _sample(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        codec = self.manifest["codec"]
        grid = (row["height"] // codec["downsample"], row["width"] // codec["downsample"])
        sample = {
            "sample_id": torch.tensor(index, dtype=torch.int64),
            "caption": row["caption"],
            "latents": self._tensor("latents", row, (codec["latent_channels"], *grid)).float(),
        }
        pairs = candidates(row.get("captions", []), self.caption_weights)
        if pairs:
            sample |= {"caption": pairs[0][0], "captions": pairs}
        if "features" in row:  # their number goes with the size of the picture
            width = self.manifest["columns"]["features"]["shape"][-1]
            sample["features"] = self._tensor("features", row, (-1, width)).float()
        if "image" in row:
            sample["image"] = load_image(row["image"], (row["height"], row["width"]))
        text = [name for name in row if name.startswith("text.")]
        if text:
            shapes = {name: self.manifest["columns"][name]["shape"] for name in text}
            sample["condition"] = {
                name.removeprefix("text."): self._tensor(name, row, shape) for name, shape in shapes.items()
            }
        return sample

    def _tensor(self, name: str, row: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
        dtype = getattr(torch, self.manifest["columns"][name]["dtype"])
        return torch.frombuffer(bytearray(row[name]), dtype=dtype).reshape(tuple(shape))
