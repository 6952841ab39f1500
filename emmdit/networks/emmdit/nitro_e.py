"""Released Nitro-E weights <-> our network: only names and, for 1x1 convolutions, two trailing axes differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emmdit.networks.emmdit.layers import sincos_2d
from emmdit.networks.emmdit.model import EMMDiTTransformer2DModel

# (ours, released), tried in order; {i} is a number.
_RENAMES = [
    ("patch_embed.", "pos_embed.proj."),
    ("time_embed.", "adaln_single.emb.timestep_embedder."),
    ("time_modulation.", "adaln_single.linear."),
    ("compressor.paths.{i}.proj_in.", "tokencompressor.0.0.body{r}x.1."),
    ("compressor.paths.{i}.proj_out.", "tokencompressor.0.0.body{r}x.3."),
    ("reconstructor.paths.{i}.proj_in.", "tokenreconstructor.0.0.body{r}x.1."),
    ("reconstructor.paths.{i}.proj_out.", "tokenreconstructor.0.0.body{r}x.3."),
    ("reconstructor.merge.proj_in.", "tokenreconstructor.0.0.mergers.0."),
    ("reconstructor.merge.proj_out.", "tokenreconstructor.0.0.mergers.2."),
    ("repa_projector.", "projectors.0."),
]
_BLOCK_RENAMES = [
    ("modulation.", "scale_shift_", ""),
    ("modulation_context.", "scale_shift_", "_c"),
]
_BLOCK_PLAIN = {
    "attn.to_out.": "attn.to_out.0.",
    "ff.proj_in.": "ff.net.0.proj.",
    "ff.proj_out.": "ff.net.2.",
    "ff_context.proj_in.": "ff_context.net.0.proj.",
    "ff_context.proj_out.": "ff_context.net.2.",
}
_POSITION = "pos_embed.pos_embed"
_RESOLUTIONS = {512: (16, ("full", "strided", "chunked")), 1024: (32, ("full",))}


def released_name(name: str, block_groups: tuple[int, int, int], ratios: tuple[int, ...]) -> str:
    """The released file's key for one of our parameter names."""
    if match := re.match(r"blocks\.(\d+)\.(.*)", name):
        index, rest = int(match[1]), match[2]
        group = 0
        while index >= block_groups[group]:
            index -= block_groups[group]
            group += 1
        for ours, theirs, suffix in _BLOCK_RENAMES:
            if rest.startswith(ours):
                rest = theirs + rest.removeprefix(ours) + suffix
        for ours, theirs in _BLOCK_PLAIN.items():
            if rest.startswith(ours):
                rest = theirs + rest.removeprefix(ours)
        return f"block_groups.{group}.{index}.{rest}"
    for ours, theirs in _RENAMES:
        for i, ratio in enumerate(ratios if "{i}" in ours else (0,)):
            prefix = ours.format(i=i)
            if name.startswith(prefix):
                return theirs.format(r=ratio) + name.removeprefix(prefix)
    return name


def load_nitro_e(path: str | Path, resolution: int = 512) -> EMMDiTTransformer2DModel:
    """Read a released Nitro-E `.safetensors` file, strictly.

    Widths, heads, depths and table size are read off the tensors. `resolution` picks what they can not tell: 512 is
    subregion attention on a 16 x 16 grid, 1024 plain attention on 32 x 32. Files from training also carry the REPA
    projector, which the network then has too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a Nitro-E network, or the resolution is neither 512 nor 1024.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No Nitro-E weights at {path}: give the path of a downloaded .safetensors file.")
    if resolution not in _RESOLUTIONS:
        raise ValueError(f"Nitro-E was released for 512 and 1024 px, got resolution {resolution}.")
    try:
        released = load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from error
    config = infer_config(released, resolution, path)
    with torch.device("meta"):
        network = EMMDiTTransformer2DModel(**config)

    state = {}
    for name, own in network.state_dict().items():
        key = released_name(name, tuple(config["block_groups"]), (2, 4))
        if key not in released:
            raise ValueError(f"{path} lacks the tensor {key}: it is not a complete Nitro-E network.")
        tensor = released.pop(key)
        _check_shape(path, key, tensor, (*own.shape, 1, 1) if _is_convolution(key) else tuple(own.shape))
        state[name] = tensor.reshape(own.shape).clone()  # out of the mapped file: it may be written to later
    table = released.pop(_POSITION)
    size, _, dim = network.pos_table.shape
    _check_shape(path, _POSITION, table, (1, size**2, dim))
    if released:
        raise ValueError(f"{path} holds tensors a Nitro-E network does not have: {', '.join(sorted(released)[:5])}.")
    # assign: the file's own dtype and bits, so that saving gives them back
    network.load_state_dict(state, assign=True)
    table = table.reshape(network.pos_table.shape)
    expected = sincos_2d(table.shape[0], table.shape[-1], network.config.pos_embed_spacing)
    if not torch.allclose(table.float(), expected, atol=1e-2):
        raise ValueError(f"{path}: its position table is not the one of Nitro-E (spacing 1/6).")
    network.pos_table = table.clone()
    return network.eval()


def save_nitro_e(network: EMMDiTTransformer2DModel, path: str | Path) -> None:
    """Write a network of the released kind as a Nitro-E file; bit for bit the file it was loaded from."""
    config = network.config
    if tuple(config.compression_ratios) != (2, 4) or config.modulation != "affine" or config.patch_size != 1:
        raise ValueError(
            "Only networks of the released kind (compression ratios 2 and 4, affine modulation, patch size 1) have a "
            "Nitro-E file; save others with save_pretrained."
        )
    if type(network) is not EMMDiTTransformer2DModel:
        raise ValueError(f"{type(network).__name__} has no Nitro-E file: save it with save_pretrained.")
    if network.blocks[0].attn.to_qkv is not None:
        raise ValueError("A Nitro-E file has no fused projections: call unfuse_qkv_projections() before saving.")
    released = to_released(network.state_dict(), config)
    released[_POSITION] = network.pos_table.flatten(0, 1)[None].contiguous()
    save_file({key: tensor.cpu() for key, tensor in released.items()}, path)


def to_released(tensors: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Rename a state dict (or gradients) of ours to the released layout."""
    released = {}
    for name, tensor in tensors.items():
        key = released_name(name, tuple(config.block_groups), tuple(config.compression_ratios))
        released[key] = (tensor[..., None, None] if _is_convolution(key) else tensor).contiguous()
    return released


def _is_convolution(key: str) -> bool:
    """Whether a released tensor is a 1x1 convolution's weight where ours is a Linear's."""
    return re.search(r"body\dx\.\d\.weight", key) is not None


def _check_shape(path: str | Path, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{path}: tensor {key} has shape {tuple(tensor.shape)}, expected {expected}.")


def infer_config(released: Mapping[str, Tensor], resolution: int, path: str | Path = "file") -> dict:
    """Configuration of `EMMDiTTransformer2DModel` from the shapes in a released file."""
    groups = [0, 0, 0]
    for key in released:
        if match := re.match(r"block_groups\.([0-2])\.(\d+)\.", key):
            groups[int(match[1])] = max(groups[int(match[1])], int(match[2]) + 1)
    required = ["pos_embed.proj.weight", _POSITION, "context_embedder.weight", "proj_out.weight"]
    required += ["block_groups.0.0.attn.norm_q.weight", "block_groups.0.0.ff.net.0.proj.weight"]
    required += ["projectors.0.4.weight"] if "projectors.0.0.weight" in released else []
    missing = [key for key in required if key not in released]
    if missing or not all(groups):
        raise ValueError(f"{path} is not a Nitro-E network: {', '.join(missing) or 'block groups'} not found in it.")
    dim, in_channels = released["pos_embed.proj.weight"].shape[:2]
    head_dim = released["block_groups.0.0.attn.norm_q.weight"].shape[0]
    sample_size, pattern = _RESOLUTIONS[resolution]
    config = dict(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=released["proj_out.weight"].shape[0],
        num_attention_heads=dim // head_dim,
        attention_head_dim=head_dim,
        block_groups=groups,
        caption_channels=released["context_embedder.weight"].shape[1],
        ff_ratio=released["block_groups.0.0.ff.net.0.proj.weight"].shape[0] / dim,
        subregion_pattern=list(pattern),
        pos_embed_max_size=int(released[_POSITION].shape[1] ** 0.5),
    )
    if "projectors.0.0.weight" in released:
        config["repa_projector_dim"] = released["projectors.0.0.weight"].shape[0]
        config["repa_feature_dim"] = released["projectors.0.4.weight"].shape[0]
    return config
