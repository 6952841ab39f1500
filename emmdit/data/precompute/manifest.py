"""Manifest of precomputed latents: source, encoders and shards, and its comparison with an experiment."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emmdit.files import read_json

KIND = "emmdit latents"
VERSION = 1
TEXT_SETTINGS = ("padding_side", "hidden_layer", "mask_encoder", "clean_captions", "use_t5")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names and values of parameters and buffers, rounded to bfloat16 first: weights that were loaded in
    float32 and in bfloat16 are the same weights (in float16 they may not be)."""
    digest = hashlib.sha256()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())  # those that no file keeps count, too
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(encoder: Any) -> dict[str, Any]:
    """Class, source and weights of an autoencoder, text or vision encoder, which it loads."""
    cls = type(encoder)
    found: dict[str, Any] = {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
    for name in ("source", "subfolder", "revision"):
        if getattr(encoder, name, None) is not None:
            found[name] = str(getattr(encoder, name))
    parts = getattr(encoder, "encoders", None) or [encoder]
    hashes = [weights_hash(part.model) for part in parts if isinstance(getattr(part, "model", None), nn.Module)]
    found["dtype"] = str(getattr(encoder, "dtype", torch.float32)).removeprefix("torch.")
    found["weights_sha256"] = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    names = ("latent_channels", "downsample", "scaling_factor", "shift_factor", "sample", "tiling")
    names += ("max_length", "caption_channels", "feature_dim", "image_size", *TEXT_SETTINGS)
    return found | {name: getattr(encoder, name) for name in names if hasattr(encoder, name)}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """manifest.json of a folder that `emmdit precompute` finished, its files there and of their sizes.

    Raises:
        FileNotFoundError, ValueError: one sentence that says what to do.
    """
    folder = Path(folder).expanduser()
    file = folder / "manifest.json"
    if not file.is_file():
        if (folder / "plan.json").is_file():
            raise ValueError(f"'{folder}' is not finished: run the same `emmdit precompute` again to resume.")
        raise FileNotFoundError(f"'{folder}' holds no manifest.json: name a folder made by `emmdit precompute`.")
    manifest = read_json(file, "copy it again, or run `emmdit precompute` again")
    try:
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} cannot be used: {what}.") from error
    shards = [(folder / shard["file"], shard["bytes"]) for shard in manifest["shards"]]
    for shard, size in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"The shard {shard} is missing: copy it again, or run `emmdit precompute` again.")
        if (found := shard.stat().st_size) != size:
            raise ValueError(
                f"The shard {shard} has {found:,} bytes, its manifest says {size:,}: copy it again, or run `emmdit "
                "precompute` again."
            )
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """All that is read of a manifest later. ValueError, KeyError, TypeError or AttributeError."""
    if (manifest["kind"], manifest["version"]) != (KIND, VERSION):
        raise ValueError(f"it is '{manifest['kind']}' in version {manifest['version']}, not '{KIND}' {VERSION}")
    for name in ("shards", "source", "codec", "counts"):
        if not isinstance(manifest[name], list if name == "shards" else dict):
            raise ValueError(f"its {name} is of another type")
    if "licence" in manifest["source"]:  # the key's older name
        manifest["source"]["license"] = manifest["source"].pop("licence")
    codec, columns = manifest["codec"], manifest["columns"] if manifest["shards"] else {}
    numbers = [manifest["resolution"], codec["latent_channels"], codec["downsample"]]
    numbers += [number for shard in manifest["shards"] for number in (shard["bytes"], shard["samples"])]
    numbers += [number for column in columns.values() for number in column["shape"]]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("one of its sizes is not a number above 0")
    if manifest["shards"] and "latents" not in columns:
        raise KeyError("columns.latents")
    samples = sum(shard["samples"] for shard in manifest["shards"])
    if samples != manifest["counts"]["samples"] or not isinstance(manifest["counts"]["rejected"], dict):
        raise ValueError(f"its shards have {samples:,} samples, its counts {manifest['counts']['samples']!r:.20}")
    for shard in manifest["shards"]:
        if os.path.basename(shard["file"]) != shard["file"] or not shard["file"].endswith(".arrow"):
            raise ValueError(f"its shard '{shard['file']}' is not a file beside it")
    for column in columns.values():
        getattr(torch, column["dtype"]).itemsize  # noqa: B018
    texts = [manifest["sha256"], codec["class_path"], codec["weights_sha256"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its codec or hash is not a text")


def check(manifest: dict[str, Any], folder: str | Path, codec: Any, resolution: int | None = None) -> None:
    """Refuse latents that this autoencoder would not make. What costs nothing is compared before the weights.

    The type it computes in may differ: it changes the latents by rounding alone.

    Raises:
        ValueError: one sentence that names the difference.
    """
    if resolution is not None and resolution != manifest["resolution"]:
        raise ValueError(
            f"The latents in '{folder}' are of {manifest['resolution']} px, the data section asks for {resolution}: "
            "change its resolution, or precompute again."
        )
    made = manifest["codec"]
    names = [name for name in ("scaling_factor", "shift_factor") if name in made and hasattr(codec, name)]
    pairs = [(name, made[name], getattr(codec, name)) for name in ("latent_channels", "downsample", *names)]
    _compare("latents", folder, made, codec, pairs, "precompute again")


def check_text(manifest: dict[str, Any], folder: str | Path, text: Any) -> None:
    """Refuse text features that this text encoder would not make. ValueError, as `check`; loads it."""
    made = manifest["text"]
    names = [name for name in ("max_length", "caption_channels", *TEXT_SETTINGS) if hasattr(text, name)]
    pairs = [(name, made.get(name), getattr(text, name)) for name in names]
    stored = sorted(name.removeprefix("text.") for name in manifest["columns"] if name.startswith("text."))
    pairs += [("features", stored, sorted(text.null(1)))]
    _compare("text features", folder, made, text, pairs, "precompute again, or set the data's text to false")


def _compare(
    what: str, folder: str | Path, made: dict[str, Any], encoder: Any, pairs: list[tuple[str, Any, Any]], way: str
) -> None:
    """Class, then (name, stored, wanted) settings, then weights."""
    cls = type(encoder).__name__  # the module may have moved
    for name, found, wanted in [("class_path", made["class_path"].rpartition(".")[2], cls), *pairs]:
        if found != wanted:
            raise ValueError(
                f"The {what} in '{folder}' were made with {name} {found}, this experiment's {cls} has {wanted}: "
                f"name the encoder that made them, or {way}."
            )
    weights = describe(encoder)["weights_sha256"]
    if weights != made["weights_sha256"]:
        raise ValueError(
            f"The {what} in '{folder}' were made with other weights of {cls} ({made.get('source', '')}, "
            f"{made['weights_sha256'][:12]}) than this experiment's ({getattr(encoder, 'source', '')}, "
            f"{weights[:12]}): name the encoder that made them, or {way}."
        )
