"""Feature extractors of FID, KID and CMMD: uint8 images to vectors."""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
import warnings
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emmdit.encoders.base import frozen
from emmdit.encoders.loading import MissingModelError
from emmdit.evaluation.metrics.base import check_images
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.files import cache_folder

INCEPTION = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"
# As published by k-diffusion, which downloads the same file (k_diffusion/evaluation.py).
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
RESIZE_THREADS = 8  # Pillow releases the GIL while it resizes


class FeatureExtractor(ABC):
    """A plain object that holds its network, which `prepare` loads.

    `name` becomes part of the metric's ("clean", "clip_vitl14"), `dim` is the length of the vectors, `resize` says in
    words what happens to the pixels; references that were made with another `resize` are refused.
    """

    name: str
    dim: int
    resize: str

    def prepare(self, device: torch.device | str = "cpu") -> None:  # noqa: B027
        """Load, check and move the network. Raises MissingModelError."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, dim)."""

    def identity(self) -> dict[str, Any]:
        """What must agree between two sets of features that are compared."""
        return {"name": self.name, "dim": self.dim, "resize": self.resize}

    def settings(self) -> dict[str, Any]:
        """All that decides about the features, fit for JSON."""
        return self.identity()

    def extract(self, images: Tensor) -> Tensor:
        """`self(images)` with both ends checked: ValueError for images or features that would spoil a sum silently."""
        check_images(images, self.name)
        vectors = self(images)
        if vectors.shape != (len(images), self.dim):
            raise ValueError(
                f"The features of '{self.name}' are {tuple(vectors.shape)} for {len(images)} images, not "
                f"({len(images)}, {self.dim}): its dim or its network is wrong."
            )
        if not vectors.isfinite().all():
            raise ValueError(f"The features of '{self.name}' are not finite: run its network in float32.")
        return vectors


class CleanInception(FeatureExtractor):
    """clean-fid's mode "clean" by clean-fid's own code: its resize on the CPU, then its Inception, 2048 features.

    The network is a TorchScript file, and loading one runs the code inside it: only the published file is loaded, known
    by its sha256. It is never downloaded here.

    Args:
        weights: the file, or the folder it lies in; else the environment's EMMDIT_INCEPTION, else the folder
            `inception` of the suite's own cache.
    """

    name = "clean"
    dim = 2048
    resize = "clean-fid 'clean': Pillow, bicubic with antialias on float channels to 299x299, clipped, not rounded"

    def __init__(self, weights: str | None = None) -> None:
        self.weights = weights
        self.device = torch.device("cpu")
        self._network: nn.Module | None = None
        self._resizer: Any = None
        self._sha256 = ""

    def file(self) -> Path:
        """The weights on this machine. Raises MissingModelError."""
        path = Path(self.weights or os.environ.get("EMMDIT_INCEPTION") or cache_folder("inception") / INCEPTION)
        path = path.expanduser()
        path = path / INCEPTION if path.is_dir() else path
        if not path.is_file():
            raise MissingModelError(
                f"FID's Inception weights '{path}' are missing: get them by `curl --create-dirs -Lo "
                f"{shlex.quote(str(path))} {INCEPTION_URL}`, or name a copy as `weights` or in EMMDIT_INCEPTION."
            )
        return path

    def prepare(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self._network is None:
            from cleanfid.inception_torchscript import InceptionV3W
            from cleanfid.resize import build_resizer

            file = self.file()
            content = file.read_bytes()
            self._sha256 = hashlib.sha256(content).hexdigest()
            if self._sha256 != INCEPTION_SHA256:
                raise MissingModelError(
                    f"'{file}' is damaged or is not clean-fid's Inception (its sha256 is {self._sha256[:8]}..., not "
                    f"{INCEPTION_SHA256[:8]}...): download it again from {INCEPTION_URL}."
                )
            # clean-fid takes a folder and expects this name. It reads by torch.jit.load, which is deprecated. The very
            # bytes that were checked: others may be able to exchange the file.
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                (Path(folder) / INCEPTION).write_bytes(content)
                network = InceptionV3W(folder, download=False).eval().requires_grad_(False).to(self.device)
            self._network, self._resizer = network, build_resizer("clean")
        self._network.to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        if self._network is None:
            self.prepare(self.device)
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor(RESIZE_THREADS) as pool:
            resized = [torch.from_numpy(array) for array in pool.map(self._resizer, arrays)]
        pixels = torch.stack(resized).permute(0, 3, 1, 2).contiguous().to(self.device)
        with frozen(self.device):
            return self._network(pixels).float()

    def identity(self) -> dict[str, Any]:
        if not self._sha256:
            self.prepare(self.device)
        return super().identity() | {"sha256": self._sha256}

    def settings(self) -> dict[str, Any]:
        versions = {name: version(name) for name in ("clean-fid", "pillow", "torch")}
        return self.identity() | {"weights": INCEPTION, "versions": versions}


class CLIPFeatures(FeatureExtractor):
    """Projected image embeddings of a CLIP, not normalized, as CLIP-FID takes them (arXiv 2203.06026, clean-fid).

    With "openai/clip-vit-base-patch32" model and preprocessing are those of clean-fid's `clip_vit_b_32`.
    """

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip

    @property
    def name(self) -> str:
        return f"clip_{self.clip.name}"

    @property
    def dim(self) -> int:
        return self.clip.dim

    @property
    def resize(self) -> str:
        pixels = self.clip.settings()["preprocessing"]
        # "centre": stored references hold these words and are compared with them
        crop = f", centre crop {pixels['crop']}" if pixels["crop"] else ""
        return f"{pixels['resize']}, {pixels['resample']} to {pixels['size']}{crop}"

    def prepare(self, device: torch.device | str = "cpu") -> None:
        self.clip.prepare(device)

    def __call__(self, images: Tensor) -> Tensor:
        pixels = self.clip.preprocess(images).to(self.clip.dtype)
        with frozen(self.clip.device):
            return self.clip.model.get_image_features(pixel_values=pixels).pooler_output.float()

    def identity(self) -> dict[str, Any]:
        settings = self.clip.settings()
        return super().identity() | {key: settings[key] for key in ("sha256", "revision") if settings.get(key)}

    def settings(self) -> dict[str, Any]:
        return self.identity() | {"clip": self.clip.settings()}
