"""`emmdit sample`: images for prompts, as PNG files and a grid."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from PIL import Image

from emmdit.files import check_folder, grid, save_png, to_uint8
from lightning_modules.commands.options import (
    DTYPES,
    LARGEST_SEED,
    RELEASED,
    SAMPLING,
    add_released_arguments,
    add_sampling_arguments,
    add_trust_argument,
    check_options,
    command_parser,
    given,
)
from lightning_modules.commands.progress import counter


def sample(argv: list[str]) -> None:
    """Generate images with a run folder, a checkpoint, an export, a diffusers pipeline or a released Nitro-E file."""
    args = sample_parser().parse_args(argv)
    check_options(args)
    prompts = [*args.prompt, *(read_prompt_file(Path(args.prompts)) if args.prompts is not None else ())]
    if not prompts:
        raise ValueError("No prompt is given: use --prompt or --prompts.")
    if args.seed + len(prompts) * args.num_images > LARGEST_SEED:
        raise ValueError(f"--seed {args.seed} is too large for so many images: seeds end at {LARGEST_SEED:,}.")
    check_folder(args.out)
    from emmdit.generate import check_finite  # these take seconds: --help and errors need not wait
    from lightning_modules.commands.load_model import open_model

    how = {"hashed": False, "trust_code": args.trust_code, **given(args, RELEASED)}
    model = open_model(args.ckpt, args.weights, given(args, SAMPLING), **how)
    model.to(torch.device(args.device), args.dtype)
    prompts = [prompt for prompt in prompts for _ in range(args.num_images)]
    settings = {"dtype": args.dtype, **model.sampling, **model.source}
    out, progress, started = Path(args.out), counter("images"), time.perf_counter()
    images: list[Image.Image] = []
    for first in range(0, len(prompts), args.batch_size):
        chunk = prompts[first : first + args.batch_size]
        seeds = [args.seed + first + i for i in range(len(chunk))]
        made = check_finite(model.generate(chunk, seeds), chunk, seeds)
        for prompt, seed, image in zip(chunk, seeds, to_uint8(made), strict=True):
            name = out / f"{len(images):05d}.png"
            images.append(Image.fromarray(image))
            write_image(images[-1], name, {"prompt": prompt, "seed": seed, **settings})
        progress(len(images), len(prompts))
    seconds = time.perf_counter() - started
    write_image(grid(images, args.columns, args.scale), out / "grid.png", {"prompts": prompts, **settings})
    print(f"{len(images)} images in {seconds:.1f} s: {out}/grid.png")


def write_image(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """`save_png` with an OSError of one sentence, such as on a full disk."""
    try:
        save_png(image, path, settings)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"{path} could not be written ({why}): make room, or choose another --out.") from error


def read_prompt_file(file: Path) -> list[str]:
    """One prompt per line, without empty lines. FileNotFoundError or ValueError names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no prompt file {file}.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"The prompt file {file} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"The prompt file {file} is empty: write one prompt per line.")
    return prompts


def sample_parser() -> ArgumentParser:
    parser = command_parser(sample)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, export, pipeline or Nitro-E file")
    parser.add_argument("--prompt", action="append", default=[], help="text of an image; may be given several times")
    parser.add_argument("--prompts", help="text file with one prompt per line")
    parser.add_argument("--out", required=True, help="folder for the PNG files and grid.png")
    parser.add_argument("--num_images", type=int, default=1, help="images per prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; image i uses seed + i")
    add_released_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--weights", choices=("ema", "raw"), help="weights of a checkpoint; EMA if available")
    parser.add_argument("--batch_size", type=int, default=16, help="images per forward pass")
    parser.add_argument("--columns", type=int, default=4, help="images per row of the grid")
    parser.add_argument("--scale", type=int, default=1, help="factor by which the images of the grid are enlarged")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the denoiser's weights")
    add_trust_argument(parser)
    return parser
