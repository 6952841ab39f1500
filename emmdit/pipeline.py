"""`TextToImagePipeline`: a denoiser with all it needs to generate images, as a diffusers pipeline.

A folder holds the network, the settings of codec, text conditioner, path and sampling, and small encoders. Large or
licensed ones (Llama, DC-AE) are named, not copied, unless `include_encoders` was asked for.
"""

from __future__ import annotations

import importlib
from numbers import Integral
from pathlib import Path as FilePath
from typing import Any, Self, TypeVar

import huggingface_hub
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines import ImagePipelineOutput
from safetensors import safe_open

from emmdit.bounded import Unfit
from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.encoders.loading import MissingModelError, loading, locate, one_sentence
from emmdit.flow import Path
from emmdit.generate import Sampling, check_finite, generate
from emmdit.legacy import modernize
from emmdit.weights import check_finite as check_finite_weights

CODEC = {"class_path": "emmdit.encoders.DCAE"}
TEXT = {"class_path": "emmdit.encoders.TextEncoder"}
PATH = {"class_path": "emmdit.flow.RectifiedFlow"}
FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]  # of a pipeline on the hub: configs, weights, tokenizers
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
LARGEST_ARGUMENT = 2**20  # of codec, text and path, which mean lengths, channels and pixels
T = TypeVar("T")


class TextToImagePipeline(DiffusionPipeline):
    """Text to image with E-MMDiT, or with any denoiser that is called like a diffusers transformer.

    >>> pipeline = TextToImagePipeline.from_pretrained("assets/shapes_emmdit")
    >>> pipeline("a photo of a red circle", seed=0).images[0].save("circle.png")

    Args:
        transformer: the denoiser.
        vae, text_encoder, tokenizer: modules of the codec and the text conditioner; None: loaded from the source that
            `codec` and `text` name, on first use.
        codec, text, path: `{"class_path": "emmdit....", "init_args": {...}}`, as in an experiment's YAML.
        sampling: fields of `emmdit.generate.Sampling`; the defaults of a call.
    """

    _optional_components = ["vae", "text_encoder", "tokenizer"]
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        codec: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        path: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        settings = dict(codec=codec or CODEC, text=text or TEXT, path=path or PATH, sampling=sampling or {})
        self.register_to_config(**settings)
        try:
            self.sampling = Sampling(**settings["sampling"])
        except (TypeError, ValueError) as error:
            raise Unfit(f"`sampling` of the pipeline does not fit ({str(error).rstrip('.')}).") from error
        self.path = build(settings["path"], Path)
        self.codec = build(settings["codec"], ImageCodec)
        self.text = build(settings["text"], TextConditioner)
        self._adopt()

    def _adopt(self) -> None:
        """Give codec and text conditioner the pipeline's modules; again after `to(dtype)` or a replacement."""
        if self.vae is not None and not _holds(self.codec, self.vae):
            self.codec.adopt(self.vae)
        if self.text_encoder is not None and not _holds(self.text, self.text_encoder):
            self.text.adopt(self.text_encoder, self.tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | FilePath, **kwargs: Any) -> Self:
        """From a local folder or a hub id; arguments as for every diffusers pipeline.

        The classes of this package that a folder names need no `trust_remote_code`; names of older versions are known.

        Raises:
            OSError: there is no such folder or repository.
            ValueError: the folder names a class that this version does not have, or its weights are not finite.
            MissingModelError: it lacks weights.
        """
        source, _ = locate(str(pretrained_model_name_or_path))
        if not FilePath(source).is_dir():
            # diffusers' own download refuses folders that name classes of another package
            names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
            options = {name: kwargs.pop(name) for name in names if name in kwargs}
            with one_sentence(source):
                source = huggingface_hub.snapshot_download(source, allow_patterns=FILES, **options)
        if not FilePath(source, "model_index.json").is_file():
            raise MissingModelError(f"'{source}' has no model_index.json: name a folder that holds a pipeline.")
        with loading(source):
            pipeline = super().from_pretrained(source, **{"use_safetensors": True, **kwargs})
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        for name, module in modules.items():
            if not kwargs.keys() & {name, "quantization_config"} and (
                missing := _missing(module, FilePath(source, name))
            ):
                raise MissingModelError(
                    f"'{source}' lacks {len(missing)} weights ({name}.{missing[0]}, ...): download or export it again."
                )
            check_finite_weights({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}, source)
            _own_memory(module)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, with names of older versions translated and our components' modules imported."""
        config = modernize(super().load_config(*args, **kwargs))
        for name, value in config.items():
            if name in COMPONENTS and not (isinstance(value, list) and len(value) == 2):
                raise Unfit(f"{name} of a pipeline is named by library and class, not {value!r:.80}.")
            if (
                isinstance(value, list)
                and all(isinstance(part, str) for part in value)
                and value[0].split(".")[0] == "emmdit"
            ):
                # diffusers looks a class up among imported modules, and for ModelMixin beside it: in its own file
                found = _find(*value)
                if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
                    raise Unfit(f"{'.'.join(value)} is not a network: the pipeline folder was made by another version.")
                value[0] = found.__module__
        return config

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        seed: int | list[int] = 0,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        output_type: str = "pil",
        callback=None,
    ) -> ImagePipelineOutput:
        """Generate images.

        Args:
            prompt: one or several.
            seed: of the first image, image i uses `seed + i`; or one for each image.
            num_inference_steps, guidance_scale, height, width, sampler: in place of the pipeline's own settings.
            output_type: "pil": a list of images; "np": an array (B, H, W, 3) in [0, 1]; "pt": a tensor (B, 3, H, W).
            callback: called as `callback(i, n)` after each step.

        Raises:
            ValueError: no prompt, or settings that no image can be made with; and, unless a tensor is asked for, an
                image that is not finite, which would be black. In a tensor it is NaN.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) for p in prompts) or num_images_per_prompt < 1:
            raise ValueError("Give at least one prompt, a text, and num_images_per_prompt of at least 1.")
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if not all(isinstance(s, Integral) and 0 <= s < 2**63 for s in seeds):
            raise ValueError(f"Seeds are whole numbers from 0 to 2**63 - 1, not {seed!r}.")
        given = dict(steps=num_inference_steps, guidance=guidance_scale, height=height, width=width, sampler=sampler)
        device = self.transformer.device
        self._adopt()
        self.codec.to(device)
        self.text.to(device)
        images = generate(
            self.transformer,
            self.codec,
            self.text,
            prompts,
            seeds,
            path=self.path,
            sampling=self.sampling.replace(**{k: v for k, v in given.items() if v is not None}),
            device=device,
            callback=callback,
        )
        if output_type != "pt":
            check_finite(images, prompts, seeds)
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(images, output_type=output_type))


EMMDiTPipeline = TextToImagePipeline  # its older name


def build(settings: dict[str, Any], kind: type[T]) -> T:
    """The object that `{"class_path": ..., "init_args": ...}` describes: a `kind` of this package, nothing else."""
    path = settings.get("class_path") if isinstance(settings, dict) else None
    arguments = (settings.get("init_args") or {}) if path is not None else {}
    if not isinstance(path, str) or not isinstance(arguments, dict):
        raise Unfit(f"The {kind.__name__} of a pipeline is named by class_path and init_args, not {settings!r:.80}.")
    for key, value in arguments.items():
        if isinstance(value, int) and value > LARGEST_ARGUMENT:
            raise Unfit(f"{path} with {key} {value:,} would take more memory than any pipeline needs.")
    module, _, name = path.rpartition(".")
    if module.split(".")[0] != "emmdit":
        raise Unfit(f"{path} is not a part of emmdit: a pipeline folder may name classes of this package only.")
    found = _find(module, name)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise Unfit(f"{path} is not a kind of {kind.__name__}: the pipeline folder was made by another version.")
    try:
        return found(**arguments)
    except TypeError as error:
        raise Unfit(f"{path} does not take what the pipeline folder gives it ({error}).") from error


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError) as error:
        raise Unfit(f"This version of emmdit cannot provide {module}.{name} ({error}).") from error


def _missing(module: torch.nn.Module, folder: FilePath) -> list[str]:
    """Tensors that the files do not hold, neither by name nor tied to one: diffusers only warns of random ones."""
    held: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            held.update(content.keys())
    state = module.state_dict()
    if not isinstance(module, ModelMixin) and held - state.keys():
        return []  # transformers has renamed some
    tied = {state[key].data_ptr() for key in held & state.keys()}
    return [
        key for key, tensor in state.items() if key not in held and (tensor.is_meta or tensor.data_ptr() not in tied)
    ]


@torch.no_grad()
def _own_memory(module: torch.nn.Module) -> None:
    """Copy tensors out of a memory-mapped file: its alignment makes CPU kernels round differently, so that a saved
    pipeline would not give the same bits, and writing to that file would change the weights."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _holds(wrapper: Any, module: torch.nn.Module) -> bool:
    return getattr(wrapper, "loaded", True) and wrapper.model is module and wrapper.dtype == module.dtype
