"""Data loading benchmark: samples per second from disk to batch, through the whole data modules, in random order.

    python -m benchmarks.loader --json benchmarks/results/loader_cpu.json > benchmarks/results/loader_cpu.md

Writes the same latents (32 x 16 x 16 float16, 16 KiB, as DC-AE gives them at 512 px) as a folder of `emmdit
precompute`, as webdataset tars and as MDS shards, into a folder that is removed again; JPEG images are the photographs
inside scikit-learn and matplotlib. One process; the cases take turns, so that other load on the machine falls on all
alike. Two rates are given: by the wall clock, and by CPU seconds of the process, which is what an idle core would give.
Files are in the page cache unless a row says otherwise. Memory is read while 100,000 samples pass: what the process
owns, apart from the pages of mapped files, which the system takes back when it needs them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import argument_parser, markdown_table, progress, show, write_json
from datamodules import HubDataModule, LatentsDataModule, TextImageDataModule
from emmdit.data.images import load_image
from emmdit.data.precompute.job import ShardedJob
from emmdit.data.precompute.manifest import KIND, VERSION
from emmdit.data.precompute.precompute import finish, write_arrow
from emmdit.provenance import machine

SHAPE = (32, 16, 16)
CAPTION = "a photograph of a wooden hall behind trees, its roof of grey tiles, in the light of a late afternoon"
ROWS = 10_000  # in a file
COLUMNS = {
    "case": "from",
    "rate": "samples/s",
    "low": "slowest round",
    "high": "fastest",
    "cpu_rate": "samples per second of processor time",
    "ratio": "ratio of these",
}
JPEG_COLUMNS = {"case": "picture", **{key: COLUMNS[key] for key in ("rate", "low", "high", "cpu_rate")}}
MEMORY_COLUMNS = {"samples": "samples read", "own_mib": "own memory, MiB", "mapped_mib": "mapped file pages, MiB"}


# -- the data ----------------------------------------------------------------------------------------


def latents(number: int) -> bytes:
    """16 KiB that differ from sample to sample, without the time it takes to draw them anew."""
    noise = np.random.default_rng(0).standard_normal(8192 * 2).astype(np.float16) if number == 0 else latents.noise
    latents.noise = noise
    first = number * 131 % 8192
    return noise[first : first + 8192].tobytes()


def write_latents(folder: Path, samples: int) -> None:
    """As `emmdit precompute` does, without the encoder."""
    codec = {"downsample": 32, "latent_channels": SHAPE[0]}
    about = {"kind": KIND, "version": VERSION, "source": {"source": "noise"}, "codec": codec, "resolution": 512}
    with ShardedJob(folder, about, samples, ROWS) as job:
        for unit in job.pending():
            sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 512)
            made = [
                {"sample_id": i, "key": f"{i:09d}", "caption": CAPTION, "captions": [], **sizes, "latents": latents(i)}
                for i in job.rows(unit)
            ]
            shape = {"latents": {"dtype": "float16", "shape": list(SHAPE)}}
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
    shards = []
    columns = {"column_names": ["caption", "latents"], "column_encodings": ["str", "bytes"], "column_sizes": [None] * 2}
    for first in range(0, samples, ROWS):
        count = min(ROWS, samples - first)
        data = [
            np.array([len(CAPTION), 16384], "<u4").tobytes() + CAPTION.encode() + latents(i)
            for i in range(first, first + count)
        ]
        offsets = 4 * (count + 2) + np.cumsum([0, *map(len, data)])
        content = np.array([count, *offsets], "<u4").tobytes() + b"".join(data)
        name = f"shard.{len(shards):05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content)}
        shards.append({"format": "mds", "samples": count, "raw_data": raw, "zip_data": None, **columns})
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


def photographs() -> list[Image.Image]:
    """Those inside scikit-learn and matplotlib."""
    import matplotlib

    places = [Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"]
    if (found := importlib.util.find_spec("sklearn")) is not None:
        places += sorted((Path(found.origin).parent / "datasets/images").glob("*.jpg"))
    return [Image.open(place).convert("RGB") for place in places]


def jpegs(width: int, height: int) -> list[bytes]:
    """The photographs, enlarged: smoother than a camera's pictures of that size, so a little quicker to decode."""
    found = []
    for image in photographs():
        buffer = io.BytesIO()
        image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


# -- the cases ---------------------------------------------------------------------------------------


def batches(data: TextImageDataModule) -> Iterator[dict[str, Any]]:
    """Endless, as a training draws them from the data module."""
    module = SimpleNamespace(codec=None, samples_seen=0)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True, lightning_module=module)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    while True:
        yield from loader


def reads(data: TextImageDataModule, key: str = "latents") -> Callable[[int], int]:
    """run(n): read at least n samples; gives how many."""
    stream = batches(data)

    def run(samples: int) -> int:
        done = 0
        while done < samples:
            batch = next(stream)
            assert batch[key].shape[1:] == SHAPE and batch[key].dtype == torch.float32
            done += len(batch["caption"])
        return done

    return run


def webdataset_reads(folder: Path, batch_size: int) -> Callable[[int], int]:
    """The package `webdataset`, which reads tars in their order and shuffles within a buffer."""
    import webdataset

    files = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(files, shardshuffle=100, empty_check=False).repeat().shuffle(1000)

    def decoded() -> Iterator[tuple[torch.Tensor, str]]:
        for sample in data:
            values = np.frombuffer(bytearray(sample["latents"]), np.float16).reshape(SHAPE)
            yield torch.from_numpy(values).float(), sample["txt"].decode()

    stream = decoded()

    def run(samples: int) -> int:
        for _ in range(0, samples, batch_size):
            rows = [next(stream) for _ in range(batch_size)]
            torch.stack([values for values, _ in rows])
        return -(-samples // batch_size) * batch_size

    return run


def latents_cases(folder: Path, samples: int, batch_size: int) -> dict[str, Callable[[int], int]]:
    for name, write in (("latents", write_latents), ("tars", write_tars), ("mds", write_mds)):
        write(folder / name, samples)
        progress(f"  {name} written")
    common = {"batch_size": batch_size, "num_workers": 0, "validation_samples": 64}
    stored = {"image_column": None, "latents_column": "latents", "latents_shape": SHAPE} | common
    cases = {
        "LatentsDataModule": reads(LatentsDataModule(str(folder / "latents"), **common)),
        "HubDataModule, the same folder": reads(HubDataModule(str(folder / "latents"), **stored)),
        "HubDataModule, MDS": reads(HubDataModule(str(folder / "mds"), **stored)),
        "HubDataModule, webdataset tars": reads(HubDataModule(str(folder / "tars"), caption_column="txt", **stored)),
    }
    if importlib.util.find_spec("webdataset") is not None:
        cases["package webdataset, buffer of 1,000"] = webdataset_reads(folder / "tars", batch_size)
    return cases


def jpeg_cases() -> dict[str, Callable[[int], int]]:
    cases = {}
    for width, height in ((1024, 768), (2048, 1536)):
        pictures = jpegs(width, height)

        def run(samples: int, pictures: list[bytes] = pictures) -> int:
            for i in range(samples):
                load_image(pictures[i % len(pictures)], 512)
            return samples

        kilobytes = round(sum(map(len, pictures)) / len(pictures) / 1000)
        cases[f"{width} x {height}, {kilobytes} kB, to 512 x 512"] = run
    return cases


# -- measuring ---------------------------------------------------------------------------------------


def measure(cases: dict[str, Callable[[int], int]], samples: int, rounds: int) -> list[dict[str, Any]]:
    """Each case reads `samples` in each round, every other round backwards."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for run in cases.values():
        run(max(1, samples // 4))  # opens files, fills caches
    for i in range(rounds):
        for name in list(cases) if i % 2 == 0 else reversed(cases):
            clock, cpu = time.perf_counter(), time.process_time()
            done = cases[name](samples)
            rates[name].append((done / (time.perf_counter() - clock), done / (time.process_time() - cpu)))
        progress(f"  round {i + 1}/{rounds}")
    first = next(iter(cases))
    best = statistics.median(cpu for _, cpu in rates[first])
    rows = []
    for name, found in rates.items():
        by_clock, by_cpu = ([pair[i] for pair in found] for i in (0, 1))
        row = {"case": name, "rate": statistics.median(by_clock), "low": min(by_clock), "high": max(by_clock)}
        cpu_rate = statistics.median(by_cpu)
        rows.append(row | {"cpu_rate": cpu_rate, "ratio": cpu_rate / best})
    return rows


def cold(folder: Path, samples: int, batch_size: int) -> dict[str, Any]:
    """The first read of a folder that is not in the page cache: the disk's part."""
    for file in folder.glob("*.arrow"):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    data = LatentsDataModule(str(folder), batch_size=batch_size, num_workers=0, validation_samples=64)
    run = reads(data)
    clock, cpu = time.perf_counter(), time.process_time()
    done = run(samples)
    rate, cpu_rate = done / (time.perf_counter() - clock), done / (time.process_time() - cpu)
    return {"case": "LatentsDataModule, not in the page cache", "rate": rate, "cpu_rate": cpu_rate}


def memory() -> dict[str, float]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return {"own_mib": own, "mapped_mib": mapped}


def memory_over(run: Callable[[int], int], samples: int, steps: int = 10) -> list[dict[str, float]]:
    rows, done = [], 0
    for _ in range(steps):
        done += run(samples // steps)
        rows.append({"samples": done, **memory()})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, help="samples in the dataset; default 100,000, --quick 10,000")
    parser.add_argument("--batch_size", type=int, default=64, help="samples in a batch; default 64")
    parser.add_argument("--rounds", type=int, help="turns of each case; default 7, --quick 3")
    parser.add_argument(
        "--folder", type=Path, help="where the data are written and removed again; default: the system's"
    )
    args = parser.parse_args(argv)
    samples = args.samples or (10_000 if args.quick else 100_000)
    rounds = args.rounds or (3 if args.quick else 7)
    torch.set_num_threads(1)
    found = machine("cpu")
    import datasets

    with TemporaryDirectory(dir=args.folder) as name:
        datasets.config.HF_DATASETS_CACHE = Path(name) / "cache"
        os.environ["EMMDIT_CACHE"] = f"{name}/cache"
        folder = Path(name)
        cases = latents_cases(folder, samples, args.batch_size)
        rows = measure(cases, max(1000, samples // 5), rounds)
        growth = memory_over(cases["LatentsDataModule"], 10_000 if args.quick else 100_000)
        jpeg = measure(jpeg_cases(), 6 if args.quick else 24, rounds)
        write_latents(folder / "cold", min(samples, 20_000))
        rows.append(cold(folder / "cold", min(samples, 20_000) // 4, args.batch_size))
    missing = [name for name in ("webdataset", "streaming") if importlib.util.find_spec(name) is None]
    note = f"Not installed here and so not compared: {', '.join(missing)}." if missing else ""
    tables = [markdown_table(rows, COLUMNS), note, markdown_table(jpeg, JPEG_COLUMNS)]
    tables.append(markdown_table(growth, MEMORY_COLUMNS))
    show("Loading: 16 KiB latents and JPEG pictures, one process", found, [table for table in tables if table])
    if args.json is not None:
        settings = {"samples": samples, "batch_size": args.batch_size, "rounds": rounds, "not_installed": missing}
        content = {"benchmark": "loader", "machine": found, "settings": settings}
        write_json(args.json, {**content, "rows": rows, "jpeg": jpeg, "memory": growth})


if __name__ == "__main__":
    main()
