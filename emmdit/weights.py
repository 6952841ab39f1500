"""Weights of a denoiser from whatever holds them: run folder, Lightning checkpoint (file or sharded), diffusers
folder, Nitro-E file. Tensors only: safetensors, `torch.load(weights_only=True)`, or `checkpoint_reader`."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emmdit.archive import Damaged, unreadable
from emmdit.checkpoint_files import is_checkpoint, verify, verify_file, whole
from emmdit.files import first_line, resolved
from emmdit.legacy import modernize_state

ATTEMPTS = 10  # to read from a run that is training, and deletes what was found
PREFIXES = {"ema": "ema_denoiser.", "raw": "denoiser."}


def load_weights(network: nn.Module, source: str | Path | OpenedCheckpoint, weights: str | None = None) -> str:
    """Copy weights into `network`; returns which were taken ("ema" or "raw").

    Args:
        source: see above. A hub id works for diffusers repositories.
        weights: "ema" or "raw" of a checkpoint; None: EMA if available.

    Raises:
        FileNotFoundError, ValueError: with one sentence.
    """
    state, kind = read_weights(source, weights, type(network))
    source = source.path if isinstance(source, OpenedCheckpoint) else source
    check_finite(state, source)
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


def check_finite(state: dict[str, Tensor], source: str | Path) -> None:
    """Raise a ValueError with one sentence if a tensor holds NaN or infinity."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not all(torch.isfinite(x) for x in tensor.aminmax()):
            raise ValueError(
                f"The weights in {source} are not finite ({key} holds NaN or infinity): use an earlier checkpoint, or "
                "export again."
            )


def base_weights(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights of a network without adapters under the keys of `network`, which may have some (kept as they are)."""
    own = network.state_dict()
    names = {key.replace(".base_layer.", "."): key for key in own if ".base_layer." in key}
    adapters = {key: tensor for key, tensor in own.items() if "lora_" in key}
    return adapters | {names.get(key, key): tensor for key, tensor in state.items()}


def open_source(source: str | Path) -> str | Path | OpenedCheckpoint:
    """A checkpoint is opened, so that all that is loaded from it is of one step and read once; others stay as is."""
    path = Path(source)
    other = path.suffix == ".safetensors" or is_diffusers_folder(path) or is_hub_id(source)
    return source if other else open_checkpoint(source)


def component_weights(source: str | Path | OpenedCheckpoint, name: str) -> dict[str, Tensor]:
    """State dict of the loss component `name` in `source`; {} where there is none.

    A Lightning checkpoint holds components as `components.<name>.*`, a Nitro-E training file REPA's projector.
    """
    source = source if isinstance(source, OpenedCheckpoint) else open_source(source)
    if isinstance(source, OpenedCheckpoint):
        prefix = f"components.{name}."
        return {key.removeprefix(prefix): v for key, v in source.state.items() if key.startswith(prefix)}
    if name != "repa" or Path(source).suffix != ".safetensors":
        return {}
    prefix, state = "projectors.0.", _tensors(Path(source))
    return {f"projector.{key.removeprefix(prefix)}": v for key, v in state.items() if key.startswith(prefix)}


def load_component_weights(component: nn.Module, source: str | Path | OpenedCheckpoint) -> None:
    """Copy the weights of a loss component from `source`, where it holds some; ValueError if they do not fit."""
    saved, own = component_weights(source, component.name), component.state_dict()
    if not saved:
        return
    source = source.path if isinstance(source, OpenedCheckpoint) else source
    check_finite(saved, source)
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
    source: str | Path | OpenedCheckpoint, weights: str | None = None, network_class: type | None = None
) -> tuple[dict[str, Tensor], str]:
    """The denoiser's state dict in `source`, and whether it is the "ema" or the "raw" one."""
    opened = source if isinstance(source, OpenedCheckpoint) else open_source(source)
    if not isinstance(opened, OpenedCheckpoint):
        path = Path(opened)
        return (
            _from_safetensors(path) if path.suffix == ".safetensors" else _from_diffusers(opened, network_class)
        ), "raw"
    source, state = opened.path, opened.state
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
    """A whole checkpoint itself, or the last whole one of a run folder (see `last_checkpoint`).

    Raises:
        FileNotFoundError, ValueError: with one sentence, which names the newest whole checkpoint if another was asked
            for.
    """
    path = Path(path)
    if is_checkpoint(path):
        try:
            verify(path)
        except Damaged as error:
            raise _with_way_out(error) from error
        return path
    for folder in (path / "checkpoints", path):
        found = last_checkpoint(folder)
        if found is not None:
            return found
    if path.is_symlink():
        raise _with_way_out(Damaged(path, f"it is a link to {os.readlink(path)}, which is gone"))
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}: give a run folder, a checkpoint or a diffusers folder.")
    raise FileNotFoundError(f"No checkpoint in {path}: has the run saved one yet?")


def last_checkpoint(folder: Path) -> Path | None:
    """What `last.ckpt` names, or, where that is missing, dangling or damaged, the newest whole checkpoint.

    None: the folder holds no checkpoint.

    Raises:
        ValueError: it holds checkpoints, but none that is whole.
    """
    for _ in range(ATTEMPTS):
        before = _listing(folder)
        found, error = _last(folder)
        if found is not None or _listing(folder) == before:  # else a training has saved meanwhile
            break
    if error is not None:
        raise error
    return found


def _listing(folder: Path) -> tuple[list[str], str]:
    last = folder / "last.ckpt"
    return sorted(path.name for path in folder.glob("*.ckpt")), os.readlink(last) if last.is_symlink() else ""


def _last(folder: Path) -> tuple[Path | None, ValueError | None]:
    last, entries = folder / "last.ckpt", sorted(folder.glob("*.ckpt"))
    if not entries:
        return None, None
    errors: list[Exception] = []
    if found := next(whole([resolved(last)], errors), None):
        return found, None
    if found := next(whole((path for path in entries if not path.is_symlink()), errors), None):
        warnings.warn(f"{last} does not name a whole checkpoint: {found.name}, the newest, is used.", stacklevel=4)
        return found, None
    told = next((str(error) for error in errors if not isinstance(error, OSError)), f"{entries[-1]} leads nowhere.")
    return None, ValueError(
        f"{told.rstrip('.')}; {folder} has no whole checkpoint: restore one, or use another folder."
    )


def _with_way_out(error: Damaged) -> ValueError:
    path, own = error.path, resolved(error.path)
    beside = (other for other in path.parent.glob("*.ckpt") if not other.is_symlink() and other != own)
    other = next(whole(beside, []), None)
    way_out = f"{other} is whole, use that" if other else "no other checkpoint beside it is whole, restore it"
    return ValueError(f"{str(error).rstrip('.')}: {way_out}.")


def run_folder(path: str | Path) -> Path:
    """The folder with `config.yaml` that a checkpoint (or the folder itself) belongs to.

    Links are not followed at first: a run whose `last.ckpt` links into another run has a config of its own.
    """
    for start in (Path(os.path.abspath(path)), resolved(path)):
        for folder in [start, *start.parents][:4]:
            if (folder / "config.yaml").is_file():
                return folder
    raise FileNotFoundError(
        f"No config.yaml beside or above {path}: sampling from a checkpoint needs the config of its run."
    )


def is_diffusers_folder(path: str | Path) -> bool:
    path = Path(path)
    return any((path / name).is_file() for name in ("model_index.json", "config.json", "transformer/config.json"))


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was verified and read: `sha256` is of the very bytes that `state` came from."""

    path: Path
    state: dict[str, Any]
    sha256: str
    step: int
    samples_seen: int


def open_checkpoint(source: str | Path) -> OpenedCheckpoint:
    """Verify and read the checkpoint `source`, or the last of the run folder `source`, on the CPU.

    Raises:
        FileNotFoundError, ValueError: with one sentence.
    """
    path = find_checkpoint(source)
    for _ in range(ATTEMPTS):
        try:
            sha256, checkpoint = read_folder(path) if path.is_dir() else read_file(path)
            break
        except (OSError, ValueError):
            before, path = path, find_checkpoint(source)
            if path == before:  # else a training has saved the next one meanwhile, and deleted this one
                raise
    counts = progress(checkpoint, path)
    return OpenedCheckpoint(resolved(path), modernize_state(checkpoint["state_dict"]), sha256, **counts)


def checkpoint_state(path: Path) -> dict[str, Any]:
    """`state_dict` of a Lightning checkpoint, a file or a sharded folder, on the CPU."""
    return open_checkpoint(path).state


def read_file(path: Path, mmap: bool = True) -> tuple[str, dict[str, Any]]:
    """SHA-256 and content of a checkpoint of one file. Tensors are copied where not mapped."""
    with path.open("rb") as file:
        sha256 = verify_file(file, path)
        try:
            # The file that was verified, even if its name belongs to another by now.
            opened = f"/dev/fd/{file.fileno()}" if mmap else file
            checkpoint = torch.load(opened, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:
            raise unreadable(path, error) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict.")
    return sha256, checkpoint


def read_folder(path: Path) -> tuple[str, dict[str, Any]]:
    """As `read_file`, of a sharded folder: the state dict, and what `meta.pt` holds."""
    sha256 = verify(path)
    return sha256, read_meta(path) | {"state_dict": _sharded_state(path)}


def read_meta(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside the tensors of network and optimizers."""
    file = folder / "meta.pt"
    try:
        verify(file)
        rest = torch.load(file, map_location="cpu", weights_only=True)
    except Damaged as error:
        raise Damaged(folder, f"of its meta.pt, {error.why}") from error
    except Exception as error:
        raise unreadable(file, error) from error
    if not isinstance(rest, dict):
        raise ValueError(f"{file} is not a part of a Lightning checkpoint.")
    return rest


def checkpoint_progress(path: Path) -> dict[str, int]:
    """`step` and `samples_seen` of a Lightning checkpoint, a file or a sharded folder."""
    return progress(read_meta(path) if path.is_dir() else read_file(path)[1], path)


def progress(checkpoint: dict[str, Any], path: Path) -> dict[str, int]:
    """`step` and `samples_seen` of what was read from `path`."""
    counts = [checkpoint.get(key, 0) for key in ("global_step", "samples_seen")]
    if not all(isinstance(count, int) for count in counts):
        raise ValueError(f"{path} is not a checkpoint of this suite: its global_step or samples_seen is no number.")
    return dict(zip(("step", "samples_seen"), counts, strict=True))


def _sharded_state(folder: Path) -> dict[str, Tensor]:
    from emmdit.checkpoint_reader import load_sharded, state_metadata  # takes a second

    entries = state_metadata(folder)
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    load_sharded({"state_dict": state}, folder, no_dist=True)
    return state


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    state = _tensors(path)
    if any(key.startswith("block_groups.") for key in state):
        from emmdit.networks import load_nitro_e

        state = load_nitro_e(path).state_dict()
    return state


def _tensors(path: Path) -> dict[str, Tensor]:
    """All of a safetensors file."""
    check_source(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({first_line(error)}).") from error


def _from_diffusers(source: str | Path, network_class: type | None) -> dict[str, Tensor]:
    from emmdit.encoders.loading import load_model
    from emmdit.networks import EMMDiTTransformer2DModel

    subfolder = "transformer" if not Path(source, "config.json").is_file() else None
    network_class = network_class or EMMDiTTransformer2DModel
    return load_model(network_class, str(source), subfolder=subfolder, kinds=(network_class.__name__,)).state_dict()
