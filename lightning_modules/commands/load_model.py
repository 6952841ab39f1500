"""Any model of the suite, or of diffusers, as something that draws pictures for prompts and seeds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emmdit.legacy import modernize
from emmdit.pipeline import TextToImagePipeline
from emmdit.weights import find_checkpoint, is_diffusers_folder, sha256_of
from lightning_modules.runs import load_pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# of a pipeline of diffusers: our names, and its own
SETTINGS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "height": "height", "width": "width"}


@dataclass
class Model:
    """`source` and `sampling` say all that decides about its pictures, fit for JSON."""

    source: dict[str, Any]
    sampling: dict[str, Any]
    draw: Callable[[list[str], list[int]], Tensor]  # -> (B, 3, H, W) in [-1, 1]
    to: Callable[[torch.device, str], None]
    pipeline: Any

    @property
    def network(self) -> nn.Module:
        """The denoiser; a pipeline that has no transformer stands for itself."""
        return getattr(self.pipeline, "transformer", self.pipeline)


def open_model(
    ckpt: str | Path,
    weights: str | None = None,
    settings: dict[str, Any] | None = None,
    encoders: bool = True,
    **released: Any,
) -> Model:
    """A run folder, a checkpoint, an export, a diffusers pipeline's folder, or a released Nitro-E file.

    Args:
        settings: of `Sampling`, in place of the model's own.
        encoders: load them, where it can be left; without them the model does not draw.
        released: arguments of `nitro_e_pipeline`, of which a released file tells nothing.
    """
    settings = settings or {}
    path = Path(ckpt)
    if _pipeline_class(path) not in (None, TextToImagePipeline.__name__):
        return _stock_pipeline(path, weights, settings, encoders)
    if path.suffix == ".safetensors":
        if weights not in (None, "raw"):
            raise ValueError(f"{path} is a released file and has one set of weights: leave --weights out.")
        pipeline, source = nitro_e_pipeline(path, **released)
    else:
        pipeline, source = load_pipeline(path, weights, encoders)
    pipeline.sampling = pipeline.sampling.replace(**settings)
    # Given by an absolute path, a model is named without it: results are published.
    source = {**source, "source": path.name if path.is_absolute() else str(path), "sha256": weights_sha256(path)}

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        return pipeline(prompts, seed=seeds, output_type="pt").images * 2 - 1

    def to(device: torch.device, dtype: str) -> None:
        pipeline.transformer.to(device, DTYPES[dtype])

    return Model(source, {k: v for k, v in asdict(pipeline.sampling).items() if v is not None}, draw, to, pipeline)


def nitro_e_pipeline(
    file: Path,
    resolution: int = 512,
    steps: int = 20,
    guidance: float = 4.5,
    text_encoder: str = "meta-llama/Llama-3.2-1B",
    autoencoder: str = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
) -> tuple[TextToImagePipeline, dict[str, Any]]:
    """The pipeline of a released file; its encoders are loaded when first used."""
    from emmdit.networks import load_nitro_e

    network = load_nitro_e(file, resolution)
    pipeline = TextToImagePipeline(
        network,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        codec={"class_path": "emmdit.encoders.DCAE", "init_args": {"source": autoencoder}},
        text={
            "class_path": "emmdit.encoders.TextEncoder",
            "init_args": {"source": text_encoder, "caption_channels": network.config.caption_channels},
        },
        sampling={"steps": steps, "guidance": guidance},
    )
    return pipeline, {"source": str(file), "resolution": resolution}


def weights_sha256(path: Path) -> str:
    """Of the file(s) that hold a model's weights, in the order of their names."""
    if path.suffix == ".safetensors":
        return sha256_of([path])
    if is_diffusers_folder(path):
        return sha256_of(sorted(path.rglob("*.safetensors")))
    checkpoint = find_checkpoint(path)
    return sha256_of(sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint])


def _pipeline_class(path: Path) -> str | None:
    index = path / "model_index.json"
    return modernize(json.loads(index.read_text())["_class_name"]) if index.is_file() else None


def _stock_pipeline(path: Path, weights: str | None, settings: dict[str, Any], encoders: bool = True) -> Model:
    """A text-to-image pipeline of diffusers itself."""
    from diffusers import DiffusionPipeline

    import emmdit.networks  # noqa: F401  a student in it: diffusers looks its class up in modules that are imported

    if weights is not None or "sampler" in settings:
        raise ValueError(f"{path} is a pipeline of diffusers with weights and a sampler of its own: leave both out.")
    index = DiffusionPipeline.load_config(path)
    parts = [name for name, value in index.items() if isinstance(value, list)]
    left_out = [] if encoders else [name for name in parts if name not in ("transformer", "scheduler")]
    pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True, **dict.fromkeys(left_out))
    source = {"source": path.name if path.is_absolute() else str(path), "pipeline": type(pipeline).__name__}
    return of_diffusers(pipeline, settings, {**source, "sha256": weights_sha256(path)})


def of_diffusers(pipeline: Any, settings: dict[str, Any], source: dict[str, Any]) -> Model:
    """A loaded pipeline of diffusers; `settings`, by the names in `SETTINGS`, in place of its own."""
    arguments = {SETTINGS[key]: value for key, value in settings.items()}
    pipeline.set_progress_bar_config(disable=True)
    if "height" in settings and "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        arguments["use_resolution_binning"] = False  # the size that was asked for, not the nearest of the training's

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompts, generator=generators, output_type="pt", **arguments).images * 2 - 1

    def to(device: torch.device, dtype: str) -> None:
        pipeline.to(device, DTYPES[dtype])

    return Model(source, {**arguments, "scheduler": type(pipeline.scheduler).__name__}, draw, to, pipeline)
