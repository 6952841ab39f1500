"""Checkpoints on disk: written whole or not at all, verified when read, and compared with what they are to go on in."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from emmdit.archive import unreadable
from emmdit.checkpoint_files import MANIFEST, stamp
from emmdit.weights import find_checkpoint, read_file, read_folder

# In the folder of the checkpoints, hidden: what a kill leaves there is replaced by the next save.
PART, OUTDATED = ".saving", ".deleting"
KEYS = ("state_dict", "global_step", "epoch", "loops", "pytorch-lightning_version")
FITTING = ("optimizer_states", "lr_schedulers")  # of a file; a sharded folder has optimizers as tensors


class LocalCheckpointIO(TorchCheckpointIO):
    """Lightning's, for local files: written beside their final name, synced and renamed; verified when read.

    Lightning itself stages checkpoints in the system's temporary folder. Paths with a protocol (s3://) stay its own.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with told(path):
            part = new_part(path)
            with part.open("w+b") as file:
                torch.save(checkpoint, file)
                stamp(file)
                file.flush()
                os.fsync(file.fileno())
            install(part, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at `path`, or the last of the run folder `path`.

        Raises:
            FileNotFoundError, ValueError: with one sentence.
        """
        if is_remote(path) or weights_only is False:  # the latter: a user asked for it
            tensors_only = weights_only is not False  # Lightning unpickles what comes from an address
            try:
                return super().load_checkpoint(path, map_location or torch.device("cpu"), tensors_only)
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # cut short, or more than tensors
                raise unreadable(path, error) from error
        found = find_checkpoint(path)
        if found.is_dir():
            if self.trainer.state.fn == "fit":
                raise ValueError(
                    f"{found} is a sharded checkpoint, which training goes on from under FSDP2 alone: add "
                    "-c experiments/trainer/fsdp_8gpu.yaml, or start from its weights with --model.init_args.init_from."
                )
            _, checkpoint = read_folder(found)
        else:
            _, checkpoint = read_file(found, mmap=False)
        check_keys(checkpoint, found, self.trainer)
        check_next_load(self.trainer.lightning_module, found)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        if is_remote(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


# -- writing -------------------------------------------------------------------------------------------


@contextmanager
def told(path: Path) -> Iterator[None]:
    """An error in writing the checkpoint `path` as an OSError of one sentence; its part is deleted."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter: torch's writer of archives
        delete(path.with_name(PART))
        raise OSError(not_written(path, error)) from error


def not_written(path: Path, error: BaseException | None) -> str:
    links = [error]
    while (last := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(last)
    error = next((link for link in links if isinstance(link, OSError)), error)
    told = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    if "inline_container" in told:  # torch's writer, whose cause is lost between processes
        told = "writing failed, is the disk full?"
    return f"The checkpoint {path} could not be written ({told.rstrip('.')}); earlier ones are as they were."


def new_part(path: Path) -> Path:
    """Where the checkpoint `path` is written; nothing is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(PART)
    delete(part)
    return part


def install(part: Path, path: Path) -> None:
    """Rename what was written and synced. Of a folder in the way, one or the other is under a visible name always."""
    old = None
    if path.is_dir() or (part.is_dir() and path.is_file()):
        if path.is_symlink():
            path.unlink()
        else:
            old = path.with_name(f"{path.stem}-old{path.suffix}")
            remove(old)
            os.replace(path, old)
    os.replace(part, path)
    sync(path.parent)
    if old is not None:
        remove(old)


def remove(path: Path) -> None:
    """Delete a checkpoint; a folder loses its name first, so that no half of it is left under that."""
    if path.is_dir() and not path.is_symlink():
        outdated = path.with_name(OUTDATED)
        delete(outdated)
        os.replace(path, outdated)
        path = outdated
    delete(path)


def delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Make `name` a link to `path`, at once: a reader finds what it was or what it is."""
    part = name.with_name(PART)
    delete(part)
    part.symlink_to(os.path.relpath(path, name.parent))
    if name.is_dir() and not name.is_symlink():  # a folder cannot be renamed over
        remove(name)
    os.replace(part, name)
    sync(name.parent)


def write_manifest(folder: Path, files: Mapping[str, Any]) -> None:
    with (folder / MANIFEST).open("w") as file:
        json.dump({"files": dict(files)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def sync(folder: Path) -> None:
    """Renames and deletions in `folder` outlive a power failure from here on."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# -- what a checkpoint goes on in ----------------------------------------------------------------------


def check_keys(checkpoint: Mapping[str, Any], path: Path, trainer: Trainer) -> None:
    """Raise a ValueError with one sentence where a checkpoint lacks what `fit` or `validate` need of it."""
    fitting = trainer.state.fn == "fit" and not path.is_dir()
    needed = [*KEYS, *(FITTING if fitting else ())]
    needed += ["samples_seen"] if hasattr(trainer.lightning_module, "samples_seen") else []
    kinds = {"state_dict": dict, "loops": dict, "optimizer_states": list, "lr_schedulers": list}
    kinds |= {"global_step": int, "epoch": int, "samples_seen": int, "pytorch-lightning_version": str}
    for key in needed:
        if not isinstance(checkpoint.get(key), kinds[key]):
            raise ValueError(
                f"{path} is not a checkpoint that `emmdit fit` wrote in full (it has no {key}): start from its weights "
                "with --model.init_args.init_from in place of --ckpt_path."
            )


def check_fits(saved: Mapping[str, torch.Size], module: LightningModule, path: str | Path) -> None:
    """Raise a ValueError with one sentence where tensors of a checkpoint do not fit those of `module`."""
    own = {key: value.shape for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    missing, extra = (own.keys() - saved.keys(), saved.keys() - own.keys()) if module.strict_loading else ((), ())
    shapes = {key for key in own.keys() & saved.keys() if own[key] != saved[key]}
    odd = sorted({*missing, *extra, *shapes})
    if not odd:
        return
    if not shapes and all(key.startswith("ema_denoiser.") for key in odd):
        given, way_out = ("no", "false") if missing else ("an", "true")
        raise ValueError(
            f"{path} holds {given} EMA, unlike this configuration: resume with --model.init_args.ema {way_out}, or "
            "start from its weights with --model.init_args.init_from."
        )
    key = odd[0]
    told = " and ".join(
        f"{tuple(s[key])} {where}" if key in s else f"not {where}" for s, where in ((saved, "there"), (own, "here"))
    )
    raise ValueError(
        f"{path} does not fit this configuration ({len(odd)} of {len(own.keys() | saved.keys())} tensors; {key} is "
        f"{told}): resume with the config.yaml of its run."
    )


def check_next_load(module: LightningModule, path: Path) -> None:
    """`check_fits` of the state dict that `module` is about to load, after its own hooks have seen to it."""

    def check(_: nn.Module, state: Mapping[str, Any], *__: Any) -> None:
        handle.remove()
        check_fits({key: value.shape for key, value in state.items() if hasattr(value, "shape")}, module, path)

    handle = module.register_load_state_dict_pre_hook(check)


def optimizer_names(trainer: Trainer) -> list[str]:
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]


def check_optimizers(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Raise a ValueError with one sentence where the optimizers of a checkpoint are not the trainer's."""
    names, told = optimizer_names(trainer), checkpoint.get("optimizers")  # None: of a version that did not write it
    states = checkpoint.get("optimizer_states") or []
    fits = told in (None, names) and (not states or len(states) == len(names))
    for state, optimizer in zip(states, trainer.optimizers, strict=False):
        own, saved = optimizer.state_dict()["param_groups"], state.get("param_groups", [])
        fits = fits and [len(g["params"]) for g in own] == [len(g["params"]) for g in saved]
        for a, b in zip(own, saved, strict=False):  # a newer torch adds settings, another optimizer has others, too
            fits = fits and not (a.keys() - b.keys() and b.keys() - a.keys() - {"initial_lr"})
    if not fits:
        was = f" ({', '.join(told)}, here {', '.join(names)})" if isinstance(told, list) and told != names else ""
        raise ValueError(
            f"{trainer.ckpt_path} was trained with another optimizer or other parameter groups{was}: resume with the "
            "config.yaml of its run, or start from its weights with --model.init_args.init_from."
        )
