"""Bounds on the memory that a model's configuration may ask for: a small file may declare a huge network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SLACK = 2**24  # elements of tables and the like, which no file holds
STEP = 2**12  # elements that an operation counts for at least: so many tiny layers take time, not memory
COPIES = 4  # made of each byte of the weights: at construction, read, cast, moved


class Unfit(ValueError):
    """What a folder declares cannot be, in one sentence."""


class BoundedMemory(TorchDispatchMode):
    """A context in which torch makes no more tensors than weights of so many bytes can need.

    What an operation would make is found on the meta device before it runs.

    Args:
        size: of the weights in bytes.

    Raises:
        Unfit: at the tensor that exceeds the bound.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left = COPIES * size + SLACK

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if all(value.alias_info is None for value in func._schema.returns):  # neither a view nor in place
            self.left -= max(STEP, _elements(func, args, kwargs))
            if self.left < 0:
                raise Unfit(
                    "its configuration describes a model far larger than its weights: they do not belong together, "
                    "download or export it again."
                )
        return func(*args, **kwargs)


def bounded_folder(folder: str | Path) -> BoundedMemory:
    """Bounds for loading a folder: those of the safetensors files in it and in the folders of components."""
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*/*.safetensors")]
    return BoundedMemory(sum(file.stat().st_size for file in files if file.is_file()))


def _elements(func: Any, args: Any, kwargs: Any) -> int:
    """Elements of the tensors that the operation makes; 0 where the meta device cannot tell, as for `item`."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        made = func(*tree_map_only(Tensor, _meta, args), **tree_map_only(Tensor, _meta, kwargs))
    except Exception:  # any: the operation itself is what may fail
        return 0
    return sum(tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, Tensor))


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
