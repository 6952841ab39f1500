"""Command `emmdit generate-dataset`: prompts to a dataset of images, by any text-to-image pipeline, on all ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import ActionConfigFile, ArgumentParser

from emmdit.data.precompute.generate import WRITERS, Prompts, generate
from emmdit.files import check_folder
from lightning_modules.commands.distributed import add_trainer_arguments, on_all_ranks
from lightning_modules.commands.load_model import DTYPES, SETTINGS, open_model
from lightning_modules.commands.options import add_trust_argument, check_options
from lightning_modules.commands.precompute import report
from lightning_modules.commands.progress import counter
from lightning_modules.runs import instantiate


def generate_parser() -> ArgumentParser:
    parser = ArgumentParser("emmdit generate-dataset", description=generate_dataset.__doc__, exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a file with these options, a trainer's file")
    parser.add_argument("--model", required=True, help="run, export, folder of a diffusers pipeline, or hub id of one")
    parser.add_argument("--revision", type=str | None, help="of a hub id")
    parser.add_class_arguments(Prompts, "prompts", help="prompts of the images")
    parser.add_argument("--out", required=True, help="folder of the result; rerun with the same folder to resume")
    parser.add_argument("--steps", type=int | None, help="sampling; the model's own by default, as the next three")
    parser.add_argument("--guidance", type=float | None)
    parser.add_argument("--height", type=int | None)
    parser.add_argument("--width", type=int | None)
    parser.add_argument("--seed", type=int, default=0, help="seed of prompt 0; prompt i uses seed + i")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="type of the pipeline's weights")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs")
    parser.add_argument("--rows_per_shard", type=int, default=1000, help="prompts in one file")
    parser.add_argument("--format", choices=list(WRITERS), default="tar")
    add_trust_argument(parser)
    add_trainer_arguments(parser)
    return parser


def generate_dataset(argv: list[str]) -> None:
    """Generate an image for each prompt, as webdataset tars or parquet: a dataset to train on."""
    parser = generate_parser()
    args = parser.parse_args(argv)
    check_folder(args.out)
    check_options(args)
    prompts = instantiate(parser, args).prompts
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    options = {name: getattr(args, name) for name in ("seed", "batch_size", "quality", "rows_per_shard")}

    def work(device: torch.device, rank: int, world: int) -> None:
        model = open_model(args.model, settings=settings, revision=args.revision, trust_code=args.trust_code)
        model.to(device, args.dtype)
        made_with = {"model": model.source, "sampling": model.sampling, "dtype": args.dtype}
        common = dict(rank=rank, world=world, progress=None if rank else counter("prompts of rank 0"))
        manifest = generate(prompts, model.generate, args.out, made_with, kind=args.format, **options, **common)
        if manifest is not None:
            report(manifest, Path(args.out))

    on_all_ranks(dict(args.trainer), work)
