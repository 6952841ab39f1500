"""Data loading benchmark: samples per second from disk to batch, through the whole data modules, in random order.

    python -m benchmarks.loader --json benchmarks/results/loader_cpu.json > benchmarks/results/loader_cpu.md

The same latents (32 x 16 x 16 float16, 16 KiB, as DC-AE gives them at 512 px) are read from a folder of `emmdit
precompute`, from webdataset tars and from MDS shards, and a JPEG photograph is decoded, resized and cropped to 512 px.
One process, one thread, the cases in turns, files in the page cache; rates are by the seconds in which the thread ran,
as on an idle core. Memory is read while ten times as many samples pass as a round has: what the process owns apart from
the pages of mapped files, which the system takes back when it needs them (Linux only).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import argument_parser, clock_of, interleaved, markdown_table, show, whole, write_json
from datamodules import CaptionedImagesDataModule, LatentsDataModule, TextImageDataModule
from emmdit.data.images import load_image
from emmdit.data.precompute.job import ResumableJob
from emmdit.data.precompute.manifest import KIND, VERSION
from emmdit.data.precompute.precompute import finish, write_arrow
from emmdit.provenance import machine

CPU = torch.device("cpu")
SHAPE = (32, 16, 16)
CAPTION = "a photograph of a wooden hall behind trees, its roof of gray tiles, in the light of a late afternoon"
ROWS = 10_000  # in a file
JPEG_SIZES = ((1024, 768), (2048, 1536))
COLUMNS = {"case": "from", "rate": "samples/s", "low": "slowest round", "high": "fastest", "ratio": "to the first"}
MEMORY_COLUMNS = {"samples": "samples read", "own_mib": "own memory, MiB"}
NOISE = np.random.default_rng(0).standard_normal(8192 * 2).astype(np.float16)


# -- the data ----------------------------------------------------------------------------------------


def latents(number: int) -> bytes:
    """16 KiB that differ from sample to sample."""
    first = number * 131 % 8192
    return NOISE[first : first + 8192].tobytes()


def write_latents(folder: Path, samples: int) -> None:
    """As `emmdit precompute` does, without the encoder."""
    codec = {"class_path": "noise", "weights_sha256": "none", "downsample": 32, "latent_channels": SHAPE[0]}
    about = {"kind": KIND, "version": VERSION, "source": {"source": "noise"}, "codec": codec, "resolution": 512}
    shape = {"latents": {"dtype": "float16", "shape": list(SHAPE)}}
    same = {"caption": CAPTION, "captions": []}
    same |= dict.fromkeys(("width", "height", "original_width", "original_height"), 512)
    with ResumableJob(folder, about, samples, ROWS) as job:
        for unit in job.pending():
            made = [{"sample_id": i, "key": f"{i:09d}", **same, "latents": latents(i)} for i in job.rows(unit)]
            job.commit(unit, lambda path, made=made: write_arrow(path, made), len(made), [], tensors=shape)
        finish(job, about)


def write_tars(folder: Path, samples: int) -> None:
    folder.mkdir()
    for first in range(0, samples, ROWS):
        with tarfile.open(folder / f"{first:09d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + ROWS, samples)):
                for kind, data in (("latents", latents(i)), ("txt", CAPTION.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_mds(folder: Path, samples: int) -> None:
    folder.mkdir()
    columns = {"column_names": ["caption", "latents"], "column_encodings": ["str", "bytes"], "column_sizes": [None] * 2}
    head, shards = np.array([len(CAPTION), 16384], "<u4").tobytes() + CAPTION.encode(), []
    for first in range(0, samples, ROWS):
        data = [head + latents(i) for i in range(first, min(first + ROWS, samples))]
        offsets = 4 * (len(data) + 2) + np.cumsum([0, *map(len, data)])
        content = np.array([len(data), *offsets], "<u4").tobytes() + b"".join(data)
        name = f"shard.{len(shards):05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content)}
        shards.append({"format": "mds", "samples": len(data), "raw_data": raw, "zip_data": None, **columns})
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


def modules(folder: Path, samples: int, **common: Any) -> dict[str, TextImageDataModule]:
    """Writes the samples in every format; a data module for each way to read them."""
    for name, write in (("latents", write_latents), ("tars", write_tars), ("mds", write_mds)):
        write(folder / name, samples)
    stored = {"image_column": None, "latents_column": "latents", "latents_shape": SHAPE, "num_workers": 0, **common}
    return {
        "LatentsDataModule": LatentsDataModule(str(folder / "latents"), num_workers=0, **common),
        "CaptionedImagesDataModule, the same folder": CaptionedImagesDataModule(str(folder / "latents"), **stored),
        "CaptionedImagesDataModule, MDS": CaptionedImagesDataModule(str(folder / "mds"), **stored),
        "CaptionedImagesDataModule, webdataset tars": CaptionedImagesDataModule(
            str(folder / "tars"), caption_column="txt", **stored
        ),
    }


# -- the cases ---------------------------------------------------------------------------------------


def batches(data: TextImageDataModule) -> Iterator[dict[str, Any]]:
    """Endless, as a training takes them from the data module."""
    module = SimpleNamespace(codec=None, samples_seen=0)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True, lightning_module=module)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    while True:
        yield from loader


def photograph(width: int, height: int) -> bytes:
    """matplotlib's, enlarged: smoother than a camera's image of that size, so a little quicker to decode."""
    from matplotlib.cbook import get_sample_data

    buffer = io.BytesIO()
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(cases: dict[str, Callable[[], object]], samples: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each case, a call of which reads `samples`."""
    for run in cases.values():
        run()  # opens files, fills caches
    timings = interleaved(cases, CPU, rounds, min_seconds=0, clock=clock_of(CPU))
    first = next(iter(timings.values())).median
    return [
        {"case": name, "rate": samples / t.median, "low": samples / t.high, "high": samples / t.low}
        | {"ratio": first / t.median}
        for name, t in timings.items()
    ]


def memory_over(run: Callable[[], object], samples: int) -> Iterator[dict[str, float]]:
    for i in range(10):
        run()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        yield {"samples": samples * (i + 1), "own_mib": int(lines["RssAnon"].split()[0]) / 1024}


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--samples", type=whole(1), help="samples in the dataset; default 100,000, --quick 10,000")
    parser.add_argument("--batch_size", type=whole(1), default=64, help="samples in a batch; default 64")
    parser.add_argument("--rounds", type=whole(1), help="turns of each case; default 7, --quick 3")
    args = parser.parse_args(argv)
    samples, rounds = args.samples or (10_000 if args.quick else 100_000), args.rounds or (3 if args.quick else 7)
    count = max(1, samples // 10 // args.batch_size)  # batches in a call
    torch.set_num_threads(1)
    found = machine()
    import datasets

    with TemporaryDirectory() as name:
        datasets.config.HF_DATASETS_CACHE = Path(name) / "cache"
        os.environ["EMMDIT_CACHE"] = f"{name}/cache"
        opened = modules(Path(name), samples, batch_size=args.batch_size, validation_samples=64)
        streams = {case: batches(data) for case, data in opened.items()}
        cases = {case: lambda s=stream: deque(islice(s, count), maxlen=0) for case, stream in streams.items()}
        rows = measure(cases, count * args.batch_size, rounds)
        memory = list(memory_over(cases["LatentsDataModule"], count * args.batch_size))
    images = {f"{width} x {height}, JPEG to 512 x 512": photograph(width, height) for width, height in JPEG_SIZES}
    jpeg = measure({case: lambda data=data: load_image(data, 512) for case, data in images.items()}, 1, 3 * rounds)
    tables = (markdown_table(rows, COLUMNS), markdown_table(jpeg, COLUMNS), markdown_table(memory, MEMORY_COLUMNS))
    show("Loading: 16 KiB latents and JPEG images, one process", found, *tables)
    settings = {"samples": samples, "batch_size": args.batch_size, "rounds": rounds}
    content = {"benchmark": "loader", "machine": found, "settings": settings}
    write_json(args.json, {**content, "rows": rows, "jpeg": jpeg, "memory": memory})


if __name__ == "__main__":
    main()
