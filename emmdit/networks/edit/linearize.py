"""`linearize`: a teacher becomes its linear attention student, in place and with the teacher's weights.

    PixArtTransformer2DModel  -> EDiTTransformer2DModel          self-attention is linear, cross-attention stays
    SD3Transformer2DModel     -> MMEDiTTransformer2DModel        joint attention is hybrid, SD3.5's second one linear
    EMMDiTTransformer2DModel  -> HybridEMMDiTTransformer2DModel  joint attention is hybrid; our own extension

A student is a subclass of its teacher's class: the stock diffusers pipelines take it, and `save_pretrained` and
`from_pretrained` work since its config carries the choices under `attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from diffusers import ModelMixin, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from emmdit.networks.edit.attention import ConvFusion, LinearAttention, SpatialCompressor
from emmdit.networks.edit.baselines import MixFeedForward, TokenMLP
from emmdit.networks.edit.config import AttentionChoices
from emmdit.networks.edit.grids import Grids
from emmdit.networks.edit.hybrid import HybridAttention
from emmdit.networks.emmdit.model import EMMDiTTransformer2DModel

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k")
PROMPT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")
ModelMixin = ModelMixin  # a saved pipeline finds how to load a student by this name, in the student's own module
NEW = (ConvFusion, SpatialCompressor, TokenMLP, MixFeedForward)


def linearize(network: nn.Module, **choices: Any) -> nn.Module:
    """Turn a teacher into its student in place, and return it.

    Args:
        network: a `PixArtTransformer2DModel`, `SD3Transformer2DModel` or `EMMDiTTransformer2DModel`. Its projections,
            norms and feed-forwards go on in the student; keep a copy (or load it twice) to distil from it.
        choices: fields of `AttentionChoices`, or a `baseline` of the papers' tables to start from ("linear", "sana",
            "linfusion", "kv_compression"); with none, the paper's form.

    New weights are drawn from torch's global generator and have the teacher's device and dtype.

    Raises:
        ValueError: for another network, for a student, or for choices that do not fit; it is then unchanged.
    """
    if type(network) in STUDENTS.values():
        raise ValueError(f"This {type(network).__name__} is a student already: linearize its teacher.")
    if type(network) not in STUDENTS:
        known = ", ".join(teacher.__name__ for teacher in STUDENTS)
        raise ValueError(f"linearize knows no student of a {type(network).__name__}, only of {known}.")
    student = STUDENTS[type(network)]
    student.replace_attention(network, AttentionChoices.of(choices))
    network.__class__ = student
    return network


def parameter_names(student: nn.Module, part: Literal["new", "attention", "all"]) -> list[str]:
    """Names of the student's parameters that a distillation may train.

    - "new": what has no counterpart in the teacher (ConvFusion, compressors, token maps, Mix-FFN);
    - "attention": every replaced attention with all its projections, and Mix-FFN (LinFusion's recipe);
    - "all".
    """
    kinds = {"new": NEW, "attention": (LinearAttention, MixFeedForward), "all": (nn.Module,)}
    if part not in kinds:
        raise ValueError(f"part must be one of {', '.join(kinds)}, got {part!r}.")
    within = [f"{name}." if name else "" for name, module in student.named_modules() if isinstance(module, kinds[part])]
    names = [name for name, _ in student.named_parameters() if name.startswith(tuple(within))]
    if not names:
        raise ValueError(f'This {type(student).__name__} has no "{part}" parameters: train "attention" or "all".')
    return names


def train_only(student: nn.Module, part: Literal["new", "attention", "all"]) -> list[str]:
    """Freeze all but one part (see `parameter_names`); returns the names of what trains."""
    names = set(parameter_names(student, part))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    return sorted(names)


def attention_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Attention that a student replaces, by name, in student and teacher alike: where features are compared."""
    for teacher, (blocks, names) in LAYERS.items():
        if isinstance(network, teacher):
            return {
                f"{blocks}.{i}.{name}": getattr(block, name)
                for i, block in enumerate(getattr(network, blocks))
                for name in names
                if getattr(block, name) is not None
            }
    raise ValueError(f"There is no list of attention layers for a {type(network).__name__}.")


# -- students ----------------------------------------------------------------------------------------


def with_arguments_of(teacher: type) -> Callable[[Callable], Callable]:
    """Show the teacher's arguments beside `attention`: `from_pretrained` and YAMLs read them off the signature."""

    def decorate(init: Callable) -> Callable:
        theirs = inspect.signature(teacher.__init__, eval_str=True).parameters.values()
        own = inspect.signature(init, eval_str=True).parameters["attention"]
        init.__signature__ = inspect.Signature([*theirs, own])
        return init

    return decorate


class EDiTTransformer2DModel(PixArtTransformer2DModel):
    """EDiT: PixArt with linear compressed self-attention (papers.md A1-A4). Called like PixArt, for any grid.

    Args:
        attention: fields of `AttentionChoices`, or a `baseline`; None: the paper's form.
    """

    @with_arguments_of(PixArtTransformer2DModel)
    def __init__(self, *args, attention: dict[str, Any] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.replace_attention(AttentionChoices.of(attention or {}))

    def replace_attention(self, choices: AttentionChoices) -> None:
        replace_in(self, self.transformer_blocks, {"attn1": LinearAttention}, choices)
        for block in self.transformer_blocks:  # what is given to self-attention is given to cross-attention too
            tell_not(block.attn1, block.attn2)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ):
        """As `PixArtTransformer2DModel.forward`."""
        grids = token_grids(hidden_states, self.config.patch_size)
        return super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs=added_cond_kwargs,
            cross_attention_kwargs={**(cross_attention_kwargs or {}), "grids": grids},
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )


class MMEDiTTransformer2DModel(SD3Transformer2DModel):
    """MM-EDiT: SD3 and SD3.5 with hybrid joint attention (papers.md A5). Called like SD3, for any grid.

    SD3.5-Medium's second, image-only attention becomes linear compressed attention, since it is image-to-image.

    Args:
        attention: fields of `AttentionChoices`, or a `baseline`; None: the paper's form.
    """

    @with_arguments_of(SD3Transformer2DModel)
    def __init__(self, *args, attention: dict[str, Any] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.replace_attention(AttentionChoices.of(attention or {}))

    def replace_attention(self, choices: AttentionChoices) -> None:
        second = {"attn2": LinearAttention} if choices.second_attention == "linear" else {}
        replace_in(self, self.transformer_blocks, {"attn": HybridAttention, **second}, choices)
        for block in self.transformer_blocks:
            tell_not(block.attn, block.attn2)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ):
        """As `SD3Transformer2DModel.forward`."""
        grids = token_grids(hidden_states, self.config.patch_size)
        return super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            block_controlnet_hidden_states=block_controlnet_hidden_states,
            joint_attention_kwargs={**(joint_attention_kwargs or {}), "grids": grids},
            return_dict=return_dict,
            skip_layers=skip_layers,
        )


class HybridEMMDiTTransformer2DModel(EMMDiTTransformer2DModel):
    """E-MMDiT with the hybrid joint attention of MM-EDiT: no paper has this one; the choices below are ours.

    - Subregions: a replaced block attends to the whole grid, with all of the text. Subregions are there to cut a
      quadratic cost that is gone, compressed keys can not be cut into the same groups, and convolutions need whole
      rows. To leave the subregion blocks to the teacher's attention, name the others in `layers`.
    - Compressed tokens: the blocks in the middle hold one grid for each compression ratio; ConvFusion and compressor
      run on each by itself, attention over all of them.

    Args:
        attention: fields of `AttentionChoices`, or a `baseline`; None: the paper's form.
    """

    @with_arguments_of(EMMDiTTransformer2DModel)
    def __init__(self, *args, attention: dict[str, Any] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.replace_attention(AttentionChoices.of(attention or {}))

    def replace_attention(self, choices: AttentionChoices) -> None:
        replace_in(self, self.blocks, {"attn": HybridAttention}, choices)

    def attention_kwargs(self, index: int, height: int, width: int) -> dict[str, Any] | None:
        if not isinstance(self.blocks[index].attn, HybridAttention):
            return None
        if self.compressor is not None and self._group(index) == 1:
            return {"grids": tuple((height // r, width // r) for r in self.config.compression_ratios)}
        return {"grids": ((height, width),)}

    def fuse_qkv_projections(self) -> None:
        raise ValueError("A linearized E-MMDiT has no fused projections: its queries and keys read different tokens.")


STUDENTS: dict[type, type] = {
    PixArtTransformer2DModel: EDiTTransformer2DModel,
    SD3Transformer2DModel: MMEDiTTransformer2DModel,
    EMMDiTTransformer2DModel: HybridEMMDiTTransformer2DModel,
}
LAYERS: dict[type, tuple[str, tuple[str, ...]]] = {
    PixArtTransformer2DModel: ("transformer_blocks", ("attn1",)),
    SD3Transformer2DModel: ("transformer_blocks", ("attn", "attn2")),
    EMMDiTTransformer2DModel: ("blocks", ("attn",)),
}


# -- replacing ---------------------------------------------------------------------------------------


def replace_in(
    network: nn.Module, blocks: nn.ModuleList, kinds: Mapping[str, type[LinearAttention]], choices: AttentionChoices
) -> None:
    """Replace the layers named in `kinds` in the chosen blocks, and note the choices in the network's config."""
    check(network, blocks, choices)
    for i, block in enumerate(blocks):
        if choices.replaces(i):
            for name, kind in kinds.items():
                if getattr(block, name) is not None:
                    setattr(block, name, replaced(getattr(block, name), kind, choices))
            replace_feed_forward(block, choices)
    network.register_to_config(attention=choices.as_config())


def check(network: nn.Module, blocks: nn.ModuleList, choices: AttentionChoices) -> None:
    """Refuse before anything is replaced."""
    outside = [i for i in choices.layers or () if not 0 <= i < len(blocks)]
    if outside:
        raise ValueError(f"There is no block {outside[0]} to linearize: the network has blocks 0 to {len(blocks) - 1}.")
    for module in network.modules():
        if getattr(module, "fused_projections", False) or getattr(module, "to_qkv", None) is not None:
            raise ValueError("This network's projections are fused: call unfuse_qkv_projections() before linearize.")


def replaced(attention: nn.Module, kind: type[LinearAttention], choices: AttentionChoices) -> LinearAttention:
    """The student of one attention layer, with its weights, device, dtype and mode."""
    names = PROJECTIONS + (PROMPT_PROJECTIONS if kind is HybridAttention else ())
    student = kind({name: getattr(attention, name) for name in names}, attention.heads, choices)
    return like(student, attention.to_q.weight).train(attention.training)


def replace_feed_forward(block: nn.Module, choices: AttentionChoices) -> None:
    if choices.feed_forward == "mix":
        weight = next(block.ff.parameters())  # of its first Linear, which reads the tokens
        block.ff = like(MixFeedForward(weight.shape[1], choices.mix_ratio), weight).train(block.ff.training)
        block.register_forward_pre_hook(tell_feed_forward, with_kwargs=True)


def tell_feed_forward(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Find the grids in a block's arguments (checkpointing passes all by position) for its `MixFeedForward`."""
    for given in (*args, *kwargs.values()):
        if isinstance(given, dict) and "grids" in given:
            block.ff.grids = given["grids"]


def like(module: nn.Module, tensor: Tensor) -> nn.Module:
    return module.to(tensor.device, tensor.dtype)


class WithoutGrids:
    """A diffusers attention processor beside linearized layers: it is told the grids as they are, and needs none."""

    def __init__(self, processor: Callable) -> None:
        self.processor = processor

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        grids: Grids | None = None,
    ) -> Any:
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


def tell_not(*attentions: nn.Module | None) -> None:
    for attention in attentions:
        if isinstance(attention, Attention):
            attention.set_processor(WithoutGrids(attention.processor))


def token_grids(latents: Tensor, patch_size: int) -> Grids:
    """The grid of latents (B, C, H, W)."""
    height, width = latents.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"Latents of {height} x {width} do not fit patches of {patch_size} x {patch_size}.")
    return ((height // patch_size, width // patch_size),)
