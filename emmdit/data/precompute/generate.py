"""Generated dataset: prompts to images in webdataset tars or parquet files, each image a function of its own seed.

Unlike `emmdit.evaluation.image_set.ImageSet`, which keeps one folder a prompt in GenEval's layout, this writes shards:
ten million images are ten thousand files.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emmdit.data.captions import texts
from emmdit.data.images import InvalidSample
from emmdit.data.precompute.job import ResumableJob
from emmdit.data.precompute.precompute import Item
from emmdit.data.readers.open import open_source, select_columns, value
from emmdit.files import first_line, to_uint8

KIND = "emmdit generated"


class Prompts:
    """Prompts from a column of any source, or the lines of a text file.

    Args:
        source: text file, or any source of `open_source`.
        column: of a source that is not a text file; `json.prompt` reads inside `json`.
        first, count: a part of them; count None takes all that follow.
    """

    def __init__(
        self,
        source: str,
        column: str = "prompt",
        split: str = "train",
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        rows = open_source(source, split, data_files, revision)
        self.column = "prompt" if rows.column_names == ["prompt"] else column
        self.rows = select_columns(rows, {"prompt": self.column}, source, "prompts.column")
        last = len(self.rows) if count is None else min(first + count, len(self.rows))
        if first < 0 or first >= last:
            raise ValueError(f"'{source}' has {len(self.rows)} prompts: there are none from number {first} on.")
        self.range = range(first, last)
        self.about = {"source": source, "column": self.column, "split": split, "data_files": data_files}
        self.about |= {"revision": revision, "fingerprint": self.rows.fingerprint}
        self.about |= {"first": first, "count": len(self.range)}

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, index: int) -> str:
        """InvalidSample where there is no text."""
        found = value(self.rows[self.range[index]], self.column)
        try:
            (found,) = texts(found)
        except ValueError as error:
            raise InvalidSample(first_line(error)) from error
        if not found or not found.strip():
            raise InvalidSample("there is no prompt", "empty caption")
        return found.strip()


def generate(
    prompts: Prompts,
    model: Callable[[list[str], list[int]], Tensor],
    out: str | Path,
    made_with: dict[str, Any],
    seed: int = 0,
    batch_size: int = 8,
    quality: int = 95,
    rows_per_shard: int = 1000,
    kind: str = "tar",
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Do this rank's part of what is not done yet; returns the manifest once every rank's part is done.

    A tar holds for each prompt `KEY.jpg`, `KEY.txt` and `KEY.json` ({"prompt", "seed", "row"}), a parquet file the
    columns image, caption, key, seed and row; KEY is the prompt's number. Prompt n has the seed `seed` + n.

    Args:
        model: prompts and seeds to images (B, 3, H, W) in [-1, 1].
        made_with: pipeline, weights and sampling settings, fit for JSON: a folder started with others is refused.
        quality: of the JPEGs.
        rows_per_shard: prompts in one file; a kill costs each rank at most one file.
        kind: "tar" or "parquet".
    """
    if kind not in WRITERS:
        raise ValueError(f"The format is {' or '.join(WRITERS)}, not '{kind}'.")
    if batch_size < 1 or not 1 <= quality <= 100:
        raise ValueError("batch_size must be at least 1, and quality from 1 to 100.")
    about = {"kind": KIND, "version": 1, "prompts": prompts.about, "made_with": made_with}
    about |= {"seed": seed, "quality": quality, "batch_size": batch_size, "format": kind}
    with ResumableJob(out, about, len(prompts), rows_per_shard, f".{kind}", rank, world) as job:
        units = job.pending()
        total, done = sum(len(job.rows(unit)) for unit in units), 0
        for unit in units:
            good: list[tuple[int, str]] = []
            made: list[dict[str, Any]] = []
            rejects: list[dict[str, Any]] = []
            for row in job.rows(unit):
                try:
                    good.append((row, prompts[row]))
                except InvalidSample as error:
                    rejects.append(Item(row, f"{row:09d}", error.reason, first_line(error)).reject())
            done += len(rejects)
            for first in range(0, len(good), batch_size):
                chunk = good[first : first + batch_size]
                with torch.no_grad():
                    images = model([prompt for _, prompt in chunk], [seed + row for row, _ in chunk])
                finite = images.isfinite().flatten(1).all(1).tolist()
                pixels = to_uint8(images.nan_to_num())
                for (row, prompt), image, fine in zip(chunk, pixels, finite, strict=True):
                    if not fine or image.min() == image.max():  # overflow in float16, or a safety checker
                        rejects.append(Item(row, f"{row:09d}", "blank image", prompt[:80]).reject())
                    else:
                        made.append(_record(row, prompt, seed + row, image, quality))
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            job.commit(unit, lambda path, made=made: WRITERS[kind](path, made), len(made), rejects)
        return job.manifest(about)


def _record(row: int, prompt: str, seed: int, image: np.ndarray, quality: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    encoded = {"bytes": buffer.getvalue(), "path": None}
    return {"image": encoded, "caption": prompt, "key": f"{row:09d}", "seed": seed, "row": row}


def _write_tar(path: Path, records: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            about = {"prompt": record["caption"], "seed": record["seed"], "row": record["row"]}
            for suffix, data in (
                ("jpg", record["image"]["bytes"]),
                ("txt", record["caption"].encode()),
                ("json", json.dumps(about, ensure_ascii=False).encode()),
            ):
                member = tarfile.TarInfo(f"{record['key']}.{suffix}")  # no time, no owner: the same file every time
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"caption": "string", "key": "string", "seed": "int64", "row": "int64"}
    features = {"image": datasets.Image(), **{name: datasets.Value(kind) for name, kind in types.items()}}
    table = pa.Table.from_pylist(records, schema=datasets.Features(features).arrow_schema)
    pq.write_table(table, path, row_group_size=100)  # small groups of images, or a reader holds gigabytes


WRITERS = {"tar": _write_tar, "parquet": _write_parquet}
