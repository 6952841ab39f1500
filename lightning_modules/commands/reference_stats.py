"""`emmdit reference-stats`: statistics of real images for FID, KID and CMMD, in files named by their contents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from PIL import Image
from torch import Tensor

from emmdit.config_text import read_yaml
from emmdit.data.dataset import CaptionedDataset
from emmdit.data.images import eight_bits, load_image, opened
from emmdit.data.readers.open import open_source, select_columns
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.evaluation.metrics.features import CleanInception, CLIPFeatures, FeatureExtractor
from emmdit.evaluation.metrics.fid import FeatureStatistics
from emmdit.evaluation.metrics.reference import write_reference
from emmdit.files import check_folder, first_line, resolved, to_uint8
from emmdit.shapes import ShapesDataset, ShapesPrompts, ShapesWorld, render_scene
from lightning_modules.commands.config_errors import sentence
from lightning_modules.commands.options import check_options, command_parser
from lightning_modules.commands.progress import counter
from lightning_modules.runs import instantiate

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
THREADS = 8


@dataclass(frozen=True)
class Source:
    """`count` real images; `image(i)` is a uint8 tensor (3, H, W)."""

    label: str
    count: int
    image: Callable[[int], Tensor]
    about: dict[str, Any]


def reference_stats(argv: list[str]) -> None:
    """Write mean and covariance of the features of real images (and the features), as clean-fid reads them."""
    args = reference_parser().parse_args(argv)
    check_options(args)
    check_folder(args.out)
    features = build_features(args.features)
    images = open_images(args)
    if images.count < 2:
        raise ValueError(
            f"Reference statistics need at least 2 images, and {images.label} has {images.count}: add more."
        )
    features.prepare(args.device)
    for path in make_reference(images, features, Path(args.out), args.feats, args.batch_size, args.device):
        print(path)


def reference_parser() -> ArgumentParser:
    parser = command_parser(reference_stats)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder of images, searched with all folders below it")
    source.add_argument("--data", help="hub id, parquet or Arrow folder, as of `datamodules.HubDataModule`")
    source.add_argument("--shapes", type=int, metavar="N", help="N ground-truth renders of the shapes world")
    per_task_help = (
        "with --shapes: render the prompts of `ShapesPrompts(per_task=K)` in turn; default: training captions"
    )
    parser.add_argument("--per_task", type=int, metavar="K", help=per_task_help)
    unseen_help = "with --per_task: also those of `ShapesPrompts(unseen=K)`"
    parser.add_argument("--unseen", type=int, default=0, metavar="K", help=unseen_help)
    parser.add_argument("--split", default="train", help="split of --data")
    parser.add_argument("--image_column", default="image", help="column of --data that holds the images")
    resolution_help = "pixels: resize the short side and center-crop; by default images stay as they are (--shapes: 32)"
    parser.add_argument("--resolution", type=int, help=resolution_help)
    parser.add_argument("--num", type=int, help="images, chosen at random of --images or --data; all by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes, or of the choice that --num makes")
    features_help = "clean (Inception), clip:SOURCE, or a YAML file with class_path and init_args of a FeatureExtractor"
    parser.add_argument("--features", default="clean", help=features_help)
    parser.add_argument("--feats", action="store_true", help="also write NAME_kid.npz, the features for KID and CMMD")
    parser.add_argument("--out", default="runs/references", help="folder of the files")
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward pass")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    return parser


def make_reference(
    images: Source, features: FeatureExtractor, out: Path, feats: bool, batch_size: int, device: str
) -> list[Path]:
    """Extract, sum and write. The files' names end in a hash of the pixels and of the extractor."""
    statistics, progress = FeatureStatistics.zeros(features.dim, device), counter("images")
    digest, vectors = hashlib.sha256(), []
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, images.count, batch_size):
            last = min(first + batch_size, images.count)
            batch = list(pool.map(images.image, range(first, last)))
            for shape, group in groupby(batch, key=lambda image: tuple(image.shape)):
                same = torch.stack(list(group))
                digest.update(repr(shape).encode() + same.numpy().tobytes())
                made = features.extract(same.to(device))
                statistics.add(made)
                if feats:
                    vectors.append(made.cpu())
            progress(last, images.count)
    mu, sigma = statistics.moments()
    identity = features.identity()
    about = images.about | {"n": images.count, "sha256": digest.hexdigest()}
    made_with = {"features": identity, "settings": features.settings(), "images": about}
    short = hashlib.sha256((about["sha256"] + json.dumps(identity, sort_keys=True)).encode()).hexdigest()[:8]
    stem = f"{slug(images.label)}_{about['resolution'] or 'native'}_{slug(features.name)}_{images.count}_{short}"
    paths = [out / f"{stem}.npz"]
    write_reference(paths[0], {"mu": mu, "sigma": sigma}, made_with)
    if feats:
        paths.append(out / f"{stem}_kid.npz")
        write_reference(paths[1], {"feats": torch.cat(vectors).numpy()}, made_with)
    return paths


def build_features(text: str) -> FeatureExtractor:
    """`clean`, `clip:SOURCE`, or a YAML file {class_path: ..., init_args: ...}."""
    if text == "clean":
        return CleanInception()
    if text.startswith("clip:"):
        return CLIPFeatures(CLIP(text.removeprefix("clip:")))
    if not Path(text).is_file():
        raise ValueError(f"--features is 'clean', 'clip:SOURCE' or a YAML file, and '{text}' is none of them.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("features", type=FeatureExtractor)
    try:
        return instantiate(parser, parser.parse_object({"features": read_yaml(text)})).features
    except (ArgumentError, TypeError) as error:
        raise ValueError(
            f"'{text}' does not name a FeatureExtractor by class_path and init_args ({sentence(error).rstrip('.')})."
        ) from error


def open_images(args: Namespace) -> Source:
    about = {"resolution": args.resolution, "seed": args.seed}
    if args.shapes is not None:
        if args.num is not None:
            raise ValueError("--num goes with --images or --data; with --shapes N there are N images.")
        scenes = ShapesDataset(ShapesWorld(32 if args.resolution is None else args.resolution), args.seed, args.shapes)
        about |= {"source": "shapes world", "resolution": scenes.world.image_size, "per_task": args.per_task}
        about |= {"unseen": args.unseen} if args.unseen else {}
        if args.per_task is None and args.unseen:
            raise ValueError("--unseen goes with --per_task.")
        if args.per_task is None:
            return Source("shapes", args.shapes, lambda i: _tensor(render_scene(scenes.scene(i))), about)
        prompts = [line["prompt"] for line in ShapesPrompts(args.per_task, unseen=args.unseen).lines]
        first = (1 + args.seed) << 32  # seeds of their own: evaluations count from zero

        def scene(i: int) -> Tensor:
            return _tensor(render_scene(scenes.world.sample_for(prompts[i % len(prompts)], first + i)))

        label = f"shapes_p{args.per_task}" + (f"_u{args.unseen}" if args.unseen else "")
        return Source(label, args.shapes, scene, about)
    if args.per_task is not None or args.unseen:
        raise ValueError("--per_task and --unseen go with --shapes.")
    if args.images is not None:
        files = image_files(Path(args.images))
        count, label = len(files), resolved(args.images).name

        def image(i: int) -> Tensor:
            return read_real(files[i], args.resolution)

    else:
        if args.resolution is None:
            raise ValueError("--data needs --resolution, the size to which its images are cropped.")
        columns = {"image": args.image_column}
        table = select_columns(open_source(args.data, args.split), columns, args.data)
        rows = CaptionedDataset(table, args.data, columns, args.resolution)
        count, label = len(rows), args.data.rstrip("/").split("/")[-1].removesuffix(".parquet")
        about["split"] = args.split

        def image(i: int) -> Tensor:
            return _tensor(to_uint8(rows[i]["image"][None])[0])

    about |= {"source": label, "of": count}
    if args.num is None:
        return Source(label, count, image, about)
    if not 1 <= args.num <= count:
        raise ValueError(f"'{args.images or args.data}' has {count} images, and --num asks for {args.num} of them.")
    chosen = sorted(np.random.default_rng(args.seed).choice(count, args.num, replace=False).tolist())
    return Source(label, args.num, lambda i: image(chosen[i]), about)


def image_files(folder: Path) -> list[Path]:
    """All images below `folder`, sorted by name. Raises FileNotFoundError if there is none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"There are no images below '{folder}': name a folder with {', '.join(sorted(ENDINGS))}."
        )
    return files


def read_real(path: Path, resolution: int | None) -> Tensor:
    """uint8 (3, H, W); as clean-fid reads it, or cropped to a square. ValueError names a file that cannot be read."""
    try:
        if resolution is not None:
            return _tensor(to_uint8(load_image(path, resolution)[None])[0])
        with opened(path) as image:
            return _tensor(np.array(eight_bits(image).convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image '{path}' cannot be read ({first_line(error)}): repair or remove it.") from error


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)
