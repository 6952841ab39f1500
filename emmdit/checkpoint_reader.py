"""Sharded checkpoints read without running code from them: `.metadata` and the entries of `.distcp` files."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

RECORDS = (
    *(BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties),
    *(TensorStorageMetadata, _StorageInfo),
)
OTHERS = (torch.Size, _get_layout, _MEM_FORMAT_ENCODING, OrderedDict, dict, list, set, tuple)
# All that `.metadata` may name: what torch's own writer puts there.
ALLOWED: dict[tuple[str, str], Any] = {
    **{(entry.__module__, entry.__name__): entry for entry in (*RECORDS, *OTHERS)},
    **{("torch", name): kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)},
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},  # the latter: Python 3.13
}


def read_metadata(file: Path) -> Metadata:
    """The `.metadata` of a sharded checkpoint.

    Raises:
        FileNotFoundError, ValueError: with one sentence; nothing that the file names has been imported or called.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is not a whole sharded checkpoint: it has no {file.name}.")
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream, file).load()
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # bytes that are no pickle end in almost any kind
        raise unreadable(file, error) from error
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise ValueError(f"{file} is not the metadata of a sharded checkpoint.")
    places = getattr(metadata, "storage_data", None)
    names = [getattr(p, "relative_path", None) for p in places.values()] if isinstance(places, dict) else [None]
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{file} names shards outside its folder, or none: it is not the metadata of a checkpoint.")
    return metadata


def load_sharded(state: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    """`torch.distributed.checkpoint.load` from `folder` into `state`, in place.

    Args:
        no_dist: in this process alone; otherwise all ranks call it.

    Raises:
        FileNotFoundError, ValueError: with one sentence, on every rank.
    """
    reader = SafeReader(folder)
    reader.read_metadata()  # for its sentence: torch wraps what readers raise
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what no_dist asks for
            load(state, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:  # a BaseException, with one cause for each rank that failed
        raise unreadable(folder, next(iter(error.failures.values()))[0]) from error


def unreadable(path: Path, error: BaseException) -> ValueError:
    told = str(error).splitlines() or [type(error).__name__]
    return ValueError(f"{path} is not a readable checkpoint ({told[0].rstrip('.')}).")


class SafeReader(FileSystemReader):
    """torch's reader of a sharded checkpoint, without its `pickle.load`: tensors, numbers, strings and containers.

    torch reads tensors with `weights_only` itself, but not what else an optimizer's state holds.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        return super().read_data(plan, _SafePlanner(planner))


class _SafePlanner:
    """A planner whose `load_bytes`, which unpickles, is given bytes that were written here."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        own = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), own)
        own.seek(0)
        self._planner.load_bytes(read_item, own)


class _Refused(Exception):
    pass


class _Unpickler(pickle._Unpickler):  # the one in Python, since no step of the one in C can be replaced
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Refused(
                f"{self.file} names {module}.{name}, which the metadata of a sharded checkpoint never does: it is not "
                "opened, since that could run code."
            )
        return ALLOWED[module, name]

    def load_build(self) -> None:
        if type(self.stack[-2]) not in RECORDS:  # attributes of a class would be set for the whole process
            raise _Refused(f"{self.file} is not the metadata of a checkpoint: it changes more than its own records.")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
