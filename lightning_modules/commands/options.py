"""Command-line pieces that the subcommands share: parser, options left unset, output folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

DTYPES = ("float32", "bfloat16", "float16")
SAMPLERS = ("euler", "heun", "dpm_solver")
SAMPLING = ("steps", "guidance", "sampler", "height", "width")
RELEASED = ("resolution", "text_encoder", "autoencoder")


def command_parser(command: Callable[[list[str]], None]) -> ArgumentParser:
    """Parser of `emmdit COMMAND`: name and description come from the function, errors are raised, not printed."""
    name = command.__name__.replace("_", "-")
    return ArgumentParser(f"emmdit {name}", description=command.__doc__, exit_on_error=False, allow_abbrev=False)


def add_sampling_arguments(parser: ArgumentParser) -> None:
    """The options of `SAMPLING`, by default the model's own."""
    parser.add_argument("--steps", type=int, help="sampling steps; like the next four, the model's own by default")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 turns it off")
    parser.add_argument("--sampler", choices=SAMPLERS, help="integrator of the sampling ODE")
    parser.add_argument("--height", type=int, help="image height in pixels")
    parser.add_argument("--width", type=int, help="image width in pixels")


def add_released_arguments(parser: ArgumentParser) -> None:
    """The options of `RELEASED`: what a released Nitro-E file does not say about itself."""
    parser.add_argument("--resolution", type=int, choices=(512, 1024), help="pixels, of a Nitro-E file; 512 by default")
    parser.add_argument("--text_encoder", help="of a Nitro-E file: folder or hub id in place of the published one")
    parser.add_argument("--autoencoder", help="of a Nitro-E file: folder or hub id in place of the published one")


def add_trust_argument(parser: ArgumentParser) -> None:
    help_ = "let a run's config name classes of any package, which runs their code; do it for runs you trust"
    parser.add_argument("--trust_code", action="store_true", help=help_)


def given(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the named options that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def refuse_used(folder: Path) -> None:
    """Raise a ValueError unless `folder` is empty or not there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another --out or remove it.")
