"""From a run on disk back to its module and to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule

from emmdit.encoders.base import FrozenModel
from emmdit.pipeline import TextToImagePipeline
from emmdit.weights import checkpoint_progress, find_checkpoint, is_diffusers_folder, run_folder
from lightning_modules.callbacks.save_config import latest_config


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run that a run folder or a checkpoint belongs to."""
    return yaml.safe_load(latest_config(run_folder(path)).read_text())


def build_module(config: dict[str, Any]) -> LightningModule:
    """The LightningModule that a run's config describes, without its network."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    try:
        parsed = parser.parse_object({"model": config["model"]})
    except Exception as error:
        raise ValueError(f"The run's configuration does not fit this version of the suite: {error}") from error
    return instantiate(parser, parsed).model


def instantiate(parser: ArgumentParser, parsed: Namespace) -> Namespace:
    """What a parsed configuration names, built; jsonargparse 4.49 renamed the call."""
    return parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)


def load_pipeline(
    source: str | Path, weights: str | None = None, include_encoders: bool = True
) -> tuple[TextToImagePipeline, dict[str, Any]]:
    """A pipeline from a run folder, a checkpoint, or a diffusers folder; and a note on where its weights come from.

    Args:
        weights: "ema" or "raw" of a checkpoint; None: the average if there is one.
        include_encoders: put the loaded encoders into the pipeline; without it only small ones of our own.
    """
    source = Path(source)
    if is_diffusers_folder(source):
        if not (source / "model_index.json").is_file():
            raise ValueError(
                f"{source} holds a network alone, not a pipeline: it does not say which encoders belong to it. Export "
                "the run with `emmdit export`."
            )
        if weights not in (None, "raw"):
            raise ValueError(f"{source} is an export and has one set of weights: leave --weights out.")
        return TextToImagePipeline.from_pretrained(source), {"source": str(source)}
    checkpoint = find_checkpoint(source)
    config = read_config(checkpoint)
    module = build_module(config)
    network, kind = module.load_denoiser(checkpoint, weights)
    pipeline = make_pipeline(module, network, config["model"]["init_args"], include_encoders)
    return pipeline, {"source": str(source), "weights": kind, **checkpoint_progress(checkpoint)}


def make_pipeline(
    module: LightningModule, network: Any, settings: dict[str, Any], include_encoders: bool
) -> TextToImagePipeline:
    """The pipeline of a trained module; `settings` are the module's init_args in its config."""
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    for wrapper in (module.codec, module.text):
        if include_encoders or not isinstance(wrapper, FrozenModel):
            parts |= wrapper.components()
    sampling = settings.get("sampling") or {}
    return TextToImagePipeline(
        transformer=network,
        **parts,
        codec=plain(settings["codec"]),
        text=plain(settings["text"]),
        path=plain(settings["path"]) if settings.get("path") else None,
        sampling=sampling.get("init_args", sampling),
    )


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Class path and arguments, without what is None anyway (a frozen world, say, is built by the class itself)."""
    arguments = {key: value for key, value in (settings.get("init_args") or {}).items() if value is not None}
    return {"class_path": settings["class_path"], "init_args": arguments}
