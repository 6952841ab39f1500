"""Command `emmdit precompute`: a source of captioned images to latents on disk, on all ranks."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from jsonargparse import ActionConfigFile, ArgumentParser

from datamodules import CaptionedImagesDataModule
from emmdit.data.precompute.precompute import Settings
from emmdit.data.precompute.precompute import precompute as precompute_rows
from emmdit.encoders.base import ImageCodec, TextConditioner, VisionFeatures
from emmdit.files import check_folder
from lightning_modules.commands.distributed import add_trainer_arguments, on_all_ranks
from lightning_modules.commands.progress import counter
from lightning_modules.runs import instantiate


def precompute_parser() -> ArgumentParser:
    parser = ArgumentParser("emmdit precompute", description=precompute.__doc__, exit_on_error=False)
    use = "files of experiments/data, then experiments/precompute and experiments/trainer"
    parser.add_argument("-c", "--config", action=ActionConfigFile, help=use)
    parser.add_subclass_arguments(CaptionedImagesDataModule, "data", required=True, help="the source")
    parser.add_argument("--codec", type=ImageCodec, help="autoencoder that encodes the images")
    parser.add_argument("--text", type=TextConditioner | None, help="stores text features, too: 512 KiB a sample")
    parser.add_argument("--vision", type=VisionFeatures | None, help="stores vision features, too: 384 KiB a sample")
    parser.add_argument("--out", required=True, help="folder of the result; rerun with the same folder to resume")
    parser.add_class_arguments(Settings, skip={"image_column", "caption_columns"})
    parser.add_argument("--caption_columns", type=list[str] | None, help="several captions; by default the data's")
    parser.add_argument("--num_workers", type=int, default=8, help="processes of each rank that decode images")
    add_trainer_arguments(parser)
    return parser


def precompute(argv: list[str]) -> None:
    """Encode a source's images once: Arrow shards, a manifest that training checks, and a list of rejects."""
    parser = precompute_parser()
    args = parser.parse_args(argv)
    check_folder(args.out)
    if args.num_workers < 0:
        raise ValueError(f"--num_workers must be at least 0, got {args.num_workers}.")
    built = instantiate(parser, args)
    data, codec = built.data, built.codec
    if codec is None:
        raise ValueError(
            "No codec is named: give one of experiments/precompute, e.g. -c experiments/precompute/dcae_512.yaml."
        )
    if "image" not in data.columns:
        raise ValueError("The data section names no image_column, and latents are made of images.")
    chosen = {field.name: built[field.name] for field in fields(Settings) if field.name in built}
    captions = tuple(args.caption_columns or data.caption_columns)
    settings = Settings(**chosen | {"image_column": data.columns["image"], "caption_columns": captions})
    names = ("source", "split", "data_files", "revision", "license", "card")
    source = {name: getattr(data, name) for name in names}

    def work(device: torch.device, rank: int, world: int) -> None:
        rows = data.source_rows()
        progress = None if rank else counter("rows of rank 0")
        common = dict(rank=rank, world=world, device=device, num_workers=args.num_workers, progress=progress)
        manifest = precompute_rows(rows, source, codec, args.out, settings, built.text, built.vision, **common)
        if manifest is not None and (rank == 0 or world > 1):
            report(manifest, Path(args.out))

    on_all_ranks(dict(args.trainer), work)


def report(manifest: dict, out: Path) -> None:
    """Printed by the rank that ends last; by several, if they end together."""
    counts, shards = manifest["counts"], len(manifest["shards"])
    print(f"{counts['samples']:,} samples of {counts['rows']:,} rows in {shards} shards: {out}", flush=True)
    if rejected := sum(counts["rejected"].values()):
        reasons = json.dumps(counts["rejected"])
        print(f"{rejected:,} rows rejected, listed in {out}/rejects.jsonl: {reasons}", flush=True)
