"""E-MMDiT, the denoiser of arXiv 2510.27135 (released as Nitro-E), as a diffusers model.

    latents -> patch embed + position -> blocks (full resolution)
            -> multi-path compression  -> blocks (few tokens)
            -> reconstruction + position once more -> blocks (full resolution) -> velocity

Text tokens run beside the image tokens through all blocks. The source of every choice: docs/papers.md, B2-B6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from emmdit.networks.emmdit.compression import TokenCompressor, TokenReconstructor
from emmdit.networks.emmdit.layers import EMMDiTBlock, Modulation, Subregion, Subregions, TimestepEmbedding, sincos_2d


@dataclass
class EMMDiTOutput(BaseOutput):
    """`sample`: prediction (B, C, H, W)."""

    sample: Tensor


class EMMDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Multimodal diffusion transformer with token compression; called with no argument, the released 512px network.

    Args:
        sample_size: side of the latent grid it is meant for (a default for sampling; any H x W with the right
            multiple works).
        patch_size: latent pixels per token side; the released network has 1.
        in_channels, out_channels: latent channels (32 for DC-AE f32).
        num_attention_heads, attention_head_dim: their product is the width D.
        block_groups: blocks before compression, on compressed tokens, and after reconstruction.
        caption_channels: width of the text features.
        ff_ratio: hidden width of the feed-forward in units of D.
        compression_ratios: one path for each ratio; () turns compression off.
        position_reinforcement: add the position table again after reconstruction.
        subregion_pattern: attention of block i is `pattern[i % len(pattern)]`; ("full",) turns it off.
        subregion_groups, subregion_run: number of groups, and the run length of "chunked".
        modulation: "affine" (E-MMDiT), "single" (PixArt) or "zero" (DiT).
        init: "faithful" (torch's defaults, random modulation) or "zero" (every gate and the output start at zero).
        pos_embed_max_size: side of the position table, of which the center is used.
        pos_embed_spacing: distance of neighboring positions; 1/6 in the released networks at 512 and 1024 px.

    Raises:
        ValueError: for a configuration that contradicts itself, before any layer is built.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EMMDiTBlock"]
    _repeated_blocks = ["EMMDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        out_channels: int = 32,
        num_attention_heads: int = 24,
        attention_head_dim: int = 32,
        block_groups: Sequence[int] = (4, 16, 4),
        caption_channels: int = 2048,
        ff_ratio: float = 3.0,
        compression_ratios: Sequence[int] = (2, 4),
        position_reinforcement: bool = True,
        subregion_pattern: Sequence[Subregion] = ("full", "strided", "chunked"),
        subregion_groups: int = 4,
        subregion_run: int = 4,
        modulation: Modulation = "affine",
        init: Literal["faithful", "zero"] = "faithful",
        pos_embed_max_size: int = 96,
        pos_embed_spacing: float = 1 / 6,
    ) -> None:
        super().__init__()
        check_config(self.config)
        dim = num_attention_heads * attention_head_dim
        depth = sum(block_groups)

        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        table = sincos_2d(pos_embed_max_size, dim, pos_embed_spacing)
        self.register_buffer("pos_table", table, persistent=False)
        self.context_embedder = nn.Linear(caption_channels, dim)
        self.time_embed = TimestepEmbedding(dim)
        self.time_modulation = None if modulation == "zero" else nn.Linear(dim, 6 * dim)

        self.blocks = nn.ModuleList(
            EMMDiTBlock(
                dim,
                num_attention_heads,
                ff_ratio,
                modulation,
                Subregions(subregion_pattern[i % len(subregion_pattern)], subregion_groups, subregion_run),
                context_pre_only=i == depth - 1,
            )
            for i in range(depth)
        )
        ratios = tuple(compression_ratios)
        self.compressor = TokenCompressor(dim, ratios) if ratios else None
        self.reconstructor = TokenReconstructor(dim, ratios) if ratios else None

        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, out_channels * patch_size**2)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What differs from torch's own initialization."""
        pairs = [(block.modulation, block.modulation_context) for block in self.blocks]
        adalns = [adaln for pair in pairs for adaln in pair if adaln is not None]
        if self.config.modulation == "zero":
            for adaln in adalns:
                nn.init.zeros_(adaln.linear.weight)
                nn.init.zeros_(adaln.linear.bias)
        if self.config.init == "faithful":
            return
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        if self.time_modulation is not None:
            gates = [2, 5]  # of shift, scale, gate, shift, scale, gate
            self.time_modulation.weight.unflatten(0, (6, -1))[gates] = 0
            self.time_modulation.bias.unflatten(0, (6, -1))[gates] = 0
            for adaln in adalns:
                adaln.bias[gates] = 0

    # -- forward -------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> EMMDiTOutput | tuple[Tensor]:
        """Predict the velocity.

        Args:
            hidden_states: noisy latents (B, C, H, W).
            timestep: (B,) or scalar on the 0..1000 scale.
            encoder_hidden_states: text features (B, T, caption_channels).
            encoder_attention_mask: (B, T), true where the text may be attended. The released network attends to
                padding too: pass nothing to be faithful.

        Raises:
            ValueError: when H, W or T do not fit compression and subregions.
        """
        p = self.config.patch_size
        self.check_sizes(*hidden_states.shape[2:], encoder_hidden_states.shape[1])
        height, width = hidden_states.shape[2] // p, hidden_states.shape[3] // p

        # from_pretrained(torch_dtype=...) casts parameters, but not the table
        position = self.position(height, width).to(self.patch_embed.weight.dtype)
        x = self.patch_embed(hidden_states).flatten(2).transpose(1, 2) + position
        c = self.context_embedder(encoder_hidden_states)
        time = self.time_embed(timestep.expand(len(x)))
        if self.time_modulation is not None:
            time = self.time_modulation(nn.functional.silu(time)).unflatten(1, (6, -1))
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()

        def run(group: int, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            for i in self.groups[group]:
                extra = self.attention_kwargs(i, height, width)
                if torch.is_grad_enabled() and self.gradient_checkpointing:
                    x, c = self._gradient_checkpointing_func(self.blocks[i], x, c, time, mask, extra)
                else:
                    x, c = self.blocks[i](x, c, time, mask, extra)
            return x, c

        x, c = run(0, x, c)
        skip, x = x, x if self.compressor is None else self.compressor(x, height, width)
        x, c = run(1, x, c)
        x = x if self.reconstructor is None else self.reconstructor(x, skip, height, width)
        x = x + position if self.config.position_reinforcement else x
        x, c = run(2, x, c)

        x = self.proj_out(self.norm_out(x))
        sample = x.unflatten(1, (height, width)).unflatten(-1, (p, p, -1))  # B, h, w, p, p, C
        sample = sample.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return EMMDiTOutput(sample=sample) if return_dict else (sample,)

    def attention_kwargs(self, index: int, height: int, width: int) -> dict[str, Any] | None:
        """What block `index` tells its attention beside tokens and mask; a linearized network needs the grids."""
        return None

    @property
    def groups(self) -> tuple[range, range, range]:
        """Indices of the blocks before compression, on compressed tokens, and after reconstruction."""
        before, middle, after = self.config.block_groups
        return range(before), range(before, before + middle), range(before + middle, before + middle + after)

    def token_grids(self, index: int, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """The grids, one after the other, that the image tokens of block `index` form; (height, width) uncompressed."""
        if self.compressor is None or index not in self.groups[1]:
            return ((height, width),)
        return tuple((height // ratio, width // ratio) for ratio in self.config.compression_ratios)

    def position(self, height: int, width: int) -> Tensor:
        """The center of the position table, (1, height * width, D)."""
        size = self.config.pos_embed_max_size
        top, left = (size - height) // 2, (size - width) // 2
        return self.pos_table[top : top + height, left : left + width].flatten(0, 1)[None]

    def check_token_grid(self, block: str) -> None:
        """Raise a ValueError unless the tokens of `block`, a submodule's name, lie one for each patch of the image."""
        compressed = [f"blocks.{i}" for i in self.groups[1]] if self.compressor is not None else []
        if block in compressed:
            raise ValueError(
                f"{block} lies among the compressed tokens ({compressed[0]} to {compressed[-1]}), which are no grid of "
                "the image: name a block before or after them."
            )

    def check_sizes(self, height: int, width: int, text_length: int) -> None:
        """Raise a ValueError that names the number when latents (height, width) or the text length do not fit."""
        config, p = self.config, self.config.patch_size
        multiple = p * math.lcm(1, *config.compression_ratios)
        if height % multiple or width % multiple or not height * width:
            raise ValueError(
                f"Latents of {height} x {width} do not fit this network: both sides must be divisible by {multiple} "
                f"(patch size {p}, compression ratios {tuple(config.compression_ratios)})."
            )
        height, width = height // p, width // p
        if max(height, width) > config.pos_embed_max_size:
            raise ValueError(
                f"A grid of {height} x {width} tokens is larger than the position table of side "
                f"{config.pos_embed_max_size}: raise pos_embed_max_size."
            )
        for i, block in enumerate(self.blocks):
            grids = self.token_grids(i, height, width)
            tokens, compressed = sum(h * w for h, w in grids), "compressed " * (grids != ((height, width),))
            need, kind = block.attn.subregions.multiple, block.attn.subregions.kind
            for count, what in ((tokens, f"{compressed}image tokens"), (text_length, "text tokens")):
                if count % need:
                    raise ValueError(
                        f"{count} {what} cannot be split into the {kind} subregions of block {i}: "
                        f"the count must be divisible by {need} (subregion_groups x run); change the size, or turn "
                        f'subregions off with subregion_pattern ["full"].'
                    )

    # -- speed ---------------------------------------------------------------------------------------

    def fuse_qkv_projections(self) -> None:
        """One matrix product in place of three for queries, keys and values (inference; `unfuse` before training)."""
        for block in self.blocks:
            block.attn.fuse()

    def unfuse_qkv_projections(self) -> None:
        for block in self.blocks:
            block.attn.unfuse()

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compile each block in place; arguments as `torch.compile`.

        All blocks share one forward function, but subregions, token counts, the last block and the gradient mode
        make a dozen graphs of it: beyond torch's limit of 8 blocks would run uncompiled, with a warning at most.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        super().compile_repeated_blocks(*args, **kwargs)


COUNTS = ("sample_size", "patch_size", "in_channels", "out_channels", "num_attention_heads", "attention_head_dim")
COUNTS += ("caption_channels", "subregion_groups", "subregion_run", "pos_embed_max_size")


def check_config(config) -> None:
    """Raise a ValueError with one sentence when an E-MMDiT configuration contradicts itself."""
    for name in COUNTS:
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {config[name]!r:.80}.")
    dim = config.num_attention_heads * config.attention_head_dim
    groups, ratios = tuple(config.block_groups), tuple(config.compression_ratios)
    if len(groups) != 3 or min(groups) < 0 or sum(groups) < 1:
        raise ValueError(f"block_groups must be three counts (before, compressed, after), got {groups}.")
    if groups[2] < 1 and ratios:
        raise ValueError(f"block_groups {groups} end in compressed tokens: the last count must be at least 1.")
    if dim % 4:
        raise ValueError(f"The width {dim} (heads x head size) must be divisible by 4.")
    for ratio in ratios:
        if ratio < 2 or dim % ratio**2:
            raise ValueError(f"Compression ratio {ratio} needs a width divisible by {ratio}^2, got {dim}.")
    grid = config.sample_size / config.patch_size
    multiple = math.lcm(1, *ratios)
    if grid % multiple:
        raise ValueError(
            f"sample_size {config.sample_size} gives a grid of side {grid:g}, not divisible by {multiple} as the "
            f"compression ratios {ratios} need."
        )
    unknown = set(config.subregion_pattern) - {"full", "strided", "chunked"}
    if unknown or not config.subregion_pattern:
        raise ValueError(f"subregion_pattern takes full, strided and chunked, got {list(config.subregion_pattern)}.")
    if config.modulation not in ("affine", "single", "zero"):
        raise ValueError(f"modulation must be affine, single or zero, got {config.modulation!r}.")
    if config.init not in ("faithful", "zero"):
        raise ValueError(f"init must be faithful or zero, got {config.init!r}.")
