"""Base data module: resumable training batches, fixed validation batches, provenance."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from emmdit.data.buckets import bucketing
from emmdit.data.inspect import Inspected, SampleItems, to_yaml
from emmdit.data.loader import ResumableLoader
from emmdit.data.stream import Order, StreamSampler, stream_report


class TextImageDataModule(LightningDataModule):
    """Base class; a subclass makes its datasets in `setup` and says where they come from.

    Datasets are map-style and give dicts with `caption` and `image` (3, H, W) in [-1, 1] or `latents` (C, h, w). Those
    whose images have several sizes have a method `buckets()`, see `emmdit.data.buckets`. A batch is an
    `emmdit.data.Batch`.

    Args:
        batch_size: samples per process and forward pass.
        num_workers: loader processes; 0 loads in the training process.
        seed: of the order of samples.
        validation_samples: how many the validation loss is computed on.
        shuffle_block: None: any sample may follow any. Else blocks of this many consecutive samples are shuffled, and
            then samples within 16 of them: reads stay local, for disks on which that counts.
        bucket_batch: where images have several sizes, this many samples of one size follow each other. A multiple of
            the global batch (batch_size x processes); part of the order, so keep it when a run is resumed.
    """

    source: ClassVar[str] = ""
    license: ClassVar[str] = ""
    card: ClassVar[str] = ""

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 4,
        seed: int = 0,
        validation_samples: int = 256,
        shuffle_block: int | None = None,
        bucket_batch: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("validation_samples", validation_samples, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.validation_samples = validation_samples
        self.shuffle_block, self.bucket_batch = shuffle_block, bucket_batch
        self._loader: ResumableLoader | None = None

    def module_part(self, name: str) -> Any:
        """`codec` or `text` of the module in training; None where there is none."""
        return getattr(self.trainer.lightning_module, name, None) if self.trainer else None

    def check_held_out(self, count: int) -> None:
        """ValueError where validation would take all of the source's rows."""
        if count <= self.validation_samples:
            raise ValueError(
                f"'{self.source}' has {count} rows, and {self.validation_samples} of them are held out for validation: "
                "lower validation_samples."
            )

    @abstractmethod
    def train_dataset(self) -> Any: ...

    @abstractmethod
    def validation_dataset(self) -> Any: ...

    def provenance(self) -> dict[str, str]:
        """For the tracker: name, source, license, card, digest."""
        about = {"source": self.source, "license": self.license, "card": self.card}
        return {"name": type(self).__name__, **about, "digest": ""}

    def parts(self) -> dict[str, TextImageDataModule]:
        """Each source by its name; "" for the only one."""
        return {"": self}

    def provenances(self) -> list[dict[str, str]]:
        """Of each source."""
        return [part.provenance() | ({"name": name} if name else {}) for name, part in self.parts().items()]

    def inspected(self, resolution: int | None = None, **settings: Any) -> Inspected:
        """Rows and facts for `emmdit inspect-data`.

        Args:
            resolution: in pixels, in place of the data's own.
            settings: `min_side`, `max_pixels`, `buckets` of `emmdit.data.precompute.precompute.Settings`.
        """
        return Inspected(SampleItems(self.train_dataset()), {"kind": type(self).__name__}, resolution)

    def order(self, dataset: Any) -> Order:
        """Which of the dataset's samples stands where in the stream. ValueError: sizes without `bucket_batch`."""
        return Order(
            len(dataset),
            self.seed,
            block=self.shuffle_block,
            counts=getattr(dataset, "counts", None),
            weights=getattr(dataset, "weights", None),
            buckets=bucketing(dataset)[1],
            chunk=self.bucket_batch,
        )

    def train_dataloader(self) -> ResumableLoader:
        trainer, dataset = self.trainer, self.train_dataset()
        samples_seen = max(getattr(found, "samples_seen", 0) for found in (self._loader, trainer.lightning_module))
        order = self.order(dataset)
        if self._loader is None and trainer.is_global_zero:
            self._report(dataset, order)
        self._loader = ResumableLoader(
            dataset,
            order,
            global_batch=self.batch_size * trainer.world_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_workers=self.num_workers,
            samples_seen=samples_seen,
        )
        return self._loader

    def _report(self, dataset: Any, order: Order) -> None:
        """What is mixed and what the buckets lose: printed once, and `data_report.json` in the run folder."""
        sizes = None if order.chunk is None else getattr(dataset, "sizes", None)
        found = stream_report(order, list(getattr(dataset, "sources", ())), bucketing(dataset)[0], sizes)
        if found["sources"] or found["buckets"]:
            print(to_yaml(found), flush=True)
            folder = Path(self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "data_report.json").write_text(json.dumps(found, indent=1) + "\n")

    def check_order(self, dataset: Any) -> None:
        """Refuse sizes that the network or the batch cannot take, before the network is built."""
        sizes, index = bucketing(dataset)
        world_size = getattr(self.trainer, "world_size", 1)
        order = self.order(dataset)
        StreamSampler(order, self.batch_size * world_size, 0, world_size)
        module = self.trainer.lightning_module if self.trainer else None
        if order.chunk is None or not hasattr(module, "denoiser_factory"):
            return
        with torch.device("meta"):
            denoiser = module.denoiser_factory()
        for height, width in (sizes[place] for place in np.unique(index)):
            try:
                if height % module.codec.downsample or width % module.codec.downsample:
                    raise ValueError(f"{type(module.codec).__name__} needs multiples of {module.codec.downsample}.")
                if hasattr(denoiser, "check_sizes"):
                    sides = (side // module.codec.downsample for side in (height, width))
                    denoiser.check_sizes(*sides, module.text.max_length)
            except ValueError as error:
                raise ValueError(f"The bucket of {height} x {width} px does not fit the network: {error}") from error

    def validation_indices(self, dataset: Any) -> np.ndarray:
        """Which of the held-out samples the validation loss is computed on."""
        return np.arange(min(self.validation_samples, len(dataset)))

    def val_dataloader(self) -> DataLoader:
        """Every rank the same number of samples: a rank with one batch fewer would leave the others waiting.

        Of each bucket as many as divide by the number of processes.
        """
        dataset = self.validation_dataset()
        rank, world = self.trainer.global_rank, self.trainer.world_size
        indices = self.validation_indices(dataset)
        buckets = bucketing(dataset)[1][indices]
        batches: list[list[int]] = []
        for bucket in np.unique(buckets):
            members = indices[buckets == bucket]
            mine = members[rank : len(members) // world * world : world].tolist()
            batches += [mine[first : first + self.batch_size] for first in range(0, len(mine), self.batch_size)]
        if not batches:
            raise ValueError(
                f"{len(dataset)} validation samples are too few for {world} processes: raise validation_samples."
            )
        return DataLoader(dataset, batch_sampler=batches)
