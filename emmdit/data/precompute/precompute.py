"""Precomputation of latents: a source of captioned images is encoded once, and not again in every epoch.

The result is a folder that `datasets.load_from_disk` opens in place, by memory map: Arrow files, `manifest.json` and
`rejects.jsonl`, one line for each row that was rejected. Columns:

- `sample_id` int64: the row's number in the source; `key`: its place there, as far as the source has names
- `caption` str: the first that is not empty; `captions` list of str: all, where there are several, else []
- `latents` binary: the bytes of an array (C, height / d, width / d) in the type the manifest gives, scaled as
  `codec.encode` gives them
- `width`, `height` int32: of the encoded image in pixels; `original_width`, `original_height`: before resize and crop
- `image` (on request): the encoded image as JPEG, for a REPA that computes its features during training
- `features` (on request): binary, (tokens, feature_dim) float16
- `text.NAME` (on request): binary, the text condition's tensors
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from emmdit.data.buckets import Buckets
from emmdit.data.captions import texts
from emmdit.data.images import MAX_PIXELS, InvalidSample, fit, open_image, to_tensor
from emmdit.data.precompute.job import ResumableJob
from emmdit.data.precompute.manifest import KIND, VERSION, describe
from emmdit.data.readers.open import select_columns, value
from emmdit.data.readers.protocol import Rows
from emmdit.encoders.base import ImageCodec, TextConditioner, VisionFeatures, as_dtype
from emmdit.files import atomic_path, first_line


@dataclass(frozen=True)
class Settings:
    """Settings that determine the result beside source and encoders.

    Args:
        resolution: side of the square that images are resized and cropped to, in pixels.
        buckets: several sizes of about resolution x resolution pixels in place of the square, as {step: 128}.
        image_column: of the source.
        caption_columns: of the source; each holds a text or a list of texts.
        dtype: of the stored latents.
        min_side: images with a shorter side, in pixels, are rejected; by default those that would be enlarged.
        max_pixels: images with more are rejected before they are decoded.
        keep_images: JPEG quality of a copy of each encoded image, for REPA; by default none is kept.
        batch_size: images per call of the autoencoder. Part of the plan: it may change the last bits of a latent.
        seed: of autoencoders that sample their latents.
        rows_per_shard: rows of the source in one file; a kill costs each rank at most one.
    """

    resolution: int = 512
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption",)
    dtype: str = "float16"
    min_side: int | None = None
    max_pixels: int = MAX_PIXELS
    keep_images: int | None = None
    batch_size: int = 32
    seed: int = 0
    rows_per_shard: int = 10_000
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        for name in ("resolution", "batch_size", "max_pixels", "rows_per_shard", "min_side"):
            if (found := getattr(self, name)) is not None and found < 1:
                raise ValueError(f"{name} must be at least 1, got {found}.")
        if self.resolution**2 > MAX_PIXELS:
            raise ValueError(f"resolution {self.resolution} gives images of more than {MAX_PIXELS:,} pixels: lower it.")
        if not self.caption_columns:
            raise ValueError("caption_columns must name at least one column.")
        if self.keep_images is not None and not 1 <= self.keep_images <= 100:
            raise ValueError(f"keep_images is a JPEG quality from 1 to 100, not {self.keep_images}.")
        as_dtype(self.dtype)
        self.size_for((1, 1))  # raises where the buckets do not fit the resolution

    def size_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of this height and width is brought to."""
        if self.buckets is None:
            return self.resolution, self.resolution
        return self.buckets.sizes(self.resolution)[int(self.buckets.assign(np.array([size]), self.resolution)[0])]


@dataclass
class Item:
    """A row that is ready to be encoded, or (`reason` set) one that is rejected."""

    row: int
    key: str
    reason: str = ""
    detail: str = ""
    captions: list[str] = field(default_factory=list)
    pixels: np.ndarray | None = None
    original: tuple[int, int] = (0, 0)

    def reject(self) -> dict[str, Any]:
        return {"row": self.row, "key": self.key, "reason": self.reason, "detail": self.detail}


class Items(Dataset):
    """Reads, checks and decodes rows, in loader processes."""

    def __init__(self, rows: Rows, settings: Settings) -> None:
        self.rows, self.settings = rows, settings

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Item:
        item = Item(number, "")
        try:
            item.key = self.rows.origin(number)
            self._fill(item)
        except InvalidSample as error:
            item.reason, item.detail, item.pixels = error.reason, first_line(error), None
        except Exception as error:
            item.reason, item.detail, item.pixels = "corrupt", first_line(error), None
        return item

    def _fill(self, item: Item) -> None:
        settings = self.settings
        row = self.rows[item.row]
        for column in settings.caption_columns:
            try:
                item.captions += [(text or "").strip() for text in texts(value(row, column))]
            except InvalidSample:
                raise
            except ValueError as error:
                raise InvalidSample(f"in '{column}' {first_line(error)}") from error
        if not any(item.captions):
            raise InvalidSample(f"nothing in {', '.join(settings.caption_columns)}", "empty caption")
        image = open_image(value(row, settings.image_column), settings.max_pixels)
        item.original = image.size
        height, width = settings.size_for((image.height, image.width))
        needed = (width, height) if settings.min_side is None else (settings.min_side, settings.min_side)
        if image.width < needed[0] or image.height < needed[1]:
            short = f"the short side must have {needed[0]}" if needed[0] == needed[1] else f"it must have {needed}"
            raise InvalidSample(f"{image.width} x {image.height} pixels, {short}", "too small")
        item.pixels = fit(image, height, width)


def precompute(
    rows: Rows,
    source: dict[str, Any],
    codec: ImageCodec,
    out: str | Path,
    settings: Settings,
    text: TextConditioner | None = None,
    vision: VisionFeatures | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Do this rank's part of what is not done yet; returns the manifest once every rank's part is done.

    Args:
        rows: as `open_source` gives them.
        source: what the manifest says of it: `source`, `license`, `card`, ...
        out: folder of the result. Called again with the same arguments (any number of ranks), it resumes.
        num_workers: processes that read and decode images.
        progress: called with rows done and rows to do of this rank.

    Raises:
        ValueError: settings that contradict each other or the folder, before anything is written.
    """
    if settings.resolution % codec.downsample:
        raise ValueError(
            f"Images of resolution {settings.resolution} do not fit {type(codec).__name__}, whose sides divide by "
            f"{codec.downsample}: change the resolution."
        )
    columns = {"image": settings.image_column, "caption": settings.caption_columns}
    rows = select_columns(rows, columns, str(source.get("source", "the source")))
    encoders = {"codec": codec, "text": text, "vision": vision}
    encoders = {name: encoder.to(device) for name, encoder in encoders.items() if encoder is not None}
    about = {
        "kind": KIND,
        "version": VERSION,
        "source": {**source, "fingerprint": rows.fingerprint, "rows": len(rows)},
        **{name: describe(encoder) for name, encoder in encoders.items()},
        **{key: found for key, found in asdict(settings).items() if key != "rows_per_shard"},
        "scaling": "as codec.encode gives them: (raw - shift_factor) * scaling_factor",
    }
    with ResumableJob(out, about, len(rows), settings.rows_per_shard, ".arrow", rank, world) as job:
        # Batches never span units, so they are the same for any number of ranks.
        batches = [
            (unit, job.rows(unit)[first : first + settings.batch_size])
            for unit in job.pending()
            for first in range(0, len(job.rows(unit)), settings.batch_size)
        ]
        total, done = sum(len(part) for _, part in batches), 0
        sampler = [part for _, part in batches]
        loader = DataLoader(Items(rows, settings), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
        kept: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        tensors: dict[str, Any] = {}
        for (unit, part), batch in zip(batches, loader, strict=True):
            good = [item for item in batch if not item.reason]
            for shape in sorted({item.pixels.shape for item in good}):  # one, or that of each bucket
                alike = [item for item in good if item.pixels.shape == shape]
                tensors |= _encode(alike, settings, encoders, torch.device(device), kept, part[0])
            rejects += [item.reject() for item in batch if item.reason]
            done += len(batch)
            if part.stop == job.rows(unit).stop:
                made = sorted(kept, key=lambda record: record["sample_id"])
                job.commit(unit, lambda path, made=made: write_arrow(path, made), len(made), rejects, tensors=tensors)
                kept, rejects = [], []
            if progress is not None:
                progress(done, total)
        return finish(job, about)


def _encode(
    items: list[Item],
    settings: Settings,
    encoders: dict[str, Any],
    device: torch.device,
    kept: list[dict[str, Any]],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Append a record for each item to `kept`; items whose latents are not finite get a reason instead.

    Returns {column: {"dtype", "shape"}} of the columns that hold tensors.
    """
    images = to_tensor(torch.from_numpy(np.stack([item.pixels for item in items])).to(device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed * 1_000_003 + seed)  # of an autoencoder that samples: a function of the rows
        latents = encoders["codec"].encode(images).to(as_dtype(settings.dtype))
    columns = {"latents": latents}
    if "vision" in encoders:
        columns["features"] = encoders["vision"](images).to(torch.float16)
    captions = [next(text for text in item.captions if text) for item in items]
    if "text" in encoders:
        columns |= {f"text.{name}": tensor for name, tensor in encoders["text"](captions).items()}
    finite = latents.isfinite().flatten(1).all(1).tolist()
    columns = {name: tensor.cpu().contiguous() for name, tensor in columns.items()}
    for i, (item, caption) in enumerate(zip(items, captions, strict=True)):
        if not finite[i]:
            item.reason, item.detail = "non-finite latents", f"in {settings.dtype}"
            continue
        height, width = item.pixels.shape[:2]
        record = {"sample_id": item.row, "key": item.key, "caption": caption}
        record |= {"captions": item.captions if len(item.captions) > 1 else [], "width": width, "height": height}
        record |= {"original_width": item.original[0], "original_height": item.original[1]}
        if settings.keep_images is not None:
            buffer = io.BytesIO()
            Image.fromarray(item.pixels).save(buffer, "JPEG", quality=settings.keep_images)
            record["image"] = {"bytes": buffer.getvalue(), "path": None}
        record |= {name: tensor[i].reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in columns.items()}
        kept.append(record)
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}
        for name, tensor in columns.items()
    }


def write_arrow(path: Path, records: list[dict[str, Any]], batch_bytes: int = 32 << 20) -> None:
    """An Arrow stream file as `datasets` keeps it, in record batches that are mapped one by one."""
    import datasets
    import pyarrow as pa

    kinds = {int: datasets.Value("int64"), str: datasets.Value("string"), bytes: datasets.Value("binary")}
    kinds |= {list: datasets.List(datasets.Value("string")), dict: datasets.Image()}
    types = {name: kinds[type(found)] for name, found in records[0].items()}
    types |= {name: datasets.Value("int32") for name in types if name.endswith(("width", "height"))}
    schema = datasets.Features(types).arrow_schema
    size = sum(len(v) for v in records[0].values() if isinstance(v, (bytes, str))) + 64
    step = max(1, min(1000, batch_bytes // size))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(records), step):
            writer.write_table(pa.Table.from_pylist(records[first : first + step], schema=schema))


def finish(job: ResumableJob, about: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, and before it the two files by which `datasets.load_from_disk` knows the folder."""
    import datasets

    def describe_dataset(manifest: dict[str, Any]) -> None:
        files = [shard["file"] for shard in manifest["shards"]]
        features = datasets.Dataset.from_file(str(job.folder / files[0])).features
        datasets.DatasetInfo(features=features).write_to_directory(str(job.folder))
        state = {name: None for name in ("_format_columns", "_format_type", "_split")}
        state |= {"_format_kwargs": {}, "_output_all_columns": False, "_fingerprint": manifest["sha256"][:16]}
        state["_data_files"] = [{"filename": file} for file in files]
        with atomic_path(job.folder / "state.json") as part:
            part.write_text(json.dumps(state, indent=1) + "\n")

    return job.manifest(about, describe_dataset)
