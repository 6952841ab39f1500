"""Student classes: teachers whose attention is replaced.

    PixArtTransformer2DModel  -> EDiTTransformer2DModel          self-attention is linear, cross-attention stays
    SD3Transformer2DModel     -> MMEDiTTransformer2DModel        joint attention is hybrid, SD3.5's second one linear
    EMMDiTTransformer2DModel  -> HybridEMMDiTTransformer2DModel  joint attention is hybrid; our own extension

A student is a subclass of its teacher, whose config carries `attention` beside the teacher's fields: stock diffusers
pipelines take it, and `save_pretrained`, `from_pretrained` and YAMLs work as for the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

# A saved pipeline asks the module of each part how to load it: ModelMixin must be a name of this one.
from diffusers import ConfigMixin, ModelMixin, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from emmdit.networks.edit.attention import LinearAttention
from emmdit.networks.edit.baselines import MixFeedForward, attention_class
from emmdit.networks.edit.config import LinearAttentionConfig
from emmdit.networks.edit.grids import Grids
from emmdit.networks.emmdit.model import EMMDiTTransformer2DModel


class Student(ModelMixin):
    """What the students share: the argument `attention`, fields of `LinearAttentionConfig`; None: the paper's form."""

    def __init__(self, *args: Any, attention: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_attention(self, LinearAttentionConfig.of(attention or {}))

    @staticmethod
    def _get_init_keys(student: type[Student]) -> set[str]:
        """What `from_config` and `from_pretrained` take from a config: the teacher's arguments, and ours."""
        return ConfigMixin._get_init_keys(teacher_class(student)) | {"attention"}


class EDiTTransformer2DModel(Student, PixArtTransformer2DModel):
    """EDiT: PixArt with linear compressed self-attention (docs/papers.md, A1 to A4). Called like PixArt, at any size.

    Args:
        attention: fields of `LinearAttentionConfig`; None: the paper's form. Others: the teacher's.
    """

    def forward(self, hidden_states: Tensor, *args: Any, cross_attention_kwargs: dict | None = None, **kwargs: Any):
        """As `PixArtTransformer2DModel.forward`, with `cross_attention_kwargs` by keyword."""
        extra = {**(cross_attention_kwargs or {}), "grids": token_grids(hidden_states, self.config.patch_size)}
        return super().forward(hidden_states, *args, cross_attention_kwargs=extra, **kwargs)


class MMEDiTTransformer2DModel(Student, SD3Transformer2DModel):
    """MM-EDiT: SD3 and SD3.5 with hybrid joint attention (docs/papers.md, A5). Called like SD3, at any size.

    SD3.5-Medium's second attention, of image tokens alone, becomes linear [ours: it is image-to-image].

    Args:
        attention: fields of `LinearAttentionConfig`; None: the paper's form. Others: the teacher's.
    """

    def forward(self, hidden_states: Tensor, *args: Any, joint_attention_kwargs: dict | None = None, **kwargs: Any):
        """As `SD3Transformer2DModel.forward`, with `joint_attention_kwargs` by keyword."""
        extra = {**(joint_attention_kwargs or {}), "grids": token_grids(hidden_states, self.config.patch_size)}
        return super().forward(hidden_states, *args, joint_attention_kwargs=extra, **kwargs)


class HybridEMMDiTTransformer2DModel(Student, EMMDiTTransformer2DModel):
    """E-MMDiT with the hybrid joint attention of MM-EDiT: no paper has this one; the choices below are ours.

    - Subregions: every block attends to the whole grid, with all of the text. Subregions are there to cut a quadratic
      cost that is gone, compressed keys cannot be cut into the same groups, and convolutions need whole rows.
    - Compressed tokens: the blocks in the middle hold one grid for each compression ratio; ConvFusion and compressor
      run on each by itself, attention over all of them.

    Args:
        attention: fields of `LinearAttentionConfig`; None: the paper's form. Others: the teacher's.
    """

    def attention_kwargs(self, index: int, height: int, width: int) -> dict[str, Any]:
        return {"grids": self.token_grids(index, height, width)}

    def fuse_qkv_projections(self) -> None:
        raise ValueError("A linearized E-MMDiT has no fused projections: its queries and keys read different tokens.")


# -- teachers and their students ---------------------------------------------------------------------

STUDENTS: dict[type, type[Student]] = {
    PixArtTransformer2DModel: EDiTTransformer2DModel,
    SD3Transformer2DModel: MMEDiTTransformer2DModel,
    EMMDiTTransformer2DModel: HybridEMMDiTTransformer2DModel,
}
# The list of blocks, and what is replaced in each: attention of "image" tokens among themselves, or "joint" attention.
LAYERS: dict[type, tuple[str, dict[str, Literal["image", "joint"]]]] = {
    PixArtTransformer2DModel: ("transformer_blocks", {"attn1": "image"}),
    SD3Transformer2DModel: ("transformer_blocks", {"attn": "joint", "attn2": "image"}),
    EMMDiTTransformer2DModel: ("blocks", {"attn": "joint"}),
}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
PROMPT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")


def teacher_class(student: type) -> type:
    """The teacher's class of a student's class, sharded ones included; for any other class, itself."""
    return next((teacher for teacher, own in STUDENTS.items() if issubclass(student, own)), student)


def replace_attention(network: nn.Module, config: LinearAttentionConfig) -> None:
    """Replace the attention of a teacher in place, and note it in its config."""
    blocks, layers = LAYERS[teacher_class(type(network))]
    for block in getattr(network, blocks):
        for name, kind in layers.items():
            if (attention := getattr(block, name)) is not None:
                setattr(block, name, student_of(attention, kind, config))
        for attention in block.children():
            if isinstance(attention, Attention):  # PixArt's cross-attention is given what its self-attention is given
                attention.set_processor(IgnoreGridsProcessor(attention.processor))
        if config.baseline == "sana":
            weight = next(block.ff.parameters())  # of its first Linear, which reads the tokens
            block.ff = MixFeedForward(weight.shape[1]).to(weight.device, weight.dtype).train(block.ff.training)
            block.ff.read_grids_of(getattr(block, next(iter(layers))))
    network.register_to_config(attention=dataclasses.asdict(config))


def student_of(attention: nn.Module, kind: Literal["image", "joint"], config: LinearAttentionConfig) -> LinearAttention:
    """The student of one attention layer, with its weights, device, dtype and mode."""
    names = PROJECTIONS + PROMPT_PROJECTIONS * (kind == "joint")
    modules = {name: getattr(attention, name) for name in names}
    student = attention_class(kind, config)(modules, attention.heads, config)
    weight = attention.to_q.weight
    return student.to(weight.device, weight.dtype).train(attention.training)


class IgnoreGridsProcessor:
    """A processor of diffusers attention that takes `grids` without a warning, and has no use for it."""

    def __init__(self, processor: Callable) -> None:
        self.processor = processor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, grids=None) -> Any:
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


def token_grids(latents: Tensor, patch_size: int) -> Grids:
    """The grid of latents (B, C, H, W)."""
    height, width = latents.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"Latents of {height} x {width} do not fit patches of {patch_size} x {patch_size}.")
    return ((height // patch_size, width // patch_size),)
