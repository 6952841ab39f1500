"""A look at a source before training on it: sizes, captions, buckets, and the rows that would be left out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from emmdit.data.arrow import ArrowRows
from emmdit.data.buckets import Buckets, code, cropped, size
from emmdit.data.images import BadRow, first_line, open_image
from emmdit.data.precompute.latents import LatentsRows
from emmdit.data.precompute.precompute import Item, Items, Settings
from emmdit.files import to_uint8

STEPS = (128, 64, 32, 16, 8)  # of buckets, where the data name none: the first with at least four to a side


@dataclass(frozen=True)
class Tokens:
    """What captions are counted in.

    Args:
        name: "tokens of ..." or "words".
        lengths: captions -> length of each.
        max_length: captions are cut to it; None: never.
    """

    name: str
    lengths: Callable[[list[str]], list[int]]
    max_length: int | None = None


WORDS = Tokens("words", lambda captions: [len(caption.split()) for caption in captions])


def chosen_rows(count: int, limit: int | None = None, sample: int | None = None, seed: int = 0) -> list[int]:
    """`sample` of the first `limit` rows in rising order, the same for the same seed; None: all."""
    count = count if limit is None else min(count, limit)
    if sample is None or sample >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), sample))


# -- rows, each judged -------------------------------------------------------------------------------


class Looks(Dataset):
    """`looks[i]`: an `Item` as `emmdit precompute` would judge it, with a thumbnail (uint8) if i is in `shown`."""

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


class EncodedItems(Dataset):
    """Samples of a folder made by `emmdit precompute`; the picture is the kept one, if there is any."""

    def __init__(self, folder: str) -> None:
        self.samples = LatentsRows(folder, images=False)
        self.manifest, self.table = self.samples.manifest, self.samples.table
        names = ("sample_id", "key", "caption", "captions", "original_width", "original_height", "image")
        self.names = [name for name in names if name in self.table.column_names]
        self._rows: ArrowRows | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Item:
        if self._rows is None:
            self._rows = ArrowRows(self.table.data, self.names)
        row = {name: found[0] for name, found in self._rows.take([number]).items()}
        item = Item(number, f"row {row['sample_id']} {row['key']}".strip())
        item.captions = row["captions"] or [row["caption"]]
        item.original = (row["original_width"], row["original_height"])
        if "image" in row:
            try:
                item.pixels = np.array(open_image(row["image"]))
            except BadRow as error:
                item.reason, item.detail = error.reason, first_line(error)
        return item


class SampleItems(Dataset):
    """Samples of any data set of the suite: where pictures are rendered, or only latents are there."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

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
        return item


def source_items(rows: Any, image_column: str, caption_columns: Sequence[str], resolution: int, **more: Any) -> Items:
    """Rows of a source with pictures; `more` are settings of precompute: `min_side`, `max_pixels`, `buckets`."""
    return Items(rows, Settings(resolution, image_column, tuple(caption_columns), **more))


# -- what they say together --------------------------------------------------------------------------


def summary(
    looks: Iterable[Item], tokens: Sequence[Tokens] = (WORDS,), resolution: int = 512, buckets: Buckets | None = None
) -> tuple[dict[str, Any], list[Item]]:
    """`good`, `rejected`, `rejects`, `sizes` (of too small ones, too), `captions` and `buckets` of the good ones.

    And the items that have a thumbnail or a fault.
    """
    good, rejects, kept = 0, [], []
    sizes: list[tuple[int, int]] = []
    used: list[tuple[int, int]] = []
    captions: list[str] = []
    several: Counter[int] = Counter()
    for item in looks:
        size_known = item.original != (0, 0)
        if size_known:
            sizes.append((item.original[1], item.original[0]))
        if item.reason:
            rejects.append(item.reject())
        else:
            texts = [text for text in item.captions if text]
            captions += texts
            several[len(texts)] += 1
            good += 1
            used += [sizes[-1]] if size_known else []
        if item.reason or item.pixels is not None:
            kept.append(item)
    found = {
        "good": good,
        "rejected": dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
        "rejects": rejects,
        "sizes": size_table(np.array(sizes, np.int32).reshape(-1, 2)),
        "captions": caption_table(captions, several, tokens),
        "buckets": bucket_table(np.array(used, np.int32).reshape(-1, 2), resolution, buckets),
    }
    return found, kept


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Of at least one value."""
    points = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    return dict(zip(("min", "p5", "median", "p95", "max"), points, strict=True)) | {"mean": float(np.mean(values))}


def size_table(sizes: np.ndarray) -> dict[str, Any] | None:
    """Of (n, 2) heights and widths; None where no size is known."""
    if not len(sizes):
        return None
    common = Counter(map(tuple, sizes.tolist())).most_common(5)
    return {
        "width": quantiles(sizes[:, 1]),
        "height": quantiles(sizes[:, 0]),
        "short_side": quantiles(sizes.min(1)),
        "ratio": quantiles(sizes[:, 1] / sizes[:, 0]),
        "most_frequent": [{"height": h, "width": w, "images": n} for (h, w), n in common],
        "short_sides": histogram(sizes.min(1).tolist()),
    }


def caption_table(captions: list[str], several: Counter[int], tokens: Sequence[Tokens]) -> dict[str, Any]:
    """Lengths of all captions in each kind of token; several captions of one image count each."""
    lengths = []
    for kind in tokens:
        counted = [n for i in range(0, len(captions), 1000) for n in kind.lengths(captions[i : i + 1000])]
        row: dict[str, Any] = {"unit": kind.name, "max_length": kind.max_length, "cut": None}
        if kind.max_length is not None:
            row["cut"] = sum(n > kind.max_length for n in counted)
        lengths.append(
            row | {"lengths": quantiles(np.array(counted)) if counted else None, "histogram": histogram(counted)}
        )
    repeated = len(captions) - len(set(captions))
    return {
        "captions": len(captions),
        "an_image": {str(count): images for count, images in sorted(several.items())},
        "repeated": repeated,
        "in": lengths,
    }


def histogram(values: list[int], bars: int = 16) -> list[dict[str, int]]:
    """Counts in steps of a power of two, at most `bars` of them: `from` (included), `to` (not), `count`."""
    if not values:
        return []
    step = 1
    while max(values) // step >= bars:
        step *= 2
    counts = np.bincount(np.array(values) // step).tolist()
    return [{"from": i * step, "to": (i + 1) * step, "count": count} for i, count in enumerate(counts)]


def default_buckets(resolution: int) -> Buckets | None:
    """With the largest usual step that has at least four to a side; None where none fits."""
    step = next((step for step in STEPS if resolution % step == 0 and resolution >= 4 * step), None)
    return None if step is None else Buckets(step)


def bucket_table(sizes: np.ndarray, resolution: int, buckets: Buckets | None = None) -> dict[str, Any] | None:
    """Which images fall into each bucket and what is cropped of them, beside what the square crop would take."""
    buckets = buckets or default_buckets(resolution)
    if not len(sizes) or buckets is None:
        return None
    codes = buckets.assign(sizes, resolution)
    rows = []
    for bucket in buckets.sizes(resolution):
        here = sizes[codes == code(*bucket)]
        lost = float(cropped(here, bucket).mean()) if len(here) else None
        rows.append(_bucket(bucket, len(here), len(sizes), lost))
    lost = sum(row["images"] * row["cropped"] for row in rows if row["images"]) / len(sizes)
    square = float(cropped(sizes, (resolution, resolution)).mean())
    return {"resolution": resolution, **asdict(buckets), "rows": rows, "cropped": lost, "cropped_square": square}


def made_buckets(sizes: np.ndarray, codes: np.ndarray, resolution: int) -> dict[str, Any]:
    """The same of latents, whose sizes are settled: (n, 2) originals, and the code of each or one for all."""
    codes = np.broadcast_to(codes, len(sizes))
    rows = []
    for found in np.unique(codes).tolist():
        here = sizes[codes == found]
        rows.append(_bucket(size(found), len(here), len(sizes), float(cropped(here, size(found)).mean())))
    lost = sum(row["images"] * row["cropped"] for row in rows) / len(sizes)
    square = float(cropped(sizes, (resolution, resolution)).mean())
    return {"resolution": resolution, "rows": rows, "cropped": lost, "cropped_square": square}


def _bucket(bucket: tuple[int, int], images: int, total: int, lost: float | None) -> dict[str, Any]:
    return {"height": bucket[0], "width": bucket[1], "images": images, "share": images / total, "cropped": lost}
