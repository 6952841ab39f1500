"""What every data module of the suite does: resumable training batches, fixed validation batches, provenance."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from emmdit.data.loader import ResumableLoader


class TextImageDataModule(LightningDataModule):
    """Base class; a subclass makes its data sets in `setup` and tells where they come from.

    Data sets are map-style and give dicts with `caption` and `image` (3, H, W) in [-1, 1] or `latents` (C, h, w).

    Args:
        batch_size: samples per process and forward pass.
        num_workers: loader processes; 0 loads in the training process.
        seed: of the order of samples.
        validation_samples: how many the validation loss is computed on.
    """

    source: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    card: ClassVar[str] = ""

    def __init__(
        self, batch_size: int = 64, num_workers: int = 0, seed: int = 0, validation_samples: int = 256
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.validation_samples = validation_samples
        self._loader: ResumableLoader | None = None

    @abstractmethod
    def train_dataset(self) -> Any: ...

    @abstractmethod
    def validation_dataset(self) -> Any: ...

    def provenance(self) -> dict[str, str]:
        """What the tracker records: name, source, licence, card, digest."""
        return {
            "name": type(self).__name__,
            "source": self.source,
            "licence": self.licence,
            "card": self.card,
            "digest": "",
        }

    def train_dataloader(self) -> ResumableLoader:
        trainer = self.trainer
        samples_seen = self._loader.samples_seen if self._loader is not None else 0
        samples_seen = max(samples_seen, getattr(trainer.lightning_module, "samples_seen", 0))
        self._loader = ResumableLoader(
            self.train_dataset(),
            global_batch=self.batch_size * trainer.world_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=self.seed,
            num_workers=self.num_workers,
            samples_seen=samples_seen,
        )
        return self._loader

    def val_dataloader(self) -> DataLoader:
        """Every rank the same number of samples: a rank with one batch fewer would leave the others waiting."""
        dataset = self.validation_dataset()
        rank, world = self.trainer.global_rank, self.trainer.world_size
        count = min(self.validation_samples, len(dataset)) // world * world
        if count == 0:
            raise ValueError(
                f"{len(dataset)} validation samples are too few for {world} processes: raise validation_samples."
            )
        return DataLoader(Subset(dataset, range(rank, count, world)), batch_size=self.batch_size)
