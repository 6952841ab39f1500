"""Conversion between released Nitro-E files and our network.

Only names and, for 1x1 convolutions, two trailing axes differ. Files from training also hold the projector of REPA,
`projectors.0.*`, which is no part of the network (`emmdit.losses.REPA` has it): see `load_nitro_e`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emmdit.networks.emmdit.layers import sincos_2d
from emmdit.networks.emmdit.model import EMMDiTTransformer2DModel

# Our names as regular expressions, and the released ones; all are applied in turn.
_RENAMES = [
    (r"^patch_embed\.", "pos_embed.proj."),
    (r"^time_embed\.", "adaln_single.emb.timestep_embedder."),
    (r"^time_modulation\.", "adaln_single.linear."),
    (r"^reconstructor\.merge\.proj_in", "tokenreconstructor.0.0.mergers.0"),
    (r"^reconstructor\.merge\.proj_out", "tokenreconstructor.0.0.mergers.2"),
    (r"^(compressor|reconstructor)\.paths\.0", r"token\1.0.0.body2x"),
    (r"^(compressor|reconstructor)\.paths\.1", r"token\1.0.0.body4x"),
    (r"(body\dx)\.proj_in", r"\1.1"),
    (r"(body\dx)\.proj_out", r"\1.3"),
    (r"\.attn\.to_out", ".attn.to_out.0"),
    (r"\.(ff|ff_context)\.proj_in", r".\1.net.0.proj"),
    (r"\.(ff|ff_context)\.proj_out", r".\1.net.2"),
    (r"\.modulation\.(\w+)$", r".scale_shift_\1"),
    (r"\.modulation_context\.(\w+)$", r".scale_shift_\1_c"),
]
_POSITION = "pos_embed.pos_embed"
PROJECTOR = "projectors.0."
_PROJECTOR_KEYS = {f"{PROJECTOR}{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
_RESOLUTIONS = {512: (16, ("full", "strided", "chunked")), 1024: (32, ("full",))}


def released_name(name: str, block_groups: Sequence[int]) -> str:
    """The released file's key for one of our parameter names."""
    for ours, theirs in _RENAMES:
        name = re.sub(ours, theirs, name)
    if match := re.match(r"blocks\.(\d+)\.", name):
        group, index = 0, int(match[1])
        while index >= block_groups[group]:
            index -= block_groups[group]
            group += 1
        return f"block_groups.{group}.{index}.{name.removeprefix(match[0])}"
    return name


def load_nitro_e(path: str | Path, resolution: int = 512) -> EMMDiTTransformer2DModel:
    """Read a released Nitro-E `.safetensors` file, strictly.

    Widths, heads, depths and table size are read off the tensors. `resolution` picks what they cannot tell: 512 is
    subregion attention on a 16 x 16 grid, 1024 plain attention on 32 x 32. What a file from training holds beside the
    network, REPA's projector, becomes the attribute `training_tensors` (key -> tensor; {} for inference files): no part
    of the state dict, adopted by `REPA.attach`, and written back by `save_nitro_e`.

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
    training = {key: released.pop(key).clone() for key in sorted(released) if key.startswith(PROJECTOR)}
    if training and training.keys() != _PROJECTOR_KEYS:
        odd = ", ".join(sorted(training.keys() ^ _PROJECTOR_KEYS))
        raise ValueError(f"{path} does not hold the projector of Nitro-E's REPA: missing or unknown are {odd}.")
    with torch.device("meta"):
        network = EMMDiTTransformer2DModel(**config)

    state = {}
    for name, own in network.state_dict().items():
        key = released_name(name, config["block_groups"])
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
    network.training_tensors = training
    return network.eval()


def save_nitro_e(network: EMMDiTTransformer2DModel, path: str | Path, projector: nn.Module | None = None) -> None:
    """Write a network of the released kind as a Nitro-E file; bit for bit the file it was loaded from.

    Args:
        projector: that of a trained `REPA`, for a file to train on with; by default what the network was loaded with.
    """
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
    if projector is not None:
        released |= {f"{PROJECTOR}{name}": tensor.contiguous() for name, tensor in projector.state_dict().items()}
    else:
        released |= getattr(network, "training_tensors", {})
    save_file({key: tensor.cpu() for key, tensor in released.items()}, path)


def to_released(tensors: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Rename a state dict (or gradients) of ours to the released layout."""
    released = {}
    for name, tensor in tensors.items():
        key = released_name(name, config.block_groups)
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
    sample_size, pattern = _RESOLUTIONS[resolution]
    try:
        dim, in_channels = released["pos_embed.proj.weight"].shape[:2]
        head_dim = released["block_groups.0.0.attn.norm_q.weight"].shape[0]
        return dict(
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
    except KeyError as error:
        raise ValueError(f"{path} is not a Nitro-E network: it has no tensor {error}.") from error
