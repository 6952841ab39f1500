"""Readers of data, precomputed latents and evaluations."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emmdit.data.readers.mds import MDSDataset
from tests.fuzz.target import target, write_json

ROWS = {"image": "image", "caption": "caption"}
FEW = 12  # rows of a source that are read


def encoded(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (9, 7), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, kind, **options)
    return file.getvalue()


# -- data ----------------------------------------------------------------------------------------------


def samples(source: Path) -> None:
    """All that training reads of a source; then the first of the rows' errors."""
    if source.is_symlink() and source.is_dir():  # what the user names is read, even if that is the whole disk
        return
    from emmdit.data.buckets import image_sizes
    from emmdit.data.dataset import CaptionedDataset
    from emmdit.data.readers.open import open_source, select_columns

    rows = select_columns(open_source(str(source)), ROWS, str(source))
    found = CaptionedDataset(rows, str(source), ROWS, 8)
    first: ValueError | None = None
    for number in range(min(len(found), FEW)):
        try:
            found[number]
        except ValueError as error:
            first = first or error
    if len(found) <= FEW:
        image_sizes(rows, "image")
    assert len(rows.fingerprint) == 16
    if first is not None:
        raise first


def make_mds(folder: Path) -> None:
    values = [{"image": encoded("JPEG"), "caption": b"a circle", "pil": pil(), "json": b"[1]"} for _ in range(2)]
    values[1]["x"] = values[0]["x"] = bytes([17, 8, 2, 2]) + bytes(8)
    encodings = {"image": "jpeg", "caption": "str", "pil": "pil", "json": "json", "x": "ndarray"}
    shard = b""
    offsets = [4 * (len(values) + 2)]
    for value in values:
        parts = [value[name] for name in encodings]
        shard += b"".join(len(part).to_bytes(4, "little") for part in parts) + b"".join(parts)
        offsets.append(4 * (len(values) + 2) + len(shard))
    head = len(values).to_bytes(4, "little") + b"".join(offset.to_bytes(4, "little") for offset in offsets)
    (folder / "shard.00000.mds").write_bytes(head + shard)
    entry = {"format": "mds", "samples": len(values), "zip_data": None, "compression": None, "hashes": []}
    entry |= {"raw_data": {"basename": "shard.00000.mds", "bytes": len(head + shard), "hashes": {}}}
    names, kinds = list(encodings), list(encodings.values())
    entry |= {"column_names": names, "column_encodings": kinds, "column_sizes": [None] * len(names)}
    write_json(folder / "index.json", {"shards": [entry], "version": 2})


def pil() -> bytes:
    head = b"".join(number.to_bytes(4, "little") for number in (3, 2, 3))
    return head + b"RGB" + bytes(18)


@target(make_mds, cost=2)
def mds(folder: Path) -> None:
    first: ValueError | None = None
    rows = MDSDataset(folder)
    for number in range(min(len(rows), FEW)):
        try:
            row = rows[number]
            for value in row.values():
                if isinstance(value, Image.Image):
                    from emmdit.data.images import open_image

                    open_image(value)
        except ValueError as error:  # of this row alone; see `samples` for its name
            first = first or error
    samples(folder)


def make_tar(folder: Path) -> None:
    for name in ("a", "b"):
        with tarfile.open(folder / f"{name}.tar", "w") as file:
            members = {"1.jpg": encoded("JPEG"), "1.txt": b"a circle", "1.json": b'{"x": 1}', "2.png": encoded()}
            for member, data in (members | {"2.txt": b"a star"}).items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


@target(make_tar, cost=6)
def tar(folder: Path) -> None:
    samples(folder)


def table() -> Any:
    import datasets

    columns = {"image": [{"bytes": encoded(), "path": None}] * 3, "caption": ["a circle", "a star", "a square"]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


def make_arrow(folder: Path) -> None:
    table().save_to_disk(folder / "disk")


@target(make_arrow, cost=8)
def arrow(folder: Path) -> None:
    samples(folder / "disk")


@target(lambda folder: table().to_parquet(folder / "rows.parquet"), cost=60)
def parquet(folder: Path) -> None:
    samples(folder / "rows.parquet")


def make_folder(folder: Path) -> None:
    for name in ("a", "sub/b", "c"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(encoded())
    (folder / "a.txt").write_text("a circle")
    write_json(folder / "c.json", {"caption": "a star"})
    write_json(folder / "sub/b.json", {"caption": "a square"})


@target(make_folder, cost=4, reads="inside")
def captioned_folder(folder: Path) -> None:
    samples(folder)


def make_imagefolder(folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("a", "sub/b", "c"):
        (folder / f"{name}.png").write_bytes(encoded())
    (folder / "metadata.csv").write_text("file_name,caption\na.png,a circle\nsub/b.png,a star\nc.png,x\n")


@target(make_imagefolder, cost=80)
def imagefolder(folder: Path) -> None:
    samples(folder)


def make_images(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = {
        "a.png": {},
        "b.jpg": {"kind": "JPEG", "exif": exif},
        "c.webp": {"kind": "WEBP"},
        "d.tif": {"kind": "TIFF"},
    }
    forms |= {"e.png": {"mode": "LA"}, "f.png": {"mode": "P"}, "g.bmp": {"kind": "BMP"}, "h.png": {"mode": "I;16"}}
    forms |= {"i.gif": {"kind": "GIF", "mode": "P"}, "k.ppm": {"kind": "PPM"}}
    for name, form in forms.items():
        mode = form.pop("mode", "RGB")
        if mode == "I;16":
            Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9)).save(folder / name)
        else:
            (folder / name).write_bytes(encoded(mode=mode, **form))


@target(make_images, cost=1, named=False, apart=True)
def images(folder: Path) -> None:
    from emmdit.data.images import load_image, open_image

    first: ValueError | None = None
    for path in sorted(folder.iterdir()):
        try:
            open_image(path)
            load_image(path.read_bytes(), 8)
        except ValueError as error:
            first = first or error
    if first is not None:
        raise first


# -- precomputed latents -------------------------------------------------------------------------------

PLAN = {"source": {"source": "x", "license": ""}, "resolution": 32}


def start_job(folder: Path) -> None:
    from emmdit.data.precompute.job import ResumableJob

    with ResumableJob(folder / "job", PLAN, 4, 2) as job:
        rejects = [{"row": 1, "reason": "corrupt"}]
        job.commit(0, lambda path: path.write_bytes(b"x"), 1, rejects, tensors={"latents": {"dtype": "float16"}})


@target(start_job, cost=3)
def job(folder: Path) -> None:
    from emmdit.data.precompute.job import ResumableJob

    with ResumableJob(folder / "job", PLAN, 4, 2) as found:
        found.pending()
        found.commit(1, lambda path: path.write_bytes(b"y"), 2, [], tensors={})
        found.manifest({"kind": "x"})


def make_latents(folder: Path) -> None:
    import datasets

    columns = {"latents": [np.ones((2, 2, 2), np.float16).tobytes()] * 3, "caption": ["a", "b", "c"]}
    columns |= {"captions": [["a", "b"]] * 3, "original_height": [9] * 3, "original_width": [9] * 3}
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    (shard,) = folder.glob("*.arrow")
    made = {"kind": "emmdit latents", "version": 1, "resolution": 64, "source": {"source": "x", "license": ""}}
    made |= {"counts": {"rows": 3, "samples": 3, "rejected": {}}}
    made |= {"columns": {"latents": {"dtype": "float16", "shape": [2, 2, 2]}}, "sha256": "0" * 64}
    codec = {"class_path": "emmdit.encoders.DCTCodec", "weights_sha256": "0" * 64, "dtype": "float32"}
    made |= {"codec": codec | {"latent_channels": 2, "downsample": 32}, "rows_per_shard": 3}
    made |= {"shards": [{"file": shard.name, "samples": 3, "bytes": shard.stat().st_size, "sha256": "0" * 64}]}
    write_json(folder / "manifest.json", made)


@target(make_latents, cost=10)
def latents(folder: Path) -> None:
    from datamodules import LatentsDataModule
    from emmdit.data.precompute.latents import LatentsDataset

    data = LatentsDataModule(str(folder), batch_size=1, validation_samples=1)
    data.setup("fit")
    data.provenance()
    found = LatentsDataset(folder, captions=True)
    found.buckets()
    for number in range(min(len(found), FEW)):
        found[number]


# -- evaluation ----------------------------------------------------------------------------------------

LEDGER_ROW = {"experiment": "shapes/a", "seed": 0, "eval_seed": 0, "metrics": {"fid": 1.5}, "train_seconds": None}
LEDGER_ROW |= {"command": "emmdit evaluate", "commit": None, "hardware": "cpu", "settings": {"images": 3}}


@target(lambda folder: write_json(folder / "shapes.json", [LEDGER_ROW, LEDGER_ROW | {"seed": 1}]), cost=0.7)
def ledger(folder: Path) -> None:
    from emmdit.evaluation import ledger

    if ledger.read(folder / "shapes.json"):
        ledger.append(folder / "shapes.json", LEDGER_ROW)


def image_set_of(folder: Path) -> Any:
    from emmdit.evaluation.image_set import ImageSet
    from emmdit.evaluation.prompts import PromptFile

    (folder.parent / "scratch").mkdir(exist_ok=True)
    prompts = folder.parent / "scratch/prompts.txt"
    prompts.write_text("a circle\n")
    return ImageSet(folder / "images", PromptFile(str(prompts)), 0, {"weights": "ema"})


def make_image_set(folder: Path) -> None:
    found = image_set_of(folder / "x")
    found.open()
    for sample in found.missing():
        found.write(sample, np.zeros((4, 5, 3), np.uint8))
    (folder / "x/images").rename(folder / "images")
    for left in (folder / "x", folder / "scratch"):
        with contextlib.suppress(OSError):
            [file.unlink() for file in left.iterdir()]
            left.rmdir()


@target(make_image_set, cost=2)
def image_set(folder: Path) -> None:
    found = image_set_of(folder)
    found.open()
    found.missing()
    found.read(found.samples)


def make_prompts(folder: Path) -> None:
    line = {"tag": "position", "prompt": "a dog left of a cat", "exclude": [{"class": "cow", "count": 1}]}
    line["include"] = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    (folder / "prompts.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"prompt": "a star"}) + "\n")
    (folder / "prompts.txt").write_text("a circle\na star\n")


@target(make_prompts, cost=0.7)
def prompts(folder: Path) -> None:
    from emmdit.data.readers.open import open_source
    from emmdit.evaluation.prompts import PromptFile

    for name in ("prompts.jsonl", "prompts.txt"):
        found = PromptFile(str(folder / name))
        found.describe()
        found.samples()
    rows = open_source(str(folder / "prompts.txt"))
    [rows[number] for number in range(len(rows))]
