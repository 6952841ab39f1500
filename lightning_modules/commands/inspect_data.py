"""`emmdit inspect-data`: what a source, an experiment's data or a latents folder holds, as text, JSON and pictures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from torch.utils.data import DataLoader

from datamodules import HubDataModule, LatentsDataModule, MixtureDataModule, TextImageDataModule
from emmdit.data.buckets import Buckets
from emmdit.data.images import MAX_PIXELS
from emmdit.data.inspect import (
    WORDS,
    EncodedItems,
    Looks,
    SampleItems,
    Tokens,
    chosen_rows,
    made_buckets,
    source_items,
    summary,
    thumbnail,
)
from emmdit.data.precompute.manifest import KIND
from emmdit.data.precompute.precompute import Item
from emmdit.data.readers.open import fingerprint, open_source
from emmdit.data.show import as_text, charts, contact_sheet
from emmdit.encoders.loading import load_tokenizer
from emmdit.files import save_png, to_uint8
from lightning_modules.commands.counter import counter
from lightning_modules.runs import instantiate

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "txt", "text", "prompt")
SIDE = 160


def inspect_data(argv: list[str]) -> None:
    """Look at data before training on them: counts, sizes, caption lengths, buckets, rows left out, a contact sheet."""
    parser = argparse.ArgumentParser("emmdit inspect-data", description=inspect_data.__doc__, allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", action="append", default=[], help="a file of experiments/data, or an experiment"
    )
    parser.add_argument("--source", help="in place of files: folder, file, glob or hub id")
    parser.add_argument("--image_column", help="with --source; by default found by its name")
    parser.add_argument("--caption_column", help="with --source; by default found by its name")
    parser.add_argument("--out", required=True, type=Path, help="folder for report.json, report.txt and the PNG files")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--sample", type=int, default=2000, help="so many rows of them, drawn by --seed; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, help="in pixels; by default the data's")
    parser.add_argument("--min_side", type=int, help="smaller images are left out; by default the resolution")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="larger images are left out")
    parser.add_argument(
        "--bucket_step", type=int, help="crop to buckets of this step in place of the square, in pixels"
    )
    parser.add_argument("--tokenizer", help="folder or hub id; by default the experiment's, else words are counted")
    parser.add_argument("--max_length", type=int, help="with --tokenizer: captions are cut to so many tokens")
    parser.add_argument("--pictures", type=int, default=24, help="on the contact sheet")
    parser.add_argument("--decode", action="store_true", help="draw latents without pictures by the experiment's codec")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--device", default="cpu", help="of --decode")
    args, more = parser.parse_known_args(argv)
    if (args.source is None) == (not args.config):
        parser.error("give either --source or -c files")
    if args.source is not None and more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    for name in ("limit", "sample", "pictures", "bucket_step"):
        if (value := getattr(args, name)) is not None and value < (name in ("limit", "bucket_step")):
            raise ValueError(f"--{name} must not be {value}.")

    data, module = (open_any(args), None) if args.source is not None else from_files(args.config, more)
    tokens = [WORDS] if args.tokenizer is None else [tokens_of(load_tokenizer(args.tokenizer), args)]
    if args.tokenizer is None and getattr(module, "text", None) is not None:
        try:
            encoders = getattr(module.text, "encoders", None) or [module.text]
            tokens = [tokens_of(encoder.tokenizer, encoder) for encoder in encoders]
        except (ValueError, OSError) as error:
            print(f"emmdit inspect-data: captions are counted in words: {error}", file=sys.stderr)
    parts = data.sources if isinstance(data, MixtureDataModule) else {"": data}
    for name, part in parts.items():
        look_at(part, args.out / name, tokens, getattr(module, "codec", None), args)


def from_files(files: list[str], more: list[str]) -> tuple[TextImageDataModule, Any]:
    """The data module and, where the files are an experiment, its training module without a network."""
    arguments = [part for file in files for part in ("-c", file)] + more
    if any(argument.startswith("--model") for argument in more) or any(map(_has_model, files)):
        from lightning_modules.commands.fit import SuiteCLI

        for name in ("lightning.pytorch", "lightning.fabric"):  # nothing is trained: not a word of seeds and devices
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
        return not {"model", "base"}.isdisjoint(yaml.safe_load(Path(file).read_text()) or {})
    except (OSError, yaml.YAMLError):
        return False  # the parser says what is wrong with it


def open_any(args: argparse.Namespace) -> TextImageDataModule:
    manifest = Path(args.source).expanduser() / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("kind") == KIND:
        return LatentsDataModule(args.source)
    names = open_source(args.source).column_names
    image = args.image_column or next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])
    caption = args.caption_column or next((name for name in CAPTION_COLUMNS if name in names), CAPTION_COLUMNS[0])
    return HubDataModule(args.source, image, caption)


def tokens_of(tokenizer: Any, about: Any) -> Tokens:
    """`about` has `max_length` (None: captions are not cut)."""

    def lengths(captions: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]

    name = getattr(about, "tokenizer", None)
    name = name if isinstance(name, str) else getattr(about, "source", type(about).__name__)
    return Tokens(f"tokens of {name}", lengths, about.max_length)


def look_at(data: TextImageDataModule, out: Path, tokens: list[Tokens], codec: Any, args: argparse.Namespace) -> None:
    """Report, contact sheet and charts of one source into `out`."""
    resolution = args.resolution or getattr(data, "resolution", None)
    buckets = getattr(data, "buckets", None) if args.bucket_step is None else Buckets(args.bucket_step)
    about = {"source": data.source, "licence": data.licence, "card": data.card}
    if isinstance(data, LatentsDataModule):
        items: Any = EncodedItems(data.source)
        manifest, count = items.manifest, len(items)
        about |= {name: data.provenance()[name] for name in ("source", "licence", "card")}
        about |= {"kind": f"{len(manifest['shards'])} shards of latents", "rows": count}
        made = {"class_path": "?", "source": "", "weights_sha256": "?"} | manifest["codec"]
        about["encoder"] = f"{made['class_path']} {made['source']}, weights {made['weights_sha256'][:12]}"
    elif isinstance(data, HubDataModule):
        rows = data.rows()
        count = len(rows)
        if "image" in data.columns:
            settings = {"min_side": args.min_side, "max_pixels": args.max_pixels, "buckets": buckets}
            items = source_items(rows, data.columns["image"], data.caption_columns, resolution, **settings)
        else:
            items = SampleItems(data._part(0, None))
        about |= {"kind": type(rows).__name__, "rows": count, "fingerprint": fingerprint(rows)}
        about["columns"] = ", ".join(rows.column_names)
    else:
        items = SampleItems(data.train_dataset())
        count = len(items)
        about |= {"kind": type(data).__name__, "rows": count}

    numbers = chosen_rows(count, args.limit, args.sample or None, args.seed)
    shown = numbers[:: max(1, len(numbers) // max(1, args.pictures))][: args.pictures]
    loader = DataLoader(
        Looks(items, shown, SIDE), None, sampler=numbers, num_workers=args.num_workers, collate_fn=_same
    )
    found, kept = summary(_counted(loader, len(numbers)), tokens, resolution or 512, buckets)
    report = about | {"looked_at": len(numbers), "limit": args.limit, "sample": args.sample, "seed": args.seed} | found
    if isinstance(data, LatentsDataModule):
        kept = encoded(report, items, shown, kept, codec if args.decode else None, args.device)
    elif resolution is None:
        report["buckets"] = None

    out.mkdir(parents=True, exist_ok=True)
    text = as_text(report)
    print(text, flush=True)
    (out / "report.txt").write_text(text + "\n")
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    charts(report, out / "charts.png")
    kept = [item for item in kept if item.row in set(shown)]
    if any(item.pixels is not None for item in kept):
        save_png(contact_sheet(kept, SIDE), out / "sheet.png", {"shown": [item.row for item in kept], **about})
    elif args.pictures:
        way = "; --decode draws its latents, with -c of its experiment" * isinstance(data, LatentsDataModule)
        print(f"No contact sheet: there are no pictures in it{way}.")
    print(f"written: {out}", flush=True)


def encoded(
    report: dict[str, Any], items: EncodedItems, shown: list[int], kept: list[Item], codec: Any, device: str
) -> list[Item]:
    """What a precomputed folder knows beside its samples: rejects, sizes as encoded, statistics of the latents."""
    manifest, samples = items.manifest, items.samples
    report["rejected"] = {**manifest["counts"]["rejected"], **report["rejected"]}
    listed = (samples.folder / "rejects.jsonl").read_text(encoding="utf-8")
    report["rejects"] = [json.loads(line) for line in listed.splitlines()[:1000]] + report["rejects"]
    report["buckets"] = made_buckets(samples.sizes, np.asarray(samples.buckets()), manifest["resolution"])
    latents = [sample["latents"] for sample in samples.__getitems__(shown)] if shown else []
    if latents:
        values = torch.cat([tensor.flatten() for tensor in latents])
        report["latents"] = {"shape": list(latents[0].shape), "dtype": manifest["columns"]["latents"]["dtype"]}
        report["latents"] |= {"samples": len(latents), "mean": values.mean().item(), "std": values.std().item()}
    if codec is None or any(item.pixels is not None for item in kept):
        return kept
    codec.to(device)
    drawn = []
    for number, tensor in zip(shown, latents, strict=True):
        item = items[number]
        with torch.no_grad():
            item.pixels = thumbnail(to_uint8(codec.decode(tensor[None].to(device)))[0], SIDE)
        drawn.append(item)
    return drawn


def _same(item: Item) -> Item:
    return item


def _counted(loader: DataLoader, total: int) -> Any:
    progress = counter("rows looked at")
    for done, item in enumerate(loader, 1):
        progress(done, total)
        yield item
