"""Weights of a denoiser from whatever holds them: run folder, Lightning checkpoint (file or sharded), diffusers
folder, Nitro-E file. Tensors only: safetensors, `torch.load(weights_only=True)`, or `checkpoint_reader`."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from emmdit.legacy import modernize_state

PREFIXES = {"ema": "ema_denoiser.", "raw": "denoiser."}


def load_weights(network: nn.Module, source: str | Path, weights: str | None = None) -> str:
    """Copy weights into `network`; returns which were taken ("ema" or "raw").

    Args:
        source: see above. A hub id works for diffusers repositories.
        weights: "ema" or "raw" of a checkpoint; None: EMA if available.

    Raises:
        FileNotFoundError, ValueError: with one sentence.
    """
    state, kind = read_weights(source, weights, type(network))
    if not any("lora_" in key for key in state):  # weights to begin with, of the network before its adapters
        state = base_weights(state, network)
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or extra or shapes:
        problems = [f"{len(missing)} missing"] * bool(missing) + [f"{len(extra)} unknown"] * bool(extra)
        problems += [f"{len(shapes)} of another shape"] * bool(shapes)
        example = (missing + extra + shapes)[0]
        raise ValueError(
            f"The weights in {source} do not fit this network (tensors: {', '.join(problems)}; e.g. {example}): "
            "use the configuration they were trained with."
        )
    network.load_state_dict({key: state[key] for key in own})
    return kind


def base_weights(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights of a network without adapters under the keys of `network`, which may have some (kept as they are)."""
    own = network.state_dict()
    names = {key.replace(".base_layer.", "."): key for key in own if ".base_layer." in key}
    adapters = {key: tensor for key, tensor in own.items() if "lora_" in key}
    return adapters | {names.get(key, key): tensor for key, tensor in state.items()}


def component_weights(source: str | Path, name: str) -> dict[str, Tensor]:
    """State dict of the loss component `name` in `source`; {} where there is none.

    A Lightning checkpoint holds components as `components.<name>.*`, a Nitro-E training file REPA's projector.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        prefix = "projectors.0."
        found = {key: tensor for key, tensor in load_file(path).items() if name == "repa" and key.startswith(prefix)}
        return {f"projector.{key.removeprefix(prefix)}": tensor for key, tensor in found.items()}
    if is_diffusers_folder(path) or is_hub_id(source):
        return {}
    prefix, state = f"components.{name}.", checkpoint_state(find_checkpoint(path))
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def load_component_weights(component: nn.Module, source: str | Path) -> None:
    """Copy the weights of a loss component from `source`, where it holds some; ValueError if they do not fit."""
    saved, own = component_weights(source, component.name), component.state_dict()
    if not saved:
        return
    odd = [
        key
        for key in own.keys() | saved.keys()
        if key not in own or key not in saved or own[key].shape != saved[key].shape
    ]
    if odd:
        raise ValueError(
            f"The weights of the loss {component.name} in {source} do not fit ({min(odd)}): use the settings they were "
            "trained with."
        )
    component.load_state_dict(saved)


def read_weights(
    source: str | Path, weights: str | None = None, network_class: type | None = None
) -> tuple[dict[str, Tensor], str]:
    """The denoiser's state dict in `source`, and whether it is the "ema" or the "raw" one."""
    path = Path(source)
    check_source(source)
    if path.suffix == ".safetensors":
        state = load_file(path)
        if any(key.startswith("block_groups.") for key in state):
            from emmdit.networks import load_nitro_e

            state = load_nitro_e(path).state_dict()
        return state, "raw"
    if is_diffusers_folder(path) or is_hub_id(source):
        return _from_diffusers(source, network_class), "raw"
    state = checkpoint_state(find_checkpoint(path))
    kind = weights or ("ema" if any(key.startswith(PREFIXES["ema"]) for key in state) else "raw")
    if kind not in PREFIXES:
        raise ValueError(f"weights must be ema or raw, got {kind!r}.")
    found = {key.removeprefix(PREFIXES[kind]): v for key, v in state.items() if key.startswith(PREFIXES[kind])}
    if not found:
        raise ValueError(f"{source} holds no {kind} weights of a denoiser.")
    return found, kind


def check_source(source: str | Path) -> None:
    """Raise FileNotFoundError with one sentence if a local `source` is not there. Reads nothing."""
    path = Path(source)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"No weights at {path}.")
    elif not (is_diffusers_folder(path) or is_hub_id(source)):
        find_checkpoint(path)


def is_hub_id(source: str | Path) -> bool:
    """owner/name, where no local folder `owner` makes it a path."""
    return str(source).count("/") == 1 and not Path(source).parent.exists()


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint itself, or the last whole one of a run folder (see `last_checkpoint`)."""
    path = Path(path)
    if path.is_file() or (path / ".metadata").is_file():
        return path
    for folder in (path / "checkpoints", path):
        found = last_checkpoint(folder)
        if found is not None:
            return found
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}: give a run folder, a checkpoint or a diffusers folder.")
    raise FileNotFoundError(f"No checkpoint in {path}: has the run saved one yet?")


def last_checkpoint(folder: Path) -> Path | None:
    """What `last.ckpt` names, or, where a kill left that dangling, missing or cut short, the newest whole checkpoint.

    None: the folder holds no checkpoint.

    Raises:
        ValueError: it holds checkpoints, but none that is whole.
    """
    last, entries = folder / "last.ckpt", sorted(folder.glob("*.ckpt"))
    if is_whole(last):
        return last.resolve()
    own = [path for path in entries if not path.is_symlink()]
    whole = [path for path in own if is_whole(path)]
    if whole:
        newest = max(whole, key=lambda path: path.stat().st_mtime)
        warnings.warn(f"{last} does not name a whole checkpoint: {newest.name}, the newest, is used.", stacklevel=2)
        return newest
    if entries:
        name = (own or entries)[-1].name
        raise ValueError(f"{folder} has no whole checkpoint ({name} is cut short): restore one, or use another folder.")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: a file has its directory there, a sharded folder its two indices."""
    if checkpoint.is_dir():
        return all((checkpoint / name).is_file() for name in (".metadata", "meta.pt"))
    return checkpoint.is_file() and zipfile.is_zipfile(checkpoint)


def sha256_of(files: Iterable[Path]) -> str:
    """Of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def run_folder(path: str | Path) -> Path:
    """The folder with `config.yaml` that a checkpoint (or the folder itself) belongs to."""
    path = Path(path).resolve()
    for folder in [path, *path.parents][:4]:
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"No config.yaml beside or above {path}: sampling from a checkpoint needs the config of its run."
    )


def is_diffusers_folder(path: str | Path) -> bool:
    path = Path(path)
    return any((path / name).is_file() for name in ("model_index.json", "config.json", "transformer/config.json"))


def checkpoint_state(path: Path) -> dict[str, Any]:
    """`state_dict` of a Lightning checkpoint, a file or a sharded folder, on the CPU."""
    if path.is_dir():
        return modernize_state(_sharded_state(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0]}).") from error
    if "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict.")
    return modernize_state(checkpoint["state_dict"])


def checkpoint_progress(path: Path) -> dict[str, int]:
    """`step` and `samples_seen` of a Lightning checkpoint, a file or a sharded folder."""
    file = path / "meta.pt" if path.is_dir() else path
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=path.is_file())
    return {"step": int(checkpoint.get("global_step", 0)), "samples_seen": int(checkpoint.get("samples_seen", 0))}


def _sharded_state(folder: Path) -> dict[str, Tensor]:
    from emmdit.checkpoint_reader import load_sharded, read_metadata

    prefix = "state_dict."
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in read_metadata(folder / ".metadata").state_dict_metadata.items()
        if key.startswith(prefix) and hasattr(entry, "properties")
    }
    load_sharded(state, folder, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _from_diffusers(source: str | Path, network_class: type | None) -> dict[str, Tensor]:
    from emmdit.encoders.loading import load_model
    from emmdit.networks import EMMDiTTransformer2DModel

    subfolder = "transformer" if not Path(source, "config.json").is_file() else None
    network_class = network_class or EMMDiTTransformer2DModel
    return load_model(network_class, str(source), subfolder=subfolder, kinds=(network_class.__name__,)).state_dict()
