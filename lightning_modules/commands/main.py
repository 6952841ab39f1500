"""The `emmdit` command: dispatch, and the small subcommands."""

from __future__ import annotations

import argparse
import os
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from emmdit.files import grid, save_png
from lightning_modules.commands.config_errors import sentence
from lightning_modules.commands.evaluate import evaluate
from lightning_modules.commands.fit import SuiteCLI, quiet
from lightning_modules.commands.generate_dataset import generate_dataset
from lightning_modules.commands.inspect_data import inspect_data
from lightning_modules.commands.load_model import DTYPES, nitro_e_pipeline
from lightning_modules.commands.model_card import write_card
from lightning_modules.commands.precompute import precompute
from lightning_modules.commands.reference_stats import reference_stats
from lightning_modules.runs import load_pipeline


def sample(argv: list[str]) -> None:
    """Pictures from a run folder, a checkpoint or an exported folder."""
    parser = argparse.ArgumentParser("emmdit sample", description=sample.__doc__)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, or folder made by `emmdit export`")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=Path, help="text file with a prompt in each line")
    parser.add_argument("--out", required=True, type=Path, help="folder for the PNG files and grid.png")
    parser.add_argument("--num-images", type=int, default=1, help="pictures for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler", choices=("euler", "heun", "dpm_solver"))
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a checkpoint; the average by default")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--columns", type=int, default=4, help="of the grid")
    parser.add_argument("--scale", type=int, default=1, help="enlargement of the grid's pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the denoiser")
    args = parser.parse_args(argv)

    prompts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise FileNotFoundError(f"There is no prompt file {args.prompts}.")
        prompts += [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError("Nothing to draw: give --prompt or --prompts.")
    if args.num_images < 1 or args.batch_size < 1:
        raise ValueError("--num-images and --batch-size must be at least 1.")
    pipeline, note = load_pipeline(args.ckpt, args.weights)
    pipeline.transformer.to(args.device, DTYPES[args.dtype])
    prompts = [prompt for prompt in prompts for _ in range(args.num_images)]
    sampling = pipeline.sampling.replace(
        **{
            key: value
            for key in ("steps", "guidance", "sampler", "height", "width")
            if (value := getattr(args, key)) is not None
        }
    )
    images, started = [], time.perf_counter()
    for first in range(0, len(prompts), args.batch_size):
        chunk = prompts[first : first + args.batch_size]
        seeds = [args.seed + first + i for i in range(len(chunk))]
        made = pipeline(
            chunk,
            seed=seeds,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            height=sampling.height,
            width=sampling.width,
            sampler=sampling.sampler,
        ).images
        for prompt, seed, image in zip(chunk, seeds, made, strict=True):
            settings = {"prompt": prompt, "seed": seed, "dtype": args.dtype, **vars(sampling), **note}
            save_png(image, args.out / f"{len(images):05d}.png", settings)
            images.append(image)
        print(f"{len(images)}/{len(prompts)} pictures", file=sys.stderr)
    seconds = time.perf_counter() - started
    save_png(
        grid(images, args.columns, args.scale),
        args.out / "grid.png",
        {"prompts": prompts, **vars(sampling), **note},
    )
    print(f"{len(images)} pictures in {seconds:.1f} s: {args.out}/grid.png")


def export(argv: list[str]) -> None:
    """Write a checkpoint's weights as a diffusers folder that EMMDiTPipeline.from_pretrained loads."""
    parser = argparse.ArgumentParser("emmdit export", description=export.__doc__)
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--weights", choices=("ema", "raw"), help="the average by default")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--include-encoders",
        action="store_true",
        help="copy pretrained text encoder and autoencoder into the folder (their licences go with them); otherwise "
        "they are named and loaded from where training found them",
    )
    args = parser.parse_args(argv)
    _refuse_used(args.out)
    pipeline, note = load_pipeline(args.ckpt, args.weights, include_encoders=args.include_encoders)
    pipeline.transformer.to(DTYPES[args.dtype])
    pipeline.save_pretrained(args.out)
    write_card(args.out, args.ckpt, pipeline, note, args.dtype)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    print(f"{note['weights']} weights, {parameters:,} parameters, {args.dtype}: {args.out}")


def import_nitro_e(argv: list[str]) -> None:
    """Turn a released Nitro-E .safetensors file into a diffusers folder."""
    parser = argparse.ArgumentParser("emmdit import-nitro-e", description=import_nitro_e.__doc__)
    parser.add_argument("file", type=Path, help="downloaded from the model's page (amd/Nitro-E)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--resolution", type=int, choices=(512, 1024), default=512)
    parser.add_argument("--steps", type=int, default=20, help="default of the pipeline (4 for the distilled files)")
    parser.add_argument(
        "--guidance", type=float, default=4.5, help="default of the pipeline (0 for the distilled files)"
    )
    parser.add_argument("--text-encoder", default="meta-llama/Llama-3.2-1B", help="folder or hub id (gated; see docs)")
    parser.add_argument("--autoencoder", default="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", help="folder or hub id")
    args = parser.parse_args(argv)
    _refuse_used(args.out)
    pipeline, _ = nitro_e_pipeline(
        args.file, args.resolution, args.steps, args.guidance, args.text_encoder, args.autoencoder
    )
    pipeline.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in pipeline.transformer.parameters()):,} parameters: {args.out}")
    print("The text encoder and the autoencoder are loaded at first use; their licences are their makers'.")


def _refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another --out or remove it.")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "sample": sample,
    "export": export,
    "import-nitro-e": import_nitro_e,
    "evaluate": evaluate,
    "reference-stats": reference_stats,
    "precompute": precompute,
    "generate-dataset": generate_dataset,
    "inspect-data": inspect_data,
}


USAGE = """usage: emmdit COMMAND [options]

commands:
  fit              train:       emmdit fit -c experiments/quickstart.yaml
  validate         validation loss of a checkpoint
  sample           pictures:    emmdit sample --ckpt assets/shapes_emmdit --prompt "a photo of a red circle" --out out
  export           a checkpoint as a diffusers folder that EMMDiTPipeline.from_pretrained loads
  import-nitro-e   a released Nitro-E .safetensors file as such a folder
  evaluate         FID, CLIP score, GenEval: emmdit evaluate --ckpt RUN -c experiments/evaluation/shapes.yaml
  reference-stats  statistics of real images, which FID and its kin compare with
  precompute       images to latents on disk: emmdit precompute -c experiments/data/pd12m.yaml \\
                   -c experiments/precompute/dcae_512.yaml -c experiments/trainer/ddp_8gpu.yaml --out latents/pd12m
  generate-dataset pictures for a list of prompts, by any text-to-image pipeline, as a data set
  inspect-data     sizes, caption lengths, buckets, bad rows and a contact sheet of any source or latents folder

`emmdit COMMAND --help` tells more. Several -c files are laid over each other, the later ones win.
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command; errors a user can mend end in one sentence and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    quiet()
    command = argv[0]
    try:
        if command in COMMANDS:
            COMMANDS[command](argv[1:])
        elif command in SuiteCLI.subcommands():
            SuiteCLI(args=argv, exit_on_error=False)
        else:
            raise ValueError(f"There is no command {command!r}: emmdit --help lists them.")
    except (ArgumentError, MisconfigurationException, ValueError, OSError) as error:
        if os.environ.get("EMMDIT_TRACEBACK"):
            raise
        print(f"emmdit {command}: {sentence(error)}\n(EMMDIT_TRACEBACK=1 shows where.)", file=sys.stderr)
        sys.exit(2)
