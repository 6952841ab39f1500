"""Rows of a Hugging Face `datasets` table as samples: captions with images or precomputed latents."""

from __future__ import annotations

import io
from functools import reduce
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset


def open_source(
    source: str, split: str = "train", data_files: str | list[str] | None = None, revision: str | None = None
) -> Any:
    """The `datasets.Dataset` behind a hub id, `save_to_disk` folder, parquet or image folder.

    Raises:
        FileNotFoundError, OSError, ValueError: one sentence that says what to do.
    """
    import datasets

    path = Path(source).expanduser()
    table: dict[str, Any] = dict(split=split, data_files=data_files)
    if source.endswith(".parquet"):
        table = dict(path="parquet", data_files=sorted(glob(str(path), recursive=True)), split=split)
        if not table["data_files"]:
            raise FileNotFoundError(f"No file matches '{source}': give a file, a glob, a folder or a hub id.")
    elif path.is_dir():
        kind = "parquet" if any(path.rglob("*.parquet")) else "imagefolder"
        table |= dict(path=kind, data_dir=str(path))
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"The data '{source}' do not exist: give a folder, files or a hub id.")
    else:
        table |= dict(path=source, revision=revision)
    on_disk = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        rows = datasets.load_from_disk(str(path)) if on_disk else datasets.load_dataset(**table)
    except ConnectionError as error:
        raise OSError(
            f"The data set '{source}' is not in the local cache and the hub can not be reached: check the "
            "network and HF_HUB_OFFLINE, or give a local folder or parquet files."
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"'{source}' is no data set of the Hugging Face hub that you may read: check the spelling, or "
            f"accept its terms at https://huggingface.co/datasets/{source} and run `hf auth login`."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"'{source}' can not be opened as a data set: {first_line(error)}.") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ValueError(f"'{source}' has no split '{split}': choose one of {', '.join(rows)}.")
        rows = rows[split]
    return rows


def select_columns(rows: Any, columns: dict[str, str], source: str) -> Any:
    """Only the columns that are read, images left encoded. ValueError if one is not there."""
    used = set()
    for kind, column in columns.items():
        name = column if column in rows.column_names else column.partition(".")[0]
        if name not in rows.column_names:
            raise ValueError(
                f"'{source}' has no {kind} column '{column}': set {kind}_column to one of "
                f"{', '.join(rows.column_names)}."
            )
        used.add(name)
    rows = rows.select_columns(sorted(used))
    for name, feature in rows.features.items():
        if type(feature).__name__ == "Image":  # decoded by us, where the row number is known
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


class CaptionedRows(Dataset):
    """Rows first..last-1 of a table as samples; sample i is a function of its row alone.

    Args:
        rows: a `datasets.Dataset`.
        source: its name in messages.
        columns: "caption", and "image" or "latents" or both, to names; `json.prompt` reads inside `json`.
        resolution: of images, in pixels.
        latents_shape: (C, h, w) of latents stored as float16 bytes.
        latents_scale: factor to the codec's scaled latents.
    """

    def __init__(
        self,
        rows: Any,
        source: str,
        columns: dict[str, str],
        resolution: int,
        latents_shape: tuple[int, int, int] | None = None,
        latents_scale: float = 1.0,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        self.rows, self.source, self.columns, self.resolution = rows, source, columns, resolution
        self.latents_shape, self.latents_scale = latents_shape, latents_scale
        self.first, self.last = first, len(rows) if last is None else last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`caption`, `sample_id`, `image` (3, R, R) in [-1, 1] and/or `latents` (C, h, w), scaled.

        Raises:
            ValueError: the row can not be read; names its number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside this data set of {len(self)} rows.")
        number = self.first + int(index)
        row = self.rows[number]
        sample: dict[str, Any] = {"sample_id": torch.tensor(index, dtype=torch.int64)}
        for kind, column in self.columns.items():
            try:
                path = [column] if column in row else column.split(".")
                sample[kind] = getattr(self, f"_{kind}")(reduce(lambda value, key: value[key], path, row))
            except Exception as error:
                raise ValueError(
                    f"Row {number} of '{self.source}': the {kind} in column '{column}' can not be read "
                    f"({first_line(error)}): mend or remove the row."
                ) from error
        return sample

    def _caption(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"a text was expected, not {value!r:.40}")
        return value

    def _image(self, value: Any) -> torch.Tensor:
        return load_image(value, self.resolution)

    def _latents(self, value: Any) -> torch.Tensor:
        if isinstance(value, bytes):
            if self.latents_shape is None:
                raise ValueError("latents_shape must say how its bytes are to be read")
            value = np.frombuffer(value, np.float16).reshape(self.latents_shape)
        array = np.asarray(value, dtype=np.float32)
        if array.ndim != 3:
            raise ValueError(f"an array (C, h, w) was expected, not one of shape {array.shape}")
        return torch.from_numpy(array) * self.latents_scale


def load_image(value: Any, resolution: int) -> torch.Tensor:
    """An encoded image -> (3, resolution, resolution) float32 in [-1, 1].

    The short side is resized (bicubic, antialiased), then the centre is cut out.

    Args:
        value: bytes, a path, or both as `datasets` stores them: {"bytes": ..., "path": ...}.
    """
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # what lies under transparent pixels is arbitrary: show them on white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)  # PIL widens the filter when it shrinks
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
