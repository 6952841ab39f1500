"""Command-line pieces that the subcommands share: parser, options left unset, output folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
SAMPLERS = ("euler", "heun", "dpm_solver")
SAMPLING = ("steps", "guidance", "sampler", "height", "width")
RELEASED = ("resolution", "text_encoder", "autoencoder")
LARGEST_SEED = 2**32 - 1
# The least and greatest value of each whole number on the command line; `Sampling` knows those of its own fields.
BOUNDS = {
    **dict(resolution=(1, 16384), columns=(1, 10_000), scale=(1, 64), seed=(0, LARGEST_SEED), quality=(1, 100)),
    **dict(num_images=(1, 1_000_000), batch_size=(1, 100_000), per_task=(1, 100_000), unseen=(0, 100_000)),
    **dict.fromkeys(("num", "shapes", "rows_per_shard"), (1, 10**9)),
}


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


def check_options(args: Namespace) -> None:
    """Raise a ValueError that names the first option with a value that no command can use, before anything is loaded.

    A `--device` must be one that this machine has.
    """
    for name, (least, greatest) in BOUNDS.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= greatest:
            raise ValueError(f"--{name} {value}: give a whole number from {least:,} to {greatest:,}.")
    if getattr(args, "out", None) == "":
        raise ValueError("--out is empty: name a folder.")
    sampling = {name: args[name] for name in SAMPLING if args.get(name) is not None}
    if sampling:
        from emmdit.generate import Sampling  # takes seconds: --help need not wait

        Sampling(**sampling)
    if getattr(args, "device", None) is not None:
        find_device(args.device)


def find_device(name: str) -> torch.device:
    """The device of this name. Raises ValueError with one sentence where this machine has none such."""
    import torch  # takes seconds: --help need not wait

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"--device {name} is no device: use cpu, cuda, or cuda:1.") from error
    found = torch.accelerator.current_accelerator(check_available=True)
    if device.type == "cpu":
        return torch.device("cpu")
    if found is None or device.type != found.type:
        what = "no GPU" if device.type == "cuda" else f"no {device.type}"
        raise ValueError(f"--device {name}: PyTorch sees {what} here; use --device {found.type if found else 'cpu'}.")
    if (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise ValueError(f"--device {name}: PyTorch sees {count} of them; use {device.type}:{count - 1}.")
    return device


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, which becomes `folder` when the block ends and is removed when it fails.

    Raises:
        ValueError: `folder` holds something, or cannot be made.
    """
    folder = Path(os.path.realpath(folder))  # where it is a link to nothing, that is made
    refuse_used(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        try:
            yield part
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{folder} could not be written ({str(error).splitlines()[0]}): nothing was left.") from error
        refuse_used(folder)
        os.replace(part, folder)  # also over an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_used(folder: Path) -> None:
    """Raise a ValueError unless `folder` is empty or not there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: choose another --out or remove it.")
    from emmdit.files import check_folder  # takes seconds: --help need not wait

    check_folder(folder)
