"""Command `emmdit inspect-data`: a source, an experiment's data or a latents folder as text, JSON and contact sheet."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentParser
from torch.utils.data import DataLoader

from datamodules import CaptionedImagesDataModule, LatentsDataModule, TextImageDataModule
from emmdit.config_text import read_yaml
from emmdit.data import inspect
from emmdit.data.buckets import Buckets
from emmdit.data.images import MAX_PIXELS
from emmdit.data.precompute.job import TEXT
from emmdit.data.precompute.manifest import KIND
from emmdit.data.precompute.precompute import Item
from emmdit.data.readers.open import open_source
from emmdit.encoders.loading import load_tokenizer
from emmdit.files import check_folder, read_json, save_png, to_uint8
from lightning_modules.commands.progress import counter
from lightning_modules.runs import instantiate

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "txt", "text", "prompt")
SIDE = 160
MANY = 1 << 31
BOUNDS = {name: (1, MANY) for name in ("limit", "min_side", "max_pixels", "bucket_step", "max_length")}
BOUNDS |= {"resolution": (1, 9_459), "sample": (0, MANY), "images": (0, 1_000), "num_workers": (0, 1_000)}


def inspect_data(argv: list[str]) -> None:
    """Inspect data before training: counts, sizes, caption lengths, buckets, rejected rows, a contact sheet."""
    parser = argparse.ArgumentParser("emmdit inspect-data", description=inspect_data.__doc__, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[], help="file of experiments/data, or experiment")
    parser.add_argument("--source", help="in place of files: folder, file, glob or hub id")
    parser.add_argument("--image_column", help="with --source; by default found by its name")
    parser.add_argument("--caption_column", help="with --source; by default found by its name")
    parser.add_argument("--out", required=True, type=Path, help="folder for report.json and sheet.png")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--sample", type=int, default=2000, help="random rows of them, chosen by --seed; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, help="in pixels; by default the data's")
    parser.add_argument("--min_side", type=int, help="in pixels: smaller images are rejected; default: the resolution")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="larger images are rejected")
    parser.add_argument("--bucket_step", type=int, help="crop to buckets of this step, in pixels, not to the square")
    parser.add_argument("--tokenizer", help="folder or hub id; by default the experiment's, else words are counted")
    parser.add_argument("--max_length", type=int, help="with --tokenizer: captions are cut to so many tokens")
    parser.add_argument("--images", type=int, default=24, help="on the contact sheet")
    parser.add_argument("--decode", action="store_true", help="decode latents without images by the experiment's codec")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--device", default="cpu", help="of --decode")
    args, more = parser.parse_known_args(argv)
    if (args.source is None) == (not args.config):
        parser.error("give either --source or -c files")
    if args.source is not None and more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    for name, (least, most) in BOUNDS.items():
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            raise ValueError(f"--{name} must be from {least} to {most:,}, got {value}.")
    check_folder(args.out)

    data, module = (open_any(args), None) if args.source is not None else from_files(args.config, more)
    for name, part in data.parts().items():
        inspect_part(part, args.out / name, tokenizers(module, args), getattr(module, "codec", None), args)


def from_files(files: list[str], more: list[str]) -> tuple[TextImageDataModule, Any]:
    """The data module and, where the files are an experiment, its training module without a network."""
    arguments = [part for file in files for part in ("-c", file)] + more
    if any(argument.startswith("--model") for argument in more) or any(map(_has_model, files)):
        from lightning_modules.commands.fit import SuiteCLI

        for name in ("lightning.pytorch", "lightning.fabric"):  # nothing is trained: no words on seeds and devices
            logging.getLogger(name).setLevel(logging.WARNING)
        with TemporaryDirectory() as folder:  # one process on the CPU, whatever the trainer's files say
            trainer = ["accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto", f"default_root_dir={folder}"]
            arguments += [f"--trainer.{argument}" for argument in trainer]
            run = SuiteCLI(args=arguments, run=False, exit_on_error=False)
        return run.datamodule, run.model
    parser = ArgumentParser("emmdit inspect-data", exit_on_error=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_subclass_arguments(TextImageDataModule, "data", required=True)
    return instantiate(parser, parser.parse_args(arguments)).data, None


def _has_model(file: str) -> bool:
    try:
        return not {"model", "base"}.isdisjoint(read_yaml(file))
    except (OSError, ValueError):
        return False  # the parser says what is wrong with it


def open_any(args: argparse.Namespace) -> TextImageDataModule:
    manifest = Path(args.source).expanduser() / "manifest.json"
    if manifest.is_file() and isinstance(about := read_json(manifest), dict) and about.get("kind") == KIND:
        return LatentsDataModule(args.source)
    names = open_source(args.source).column_names
    image = args.image_column or next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])
    caption = args.caption_column or next((name for name in CAPTION_COLUMNS if name in names), CAPTION_COLUMNS[0])
    return CaptionedImagesDataModule(args.source, image, caption)


def tokenizers(module: Any, args: argparse.Namespace) -> list[inspect.Tokenizer]:
    """--tokenizer's, or those of the experiment's text encoders; else words."""
    if args.tokenizer is not None:
        return [_tokenizer(args.tokenizer, load_tokenizer(args.tokenizer), args.max_length)]
    text = getattr(module, "text", None)
    if text is None:
        return [inspect.WORDS]
    try:
        return [
            _tokenizer(getattr(part, "source", type(part).__name__), part.tokenizer, part.max_length)
            for part in getattr(text, "encoders", None) or [text]
        ]
    except (ValueError, OSError) as error:
        print(f"emmdit inspect-data: captions are counted in words: {error}", file=sys.stderr)
        return [inspect.WORDS]


def _tokenizer(name: str, tokenizer: Any, max_length: int | None) -> inspect.Tokenizer:
    def lengths(captions: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]

    return f"tokens of {name}", lengths, max_length


def inspect_part(
    data: TextImageDataModule, out: Path, tokenizers: list[inspect.Tokenizer], codec: Any, args: argparse.Namespace
) -> None:
    """Report and contact sheet of one source into `out`."""
    buckets = None if args.bucket_step is None else Buckets(args.bucket_step)
    found = data.inspected(args.resolution, min_side=args.min_side, max_pixels=args.max_pixels, buckets=buckets)
    numbers = inspect.chosen_rows(len(found.items), args.limit, args.sample or None, args.seed)
    shown = numbers[:: max(1, len(numbers) // max(1, args.images))][: args.images]
    items = inspect.Thumbnails(found.items, shown, SIDE)
    loader = DataLoader(items, batch_size=None, sampler=numbers, num_workers=args.num_workers)
    report, kept = inspect.summary(_counted(loader, len(numbers)), tokenizers, found.resolution, found.buckets)
    kept = [item for item in kept if item.row in set(shown)]
    if found.latents is not None:
        known, latents = inspect.latents_summary(found.latents, shown)
        report["rejected"] = known.pop("rejected") | report["rejected"]
        report["rejects"] = known.pop("rejects") + report["rejects"]
        report |= known
        if args.decode and codec is not None and not any(item.pixels is not None for item in kept):
            kept = [found.items[number] for number in shown]
            for item, tensor in zip(kept, latents, strict=True):
                with torch.no_grad():
                    images = codec.to(args.device).decode(tensor[None].to(args.device))
                item.pixels = inspect.thumbnail(to_uint8(images)[0], SIDE)
    about = {"source": data.source, "license": data.license, "card": data.card} | found.about
    looked = {"rows": len(found.items), "inspected": len(numbers), "limit": args.limit, "sample": args.sample}
    report = about | looked | {"seed": args.seed} | report

    out.mkdir(parents=True, exist_ok=True)
    text = inspect.as_text(report)
    print(text, flush=True)
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", **TEXT)
    if any(item.pixels is not None for item in kept):
        save_png(inspect.contact_sheet(kept, SIDE), out / "sheet.png", {"shown": [item.row for item in kept], **about})
    elif args.images:
        way = "; --decode decodes its latents, with -c of its experiment" * (found.latents is not None)
        print(f"No contact sheet: there are no images in it{way}.")
    print(f"written: {out}", flush=True)


def _counted(loader: DataLoader, total: int) -> Iterator[Item]:
    progress = counter("rows inspected")
    for done, item in enumerate(loader, 1):
        progress(done, total)
        yield item
