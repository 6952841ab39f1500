"""`EMMDiTPipeline`: a denoiser with what it needs to make pictures, as a diffusers pipeline.

A folder holds the network, the settings of codec, text conditioner, path and sampling, and small encoders. Large or
licensed ones (Llama, DC-AE) are named, not copied, unless `include_encoders` was asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from emmdit.encoders import ImageCodec, TextConditioner
from emmdit.flow import Path, RectifiedFlow
from emmdit.generate import Sampling, generate

DEFAULT_CODEC = {"class_path": "emmdit.encoders.DCAE"}
DEFAULT_TEXT = {"class_path": "emmdit.encoders.TextEncoder"}
DEFAULT_PATH = {"class_path": "emmdit.flow.RectifiedFlow"}


class EMMDiTPipelineOutput(BaseOutput):
    """`images`: list of PIL images, an array (B, H, W, 3) in [0, 1], or a tensor (B, 3, H, W) in [0, 1]."""

    images: list[Image.Image] | np.ndarray | Tensor


class EMMDiTPipeline(DiffusionPipeline):
    """Text to image with E-MMDiT or any denoiser of the same call.

    Args:
        transformer: the denoiser.
        vae, text_encoder, tokenizer: modules of the codec and the text conditioner; None: loaded from the source that
            `codec` and `text` name, at first use.
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
        settings = dict(
            codec=codec or DEFAULT_CODEC, text=text or DEFAULT_TEXT, path=path or DEFAULT_PATH, sampling=sampling or {}
        )
        self.register_to_config(**settings)
        self.sampling = Sampling(**settings["sampling"])
        self.path: Path = build(settings["path"]) if path else RectifiedFlow()
        self.codec: ImageCodec = build(settings["codec"])
        self.text: TextConditioner = build(settings["text"])
        if vae is not None:
            self.codec.adopt(vae)
        if text_encoder is not None:
            self.text.adopt(text_encoder, tokenizer)

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
    ) -> EMMDiTPipelineOutput:
        """Make pictures.

        Args:
            prompt: one or several.
            seed: of the first picture, the others count on from it; or one for each picture.
            num_inference_steps, guidance_scale, height, width, sampler: in place of the pipeline's own settings.
            output_type: "pil", "np" or "pt".
            callback: called as `callback(i, n)` after each step.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        given = dict(
            steps=num_inference_steps, guidance=guidance_scale, height=height, width=width, sampler=sampler
        )
        device = self.transformer.device
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
        return EMMDiTPipelineOutput(images=VaeImageProcessor().postprocess(images, output_type=output_type))


def build(settings: dict[str, Any]) -> Any:
    """Make the object that `{"class_path": ..., "init_args": ...}` names; only classes of this package."""
    path = settings["class_path"]
    module, _, name = path.rpartition(".")
    if module.split(".")[0] != "emmdit":
        raise ValueError(f"{path} is not a part of emmdit: a pipeline folder may name classes of this package only.")
    return getattr(importlib.import_module(module), name)(**settings.get("init_args") or {})
