"""Inspection of data before training: sizes, captions, buckets, rejected rows, and a contact sheet."""

from __future__ import annotations

import random
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from emmdit.data.buckets import Buckets, cropped
from emmdit.data.precompute.latents import LatentsDataset
from emmdit.data.precompute.precompute import Item
from emmdit.files import first_line, parse_json, read_bytes, to_uint8

STEPS = (128, 64, 32, 16, 8)  # of buckets, where the data name none: the first with at least four to a side
Tokenizer = tuple[str, Callable[[list[str]], list[int]], int | None]  # unit, captions -> lengths, where they are cut
MAX_REJECTS = 1 << 30  # bytes of rejects.jsonl
WORDS: Tokenizer = ("words", lambda captions: [len(caption.split()) for caption in captions], None)


@dataclass
class Inspected:
    """What a data module offers for inspection.

    Args:
        items: map-style, of `Item` as `emmdit precompute` would judge it, with pixels where there is an image.
        about: facts for the head of the report; `kind` among them.
        latents: of a precomputed folder.
    """

    items: Dataset
    about: dict[str, Any]
    resolution: int | None = None
    buckets: Buckets | None = None
    latents: LatentsDataset | None = None


def chosen_rows(count: int, limit: int | None = None, sample: int | None = None, seed: int = 0) -> list[int]:
    """`sample` of the first `limit` rows in rising order, the same for the same seed; None: all."""
    count = count if limit is None else min(count, limit)
    if sample is None or sample >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), sample))


# -- items -------------------------------------------------------------------------------------------


class Thumbnails(Dataset):
    """The items, with a thumbnail (uint8) in place of the pixels for the rows in `shown`, without pixels for others."""

    def __init__(self, items: Any, shown: Iterable[int] = (), side: int = 160) -> None:
        self.items, self.shown, self.side = items, set(shown), side

    def __getitem__(self, number: int) -> Item:
        item = self.items[number]
        if item.pixels is not None:
            item.pixels = thumbnail(item.pixels, self.side) if number in self.shown else None
        return item


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(image.size) < side:  # the shapes world's 32 px
        scale = side // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return np.array(image)


class SampleItems(Dataset):
    """Samples of any dataset: where images are rendered, or latents are stored."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.sizes = dataset, getattr(dataset, "sizes", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Item:
        item = Item(number, "")
        try:
            sample = self.dataset[number]
        except Exception as error:
            item.reason, item.detail = "corrupt", first_line(error)
            return item
        item.captions = [text for text, _ in sample.get("captions", ())] or [sample["caption"]]
        if not any(caption.strip() for caption in item.captions):
            item.reason, item.detail = "empty caption", "nothing in it"
        if "image" in sample:
            item.pixels = to_uint8(sample["image"][None])[0]
            item.original = (item.pixels.shape[1], item.pixels.shape[0])
        if self.sizes is not None:
            item.original = (int(self.sizes[number, 1]), int(self.sizes[number, 0]))
        return item


# -- summary -----------------------------------------------------------------------------------------


def summary(
    items: Iterable[Item],
    tokenizers: Sequence[Tokenizer] = (WORDS,),
    resolution: int | None = 512,
    buckets: Buckets | None = None,
) -> tuple[dict[str, Any], list[Item]]:
    """`good`, `rejected`, `rejects`, `sizes` (of rejected ones, too), `captions` and `buckets` of the good ones; and
    the items that have a thumbnail or a fault."""
    rejects, kept, captions, sizes, good = [], [], [], [], []
    for item in items:
        size = item.original[::-1]  # height, width
        if size != (0, 0):
            sizes.append(size)
        if item.reason:
            rejects.append(item.reject())
        else:
            captions += [text for text in item.captions if text]
            good.append(size)
        if item.reason or item.pixels is not None:
            kept.append(item)
    used = np.array([size for size in good if size != (0, 0)])
    if buckets is None and resolution:
        step = next((step for step in STEPS if resolution % step == 0 and resolution >= 4 * step), None)
        buckets = None if step is None else Buckets(step)
    table = None
    if len(used) and resolution and buckets is not None:
        table = bucket_table(used, buckets.sizes(resolution), buckets.assign(used, resolution), resolution)
        table = asdict(buckets) | table
    return {
        "good": len(good),
        "rejected": dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
        "rejects": rejects,
        "sizes": size_table(np.array(sizes)) if sizes else None,
        "captions": caption_table(captions, tokenizers),
        "buckets": table,
    }, kept


def latents_summary(samples: LatentsDataset, shown: Sequence[int]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What a precomputed folder knows beside its rows: rejects, buckets as encoded, statistics of the shown latents."""
    manifest = samples.manifest
    file = samples.folder / "rejects.jsonl"
    found: dict[str, Any] = {"rejected": manifest["counts"]["rejected"], "rejects": []}
    for number, line in enumerate(read_bytes(file, MAX_REJECTS).splitlines()[:1000], 1):
        try:
            found["rejects"].append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is damaged ({first_line(error)}): precompute again.") from error
    found["buckets"] = bucket_table(samples.sizes, *samples.buckets(), manifest["resolution"])
    latents = [sample["latents"] for sample in samples.__getitems__(list(shown))] if shown else []
    if latents:
        values = torch.cat([tensor.flatten() for tensor in latents])
        found["latents"] = {"shape": list(latents[0].shape), "dtype": manifest["columns"]["latents"]["dtype"]}
        found["latents"] |= {"samples": len(latents), "mean": values.mean().item(), "std": values.std().item()}
    return found, latents


def quantiles(values: Any) -> dict[str, float]:
    """Of at least one value."""
    points = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    return dict(zip(("min", "p5", "median", "p95", "max"), points, strict=True)) | {"mean": float(np.mean(values))}


def size_table(sizes: np.ndarray) -> dict[str, Any]:
    """Of (n, 2) heights and widths in pixels."""
    height, width = sizes.T
    sides = {"width": width, "height": height, "short_side": sizes.min(1), "ratio": width / height}
    return {name: quantiles(values) for name, values in sides.items()}


def caption_table(captions: list[str], tokenizers: Sequence[Tokenizer]) -> dict[str, Any]:
    """Lengths of all captions in each unit; several captions of one image count each."""
    rows = []
    for unit, lengths_of, max_length in tokenizers:
        lengths = [n for i in range(0, len(captions), 1000) for n in lengths_of(captions[i : i + 1000])]
        cut = None if max_length is None else sum(n > max_length for n in lengths)
        found = quantiles(lengths) if lengths else None
        rows.append({"unit": unit, "max_length": max_length, "cut": cut, "lengths": found})
    return {"captions": len(captions), "repeated": len(captions) - len(set(captions)), "in": rows}


def bucket_table(
    sizes: np.ndarray, buckets: Sequence[tuple[int, int]], index: np.ndarray, resolution: int
) -> dict[str, Any]:
    """How many images (n, 2) fall into each bucket and what is cropped of them, beside what the square crop takes."""
    rows, total = [], 0.0
    for place, (height, width) in enumerate(buckets):
        here = sizes[index == place]
        lost = cropped(here, (height, width))
        total += float(lost.sum())
        row = {"height": height, "width": width, "images": len(here), "share": len(here) / len(sizes)}
        rows.append(row | {"cropped": float(lost.mean()) if len(here) else None})
    square = float(cropped(sizes, (resolution, resolution)).mean())
    return {"resolution": resolution, "rows": rows, "cropped": total / len(sizes), "cropped_square": square}


# -- text and images ---------------------------------------------------------------------------------


def as_text(report: dict[str, Any], rejects: int = 20) -> str:
    """The report as YAML, with the first rejects alone."""
    short = {key: found for key, found in report.items() if found not in (None, "", {}, [])}
    if "rejects" in short:
        short["rejects"] = short["rejects"][:rejects]
    return to_yaml(short)


def to_yaml(report: dict[str, Any]) -> str:
    """A report to read, floats to three digits, a row a line."""
    return yaml.safe_dump(_rounded(report), sort_keys=False, width=10_000, default_flow_style=None, allow_unicode=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(found) for key, found in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(found) for found in value]
    return round(value, 3) if isinstance(value, float) else value


def contact_sheet(items: list[Item], side: int = 160, columns: int = 6, lines: int = 4) -> Image.Image:
    """Thumbnails in reading order with number and caption below; a rejected row as its reason."""
    font = ImageFont.load_default(11)
    height, gap = side + 14 * (lines + 1) + 4, 8
    rows = -(-len(items) // columns)
    columns = min(columns, len(items))
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for place, item in enumerate(items):
        left, top = gap + place % columns * (side + gap), gap + place // columns * (height + gap)
        if item.pixels is not None:
            image = Image.fromarray(item.pixels)
            canvas.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
        else:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill="#eeeeee", outline="#bb2222")
            text = _wrapped(f"{item.reason}: {item.detail}" if item.reason else "no image", 24, 9)
            draw.multiline_text((left + 6, top + 6), text, fill="#bb2222", font=font)
        caption = next((text for text in item.captions if text), "")
        size = " ({} x {})".format(*item.original) if item.original != (0, 0) else ""
        draw.text((left, top + side + 2), f"row {item.row}{size}", fill="#666666", font=font)
        draw.multiline_text((left, top + side + 16), _wrapped(caption, 27, lines), fill="black", font=font)
    return canvas


def _wrapped(text: str, width: int, lines: int) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return "\n".join(textwrap.wrap(printable, width, max_lines=lines, placeholder=" ..."))
