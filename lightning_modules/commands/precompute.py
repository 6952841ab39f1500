"""`emmdit precompute`: a source of captioned images to latents on disk, on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jsonargparse import ActionConfigFile, ArgumentParser

from datamodules import HubDataModule
from emmdit.data.buckets import Buckets
from emmdit.data.images import MAX_PIXELS
from emmdit.data.precompute.precompute import Settings
from emmdit.data.precompute.precompute import precompute as precompute_rows
from emmdit.encoders.base import ImageCodec, TextConditioner, VisionFeatures
from lightning_modules.commands.distributed import add_trainer_arguments, on_all_ranks
from lightning_modules.commands.progress import counter
from lightning_modules.runs import instantiate


def precompute_parser() -> ArgumentParser:
    parser = ArgumentParser("emmdit precompute", description=precompute.__doc__, exit_on_error=False)
    parser.add_argument(
        "-c",
        "--config",
        action=ActionConfigFile,
        help="experiments/data, then experiments/precompute and a trainer's file",
    )
    parser.add_subclass_arguments(
        HubDataModule, "data", required=True, help="the source, as a file of experiments/data"
    )
    parser.add_argument("--codec", type=ImageCodec, help="what encodes the images")
    parser.add_argument("--text", type=TextConditioner | None, help="store text features, too: 512 KiB a sample")
    parser.add_argument("--vision", type=VisionFeatures | None, help="store vision features, too: 384 KiB a sample")
    parser.add_argument("--out", required=True, help="folder of the result; given again, it goes on")
    parser.add_argument("--resolution", type=int, default=512, help="in pixels")
    parser.add_argument("--buckets", type=Buckets | None, help="several sizes in place of the square: {step: 128}")
    parser.add_argument("--caption_columns", type=list[str] | None, help="several captions; by default the data's")
    parser.add_argument("--dtype", default="float16", help="latents are stored in")
    parser.add_argument("--min_side", type=int | None, help="smaller images are left out; by default those to enlarge")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="larger images are left out")
    parser.add_argument("--keep_images", type=int | None, help="JPEG quality of a copy of each image, for REPA")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a call of the codec")
    parser.add_argument("--rows_per_shard", type=int, default=10_000, help="rows of the source in one file")
    parser.add_argument("--num_workers", type=int, default=8, help="processes of each rank that decode")
    parser.add_argument("--seed", type=int, default=0, help="of codecs that draw their latents")
    add_trainer_arguments(parser)
    return parser


def precompute(argv: list[str]) -> None:
    """Encode a source's images once: Arrow shards, a manifest that training checks, and a list of rejects."""
    parser = precompute_parser()
    args = parser.parse_args(argv)
    built = instantiate(parser, args)
    data, codec = built.data, built.codec
    if codec is None:
        raise ValueError(
            "No codec is named: give one of experiments/precompute, e.g. -c experiments/precompute/dcae_512.yaml."
        )
    if "image" not in data.columns:
        raise ValueError("The data section names no image_column, and latents are made of images.")
    settings = Settings(
        resolution=args.resolution,
        image_column=data.columns["image"],
        caption_columns=tuple(args.caption_columns or data.caption_columns),
        buckets=built.buckets,
        **{
            name: getattr(args, name)
            for name in ("dtype", "min_side", "max_pixels", "keep_images", "batch_size", "seed", "rows_per_shard")
        },
    )
    source = {
        "source": data.source,
        "split": data.split,
        "data_files": data.data_files,
        "revision": data.revision,
        "licence": data.licence,
        "card": data.card,
    }

    def work(device: torch.device, rank: int, world: int) -> None:
        rows = data.source_rows()
        progress = None if rank else counter("rows of rank 0")
        common = dict(rank=rank, world=world, device=device, num_workers=args.num_workers, progress=progress)
        manifest = precompute_rows(rows, source, codec, args.out, settings, built.text, built.vision, **common)
        if manifest is not None and (rank == 0 or world > 1):
            report(manifest, Path(args.out))

    on_all_ranks(dict(args.trainer), work)


def report(manifest: dict, out: Path) -> None:
    """Said by the rank that ended last; by several, if they ended together."""
    counts = manifest["counts"]
    left_out = sum(counts["rejected"].values())
    print(
        f"{counts['samples']:,} samples of {counts['rows']:,} rows in {len(manifest['shards'])} shards: {out}",
        flush=True,
    )
    if left_out:
        print(
            f"{left_out:,} rows left out, listed in {out}/rejects.jsonl: {json.dumps(counts['rejected'])}", flush=True
        )
