"""Reference statistics in clean-fid's npz format, and base classes of the metrics that compare with them."""

from __future__ import annotations

import json
import math
import zipfile
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from emmdit.evaluation.metrics.base import ImageMetric, Sample
from emmdit.evaluation.metrics.features import CLIPFeatures, FeatureExtractor
from emmdit.files import atomic_path, parse_json, sha256_of

MOST_COMPRESSED = 100  # bytes of an array from one in the file
MADE_WITH = "made_with"  # a JSON array beside clean-fid's, which clean-fid ignores


def write_reference(path: Path, arrays: dict[str, np.ndarray], made_with: dict[str, Any]) -> None:
    """Write `mu` and `sigma` for FID, or `feats` for KID and CMMD, which clean-fid expects in a file NAME_kid.npz."""
    with atomic_path(path) as part:
        np.savez_compressed(part, **arrays, **{MADE_WITH: np.array(json.dumps(made_with))})


def read_reference(path: str | Path, names: tuple[str, ...]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The named arrays, and what they were made with ({} in a file of clean-fid's own).

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no reference statistics '{path}': compute them with `emmdit reference-stats`."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: f"{name}.npy" for name in (*names, MADE_WITH) if f"{name}.npy" in archive.namelist()}
            found = {name: _read_array(archive, member, path.stat().st_size) for name, member in members.items()}
        made_with = parse_json(str(found.pop(MADE_WITH, "{}")))
    except Exception as error:  # damaged zips and headers end in almost any kind
        raise ValueError(
            f"'{path}' is no npz file of reference statistics: compute one with `emmdit reference-stats`."
        ) from error
    if not isinstance(made_with, dict) or not isinstance(made_with.get("features", {}), dict):
        raise ValueError(f"'{path}' has a damaged {MADE_WITH}: compute it again with `emmdit reference-stats`.")
    if len(found) < len(names):
        held, wanted = ("NAME_kid.npz", " with --feats") if "feats" in names else ("NAME.npz", "")
        raise ValueError(
            f"'{path}' lacks {' and '.join(names)}: name the file {held} that `emmdit reference-stats` writes{wanted}."
        )
    return found, made_with


def _read_array(archive: zipfile.ZipFile, member: str, size: int) -> np.ndarray:
    """An array of an npz file of `size` bytes; any error for one that declares more than the file can hold."""
    info = archive.getinfo(member)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("numpy does not compress like this")
    if info.file_size > MOST_COMPRESSED * max(1, min(info.compress_size, size)):
        raise ValueError("features do not compress like this")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if not dtype.itemsize or math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError("its header declares another size")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


class ReferenceMetric(ImageMetric):
    """Compares features of the images with a file of reference statistics.

    Args:
        features: makes the features; the reference must be made with the same.
        reference: npz file of `emmdit reference-stats`, or of clean-fid.
    """

    counted = True
    family: ClassVar[str]
    arrays: ClassVar[tuple[str, ...]]  # of the reference file

    def __init__(self, features: FeatureExtractor, reference: str) -> None:
        super().__init__()
        self.features, self.reference = features, reference
        self._reference: dict[str, np.ndarray] | None = None
        self._made_with: dict[str, Any] = {}

    @property
    def kind(self) -> str:
        # Numbers on CLIP's features and on Inception's share a formula and nothing else.
        return self.family + ("_clip" if isinstance(self.features, CLIPFeatures) else "")

    @property
    def name(self) -> str:
        return f"{self.family}_{self.features.name}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Read the reference, load the extractor, compare the two. FileNotFoundError, ValueError, MissingModelError."""
        arrays, self._made_with = read_reference(self.reference, self.arrays)
        self.features.prepare(device)
        self._compare(arrays)
        if self._reference is None:
            self._states()
        self._reference = arrays
        self.to(device)
        self.reset()

    @abstractmethod
    def _states(self) -> None:
        """`add_state`, once the dimension is known."""

    @abstractmethod
    def _take(self, vectors: Tensor, samples: list[Sample]) -> None:
        """Add the features of a batch."""

    def _compare(self, arrays: dict[str, np.ndarray]) -> None:
        again = "compute it again with `emmdit reference-stats`, or name another"
        dim = self.features.dim
        for name, array in arrays.items():
            shape = {"mu": (dim,), "sigma": (dim, dim)}.get(name, (len(array) if array.ndim else 0, dim))
            if array.shape != shape:
                raise ValueError(
                    f"The reference '{self.reference}' has {name} of shape {array.shape}, and '{self.features.name}' "
                    f"gives features of dimension {dim}: {again}."
                )
            if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
                raise ValueError(f"The reference '{self.reference}' holds {name} that is not finite: {again}.")
        if len(arrays.get("feats", "two")) < 2:
            raise ValueError(f"The reference '{self.reference}' is of fewer than 2 images: {again}.")
        theirs, ours = self._made_with.get("features", {}), json.loads(json.dumps(self.features.identity()))
        for key in theirs.keys() & ours.keys():  # a model of the hub has a revision, one in a folder a sha256
            if theirs[key] != ours[key]:
                what = {"name": "features", "resize": "a resize", "sha256": "weights"}.get(key, f"a {key}")
                raise ValueError(
                    f"The reference '{self.reference}' was made with {what} '{theirs[key]}', the images would be with "
                    f"'{ours[key]}': {again}."
                )

    def update(self, images: Tensor, samples: list[Sample]) -> None:
        if self._reference is None:
            raise RuntimeError(f"{self.name} must be prepared before its first image: call prepare(device).")
        self._take(self.features.extract(images), samples)

    def _enough(self, n: int) -> None:
        if n < 2:
            raise ValueError(f"{self.name} needs at least 2 images, got {n}: generate more.")

    def settings(self) -> dict[str, Any]:
        path = Path(self.reference).expanduser()
        reference = {"file": path.name, "sha256": sha256_of([path]), "made_with": self._made_with}
        return {"features": self.features.settings(), "reference": reference}


class VectorMetric(ReferenceMetric):
    """Base of metrics that need the vectors themselves: 4 bytes x dim for each image, 245 MB for 30,000 x 2048."""

    arrays = ("feats",)

    def _states(self) -> None:
        self.add_state("vectors", default=[], dist_reduce_fx="cat")
        self.add_state("order", default=[], dist_reduce_fx="cat")

    def reset(self) -> None:
        super().reset()
        if "vectors" in self._defaults:
            # A rank without an image still takes part in the gathering, which wants equal ranks and types of tensors.
            self.vectors.append(torch.empty(0, self.features.dim, device=self.device))
            self.order.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def _take(self, vectors: Tensor, samples: list[Sample]) -> None:
        self.vectors.append(vectors.to(self.device))
        self.order.append(torch.tensor([(s.index << 32) + s.number for s in samples], device=self.device))

    def _both(self) -> tuple[Tensor, Tensor]:
        """Vectors of the images, in the order of the set however many ranks made them, and the reference's; float64."""
        vectors, order = dim_zero_cat(self.vectors), dim_zero_cat(self.order)
        self._enough(len(vectors))
        reference = torch.from_numpy(self._reference["feats"]).to(vectors.device, torch.float64)
        return vectors[order.argsort()].double(), reference
