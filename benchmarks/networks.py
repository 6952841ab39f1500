"""Networks of the speed benchmark: released sizes (docs/papers.md, A4, A5, B1, B2), random weights, any resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from emmdit.networks import EMMDiTTransformer2DModel, linearize

FULL = {"subregion_pattern": ("full",)}
NO_COMPRESSION = {"compression_ratios": ()}
# Configurations of E-MMDiT, and the TFLOP of a forward pass at batch 1 of the original code. Only the first, 0.08, is
# published (AMD's blog); the others are our counts of the original class (docs/papers.md, B13).
COUNTS: dict[str, tuple[dict[str, Any], float]] = {
    "512 px, released": ({}, 0.080),
    "512 px, no subregions": (FULL, 0.083),
    "512 px, no compression": (NO_COMPRESSION, 0.114),
    "512 px, neither": (NO_COMPRESSION | FULL, 0.119),
    "1024 px, released": ({"sample_size": 32} | FULL, 0.246),
    "1024 px, no compression": ({"sample_size": 32} | NO_COMPRESSION | FULL, 0.423),
}


@dataclass(frozen=True)
class Network:
    """An original network, what it is called with, and where its attention is.

    Args:
        network, config: its class, and the arguments that are the same at all resolutions.
        resized: other arguments for images of `px` pixels a side: positions for as many tokens.
        one_block: arguments that leave one block of the usual kind, as the first.
        pixels: side of the image for each of the latents' side.
        text_tokens: of the prompt.
        blocks, attention: the list of blocks, and the attention in each that a student replaces.
        image_attention: the one of image tokens alone; None: there is only the joint one.
    """

    network: type[nn.Module]
    config: Mapping[str, Any]
    resized: Callable[[int], dict[str, Any]]
    one_block: Mapping[str, Any]
    pixels: int
    text_tokens: int
    blocks: str = "transformer_blocks"
    attention: str = "attn"
    image_attention: str | None = None

    def build(self, who: str, px: int | None = None, **config: Any) -> nn.Module:
        """The original or its student, float32, on torch's default device; without `px` as released."""
        resized = {} if px is None else self.resized(px)
        network = self.network(**{**self.config, **resized, **config})
        return linearize(network) if who == "student" else network

    def inputs(self, network: nn.Module, px: int, batch: int = 1) -> dict[str, Any]:
        """Arguments of a forward pass, random and in float32, on torch's default device."""
        side, config = px // self.pixels, network.config
        width = config["joint_attention_dim" if "joint_attention_dim" in config else "caption_channels"]
        given: dict[str, Any] = dict(
            hidden_states=torch.randn(batch, config.in_channels, side, side),
            timestep=torch.full((batch,), 500.0),
            encoder_hidden_states=torch.randn(batch, self.text_tokens, width),
        )
        if "pooled_projection_dim" in config:
            given["pooled_projections"] = torch.randn(batch, config.pooled_projection_dim)
        return given

    def tokens(self, network: nn.Module, px: int) -> int:
        return (px // self.pixels // network.config.patch_size) ** 2


NETWORKS: dict[str, Network] = {
    "PixArt-Sigma": Network(
        PixArtTransformer2DModel,
        dict(caption_channels=4096, use_additional_conditions=False),  # diffusers' other defaults are its sizes
        lambda px: dict(sample_size=px // 8, interpolation_scale=max(1, px // 512)),
        dict(num_layers=1),
        pixels=8,
        text_tokens=300,
        attention="attn1",
        image_attention="attn1",
    ),
    "SD3.5-Medium": Network(
        SD3Transformer2DModel,
        dict(num_layers=24, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536)
        | dict(joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384)
        | dict(dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        lambda px: dict(sample_size=px // 8, pos_embed_max_size=px // 16),
        # The last block has no text output; the first stands for the thirteen with two attentions.
        dict(num_layers=2, dual_attention_layers=(0,)),
        pixels=8,
        text_tokens=77 + 256,
        image_attention="attn2",
    ),
    "E-MMDiT": Network(
        EMMDiTTransformer2DModel,
        {},
        # Subregions at 512 px only, as released.
        lambda px: dict(sample_size=px // 32, pos_embed_max_size=max(96, px // 32)) | ({} if px <= 512 else FULL),
        dict(block_groups=(1, 0, 1)) | NO_COMPRESSION | FULL,
        pixels=32,
        text_tokens=128,
        blocks="blocks",
    ),
}


def counts() -> list[dict[str, Any]]:
    """Parameters and forward TFLOP of E-MMDiT's configurations, on the meta device."""
    rows, spec = [], NETWORKS["E-MMDiT"]
    for name, (config, original) in COUNTS.items():
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network = spec.build("original", **config)
            network(**spec.inputs(network, network.config.sample_size * spec.pixels))
        row = {"network": name, "parameters": sum(p.numel() for p in network.parameters())}
        rows.append(row | {"tflop": counter.get_total_flops() / 1e12, "tflop_original_code": original})
    return rows
