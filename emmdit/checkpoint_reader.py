"""Sharded checkpoints read without running code from them: `.metadata` and the entries of `.distcp` files."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
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

from emmdit.archive import Damaged, check_archive, unreadable
from emmdit.files import first_line, read_bytes
from emmdit.legacy import modern_key

RECORDS = (
    *(BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties),
    *(TensorStorageMetadata, _StorageInfo),
)
MAX_METADATA = 1 << 30  # bytes
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
        content = io.BytesIO(read_bytes(file, MAX_METADATA))  # its reads give no more than there is
        metadata = _Unpickler(content, file).load()
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # bytes that are no pickle end in almost any kind
        raise Damaged(file.parent, f"its .metadata cannot be read ({first_line(error)})") from error
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise ValueError(f"{file} is not the metadata of a sharded checkpoint.")
    try:
        check_bounds(metadata, file)
        return modernized(metadata)
    except (AttributeError, TypeError) as error:  # a record without its fields, or with others
        raise ValueError(f"{file} is not the metadata of a sharded checkpoint.") from error


def check_bounds(metadata: Metadata, file: Path) -> None:
    """Raise a ValueError with one sentence unless all that is declared lies in the shards beside `file`.

    So that no more memory is taken than the shards are large: each tensor's chunks cover it, each chunk has its own
    bytes of a shard, and those are at least as many as its elements take.
    """
    odd = ValueError(f"{file} is not the metadata of a checkpoint: what it declares is not in the shards beside it.")
    places = getattr(metadata, "storage_data", None)
    if not isinstance(places, dict) or not all(isinstance(key, MetadataIndex) for key in places):
        raise odd
    left: dict[str, int] = {}
    for place in places.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(
                f"{file} names shards outside its folder, or none: it is not the metadata of a checkpoint."
            )
        shard = file.with_name(name)
        if not shard.is_file():
            raise Damaged(file.parent, f"its shard {name} is missing")
        size = shard.stat().st_size
        left.setdefault(name, size)
        if not natural(place.offset, place.length) or place.transform_descriptors:
            raise odd
        left[name] -= place.length
        if place.offset + place.length > size or left[name] < 0:
            raise Damaged(file.parent, f"its shard {name} is cut short ({size:,} bytes)")
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        size, chunks = getattr(entry, "size", None), getattr(entry, "chunks", None)
        dtype = getattr(getattr(entry, "properties", None), "dtype", None)
        if not isinstance(key, str) or not isinstance(size, torch.Size) or not isinstance(dtype, torch.dtype):
            raise odd
        covered = 0
        for chunk in chunks if isinstance(chunks, list) else ():
            place = places.get(MetadataIndex(key, getattr(chunk, "offsets", None)))
            if place is None or not isinstance(chunk.sizes, torch.Size) or not natural(*chunk.sizes, *chunk.offsets):
                raise odd
            if math.prod(chunk.sizes) * dtype.itemsize > place.length:
                raise odd
            covered += math.prod(chunk.sizes)
        if not natural(*size) or covered != math.prod(size):
            raise odd


def natural(*numbers: Any) -> bool:
    return all(isinstance(number, int) and number >= 0 for number in numbers)


def modernized(metadata: Metadata) -> Metadata:
    """The metadata with present names of tensors, in place."""
    metadata.state_dict_metadata = {modern_key(key): entry for key, entry in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        dataclasses.replace(key, fqn=modern_key(key.fqn)): place for key, place in metadata.storage_data.items()
    }
    return metadata


def state_metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Sizes and dtypes of the state dict of a sharded checkpoint, by present names; reads no shard."""
    prefix = "state_dict."
    entries = read_metadata(folder / ".metadata").state_dict_metadata.items()
    return {
        key.removeprefix(prefix): entry
        for key, entry in entries
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """`torch.distributed.checkpoint.save`, which all ranks call; it syncs its files."""
    save(state, storage_writer=FileSystemWriter(folder))


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


class SafeReader(FileSystemReader):
    """torch's reader of a sharded checkpoint, without its `pickle.load`: tensors, numbers, strings and containers.

    torch reads tensors with `weights_only` itself, but not what else an optimizer's state holds.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _slice_file(self, file: Any, place: _StorageInfo) -> Any:
        file.seek(place.offset)
        stream = io.BytesIO(file.read(place.length))
        check_archive(stream, place.length, crcs=True)
        stream.seek(0)
        return stream

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
    del dispatch[pickle.BYTEARRAY8[0]]  # it makes an array of any size that is declared
