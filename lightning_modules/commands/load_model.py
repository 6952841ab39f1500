"""Loading of any model as an image generator: run folder, checkpoint, export, diffusers pipeline, Nitro-E file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from emmdit.bounded import BoundedMemory, Unfit
from emmdit.encoders.base import FrozenModel
from emmdit.encoders.loading import loading, one_sentence
from emmdit.files import read_json, sha256_of
from emmdit.generate import image_size
from emmdit.legacy import modernize
from emmdit.pipeline import TextToImagePipeline
from emmdit.weights import is_diffusers_folder, is_hub_id, open_checkpoint, run_folder
from lightning_modules.commands import options
from lightning_modules.runs import build_module, latest_config, read_config

DTYPES = {name: getattr(torch, name) for name in options.DTYPES}
# names of a stock diffusers pipeline for the fields of `Sampling` that it has
SETTINGS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "height": "height", "width": "width"}


@dataclass
class Model:
    """A loaded generator. `source` and `sampling` say all that decides about its images, fit for JSON."""

    source: dict[str, Any]
    sampling: dict[str, Any]
    generate: Callable[[list[str], list[int]], Tensor]  # prompts and seeds -> (B, 3, H, W) in [-1, 1]
    to: Callable[[torch.device, str], None]
    pipeline: Any

    @property
    def network(self) -> nn.Module:
        """The denoiser; a pipeline without a transformer stands for itself."""
        return getattr(self.pipeline, "transformer", self.pipeline)


def open_model(
    source: str | Path,
    weights: str | None = None,
    settings: dict[str, Any] | None = None,
    encoders: bool = True,
    revision: str | None = None,
    hashed: bool = True,
    trust_code: bool = False,
    **released: Any,
) -> Model:
    """Open a run folder, a checkpoint, an export, a diffusers pipeline (folder or hub id), or a Nitro-E file.

    Args:
        weights: "ema" or "raw" of a checkpoint; None: EMA if available.
        settings: fields of `Sampling`, in place of the model's own.
        encoders: load them where they can be left out; without them the model generates nothing.
        revision: of a hub id.
        hashed: put the SHA-256 of the weights into `source` (it reads all of the files).
        trust_code: the config of a run may name classes of any package (see `runs.TRUSTED`).
        released: arguments of `nitro_e_pipeline`, of which a released file says nothing.

    Raises:
        FileNotFoundError, ValueError, MissingModelError: with one sentence.
    """
    settings, path = settings or {}, Path(source).expanduser()
    index = path / "model_index.json"
    kind = _pipeline_class(index) if index.is_file() else None
    on_hub = not path.exists() and is_hub_id(source) and path.suffix != ".safetensors"
    if not (path.exists() or on_hub):
        raise FileNotFoundError(
            f"There is no model '{source}': give a run folder, a checkpoint, an export, a Nitro-E file, or a diffusers "
            "pipeline (folder or hub id)."
        )
    if on_hub or kind not in (None, TextToImagePipeline.__name__):
        if weights is not None or "sampler" in settings:
            raise ValueError(f"{source} is a diffusers pipeline with weights and a sampler of its own: omit both.")
        return _from_diffusers(path if kind else str(source), settings, encoders, revision, hashed)
    before = _weight_files(path)
    if path.suffix == ".safetensors":
        if weights not in (None, "raw"):
            raise ValueError(f"{path} is a released file and has one set of weights: omit --weights.")
        pipeline, note = nitro_e_pipeline(path, **released)
    else:
        pipeline, note = load_pipeline(path, weights, encoders, trust_code)
    pipeline.sampling = pipeline.sampling.replace(**settings)
    image_size(pipeline.transformer, pipeline.codec, pipeline.sampling)

    def generate(prompts: list[str], seeds: list[int]) -> Tensor:
        with enough_memory(len(prompts)):
            return pipeline(prompts, seed=seeds, output_type="pt").images * 2 - 1

    def to(device: torch.device, dtype: str) -> None:
        pipeline.transformer.to(device, DTYPES[dtype])

    sampling = {key: value for key, value in asdict(pipeline.sampling).items() if value is not None}
    return Model(note | _published(path, before if hashed else {}), sampling, generate, to, pipeline)


def load_pipeline(
    source: str | Path, weights: str | None = None, include_encoders: bool = True, trust_code: bool = False
) -> tuple[TextToImagePipeline, dict[str, Any]]:
    """A pipeline from a run folder, a checkpoint or an export; and a note on where its weights come from.

    Args:
        weights: "ema" or "raw" of a checkpoint; None: EMA if available.
        include_encoders: put the loaded encoders into the pipeline; without it only small ones of our own.
        trust_code: the config of a run may name classes of any package (see `runs.TRUSTED`).
    """
    source = Path(source)
    if is_diffusers_folder(source):
        if not (source / "model_index.json").is_file():
            raise ValueError(
                f"{source} holds a network alone, not a pipeline: it does not say which encoders belong to it. Export "
                "the run with `emmdit export`."
            )
        if weights not in (None, "raw"):
            raise ValueError(f"{source} is an export and has one set of weights: omit --weights.")
        return TextToImagePipeline.from_pretrained(source), {"source": str(source)}
    if not (source.exists() or source.is_symlink()):
        raise FileNotFoundError(f"There is nothing at {source}: give a run folder, a checkpoint or an export.")
    config = read_config(source)
    opened = open_checkpoint(source)  # once: a run that trains on replaces its files
    size = sum(value.nbytes for value in opened.state.values() if isinstance(value, Tensor))
    try:
        with BoundedMemory(size):
            module = build_module(config, latest_config(run_folder(source)), trust_code)
            network, kind = module.load_denoiser(opened, weights)
        pipeline = _make_pipeline(module, network, config["model"]["init_args"], include_encoders)
    except Unfit as error:
        raise ValueError(f"'{source}': {error}") from error
    note = {"source": str(source), "weights": kind, "step": opened.step, "samples_seen": opened.samples_seen}
    return pipeline, note | {"sha256": opened.sha256}


def _make_pipeline(
    module: LightningModule, network: nn.Module, settings: dict[str, Any], include_encoders: bool
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
        codec=_plain(settings["codec"]),
        text=_plain(settings["text"]),
        path=_plain(settings["path"]) if settings.get("path") else None,
        sampling=sampling.get("init_args", sampling),
    )


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Class path and arguments, without those that are None anyway."""
    arguments = {key: value for key, value in (settings.get("init_args") or {}).items() if value is not None}
    return {"class_path": settings["class_path"], "init_args": arguments}


def nitro_e_pipeline(
    file: Path,
    resolution: int = 512,
    steps: int = 20,
    guidance: float = 4.5,
    text_encoder: str = "meta-llama/Llama-3.2-1B",
    autoencoder: str = "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
) -> tuple[TextToImagePipeline, dict[str, Any]]:
    """The pipeline of a released file, and a note on it; its encoders are loaded when first used."""
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


# -- stock pipelines -----------------------------------------------------------------------------------


def _from_diffusers(
    source: Path | str, settings: dict[str, Any], encoders: bool, revision: str | None, hashed: bool
) -> Model:
    """A stock pipeline from a local folder (Path) or the hub (str); `settings` by the names in `SETTINGS`."""
    from diffusers import DiffusionPipeline

    if isinstance(source, Path):
        before = _weight_files(source) if hashed else {}
        index = DiffusionPipeline.load_config(source)
        parts = [name for name, value in index.items() if isinstance(value, list)]
        left_out = [] if encoders else [name for name in parts if name not in ("transformer", "scheduler")]
        options = {"local_files_only": True, "use_safetensors": True}
        with loading(str(source)):
            pipeline = DiffusionPipeline.from_pretrained(source, **options, **dict.fromkeys(left_out))
        note = {"pipeline": type(pipeline).__name__, **_published(source, before)}
    else:
        with one_sentence(source):
            pipeline = DiffusionPipeline.from_pretrained(
                source, revision=revision, use_safetensors=True, torch_dtype=torch.bfloat16
            )
        note = {"source": source, "revision": revision, "pipeline": type(pipeline).__name__}
    arguments = {SETTINGS[key]: value for key, value in settings.items()}
    pipeline.set_progress_bar_config(disable=True)
    if "height" in settings and "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        arguments["use_resolution_binning"] = False  # the size that was asked for, not the nearest training size

    def generate(prompts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with enough_memory(len(prompts)):
            return pipeline(prompts, generator=generators, output_type="pt", **arguments).images * 2 - 1

    def to(device: torch.device, dtype: str) -> None:
        pipeline.to(device, DTYPES[dtype])

    return Model(note, {**arguments, "scheduler": type(pipeline.scheduler).__name__}, generate, to, pipeline)


@contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
    """Raise a ValueError with one sentence where the memory does not suffice for a batch of images."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # of a GPU, and of a CPU, where torch has no class for it
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"The memory does not suffice for {batch_size} images of this size at once: lower --batch_size or the size."
        ) from error


def _pipeline_class(index: Path) -> str:
    """`_class_name` of a model_index.json, in present names."""
    content = read_json(index, "download the folder again")
    name = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{index} names no pipeline class (`_class_name`): download the folder again.")
    return modernize(name)


def _weight_files(path: Path) -> dict[Path, tuple[int, ...]]:
    """The safetensors files of an export, a pipeline's folder or a released file, with what changes when they do."""
    files = sorted(path.rglob("*.safetensors")) if is_diffusers_folder(path) else [path]
    stats = {file: file.stat() for file in files if file.suffix == ".safetensors" and file.is_file()}
    return {file: (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _published(path: Path, files: dict[Path, tuple[int, ...]]) -> dict[str, str]:
    """Name without an absolute path, since results are published, and hash of the weights that were loaded."""
    name = {"source": path.name if path.is_absolute() else str(path)}
    if not files:
        return name
    found = name | {"sha256": sha256_of(files)}
    if _weight_files(path) != files:
        raise ValueError(f"The weights in {path} changed while they were read: run the command again.")
    return found
