"""Latents that `emmdit precompute` made, checked against the experiment's codec before the network is built."""

from __future__ import annotations

from datamodules.base import TextImageDataModule
from emmdit.data.latents import LatentsRows
from emmdit.data.manifest import check, read_manifest


class LatentsDataModule(TextImageDataModule):
    """A folder with `manifest.json`, the first `validation_samples` held out.

    Args:
        source: the folder.
        resolution: of the images behind the latents, in pixels; null takes what the manifest says.
        images: give kept pictures to the training, too, for a REPA that computes its features.
        licence, card: in place of those that the manifest has from the source.
        batch_size, num_workers, seed, validation_samples: see `TextImageDataModule`.
    """

    def __init__(
        self,
        source: str,
        resolution: int | None = None,
        images: bool = True,
        licence: str = "",
        card: str = "",
        batch_size: int = 64,
        num_workers: int = 4,
        seed: int = 0,
        validation_samples: int = 256,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, validation_samples)
        self.source, self.licence, self.card = source, licence, card
        self.resolution, self.images = resolution, images

    def setup(self, stage: str) -> None:
        """Compare manifest and experiment before the network is built. ValueError with one sentence."""
        manifest = read_manifest(self.source)
        samples = manifest["counts"]["samples"]
        if samples <= self.validation_samples:
            raise ValueError(
                f"'{self.source}' has {samples} samples, and {self.validation_samples} of them are held out for "
                "validation: lower validation_samples."
            )
        codec = getattr(self.trainer.lightning_module, "codec", None) if self.trainer else None
        if codec is not None:
            check(manifest, self.source, codec, self.resolution)

    def train_dataset(self) -> LatentsRows:
        return LatentsRows(self.source, self.validation_samples, images=self.images)

    def validation_dataset(self) -> LatentsRows:
        return LatentsRows(self.source, 0, self.validation_samples, images=self.images)

    def provenance(self) -> dict[str, str]:
        """Where the pictures behind the latents come from, and the hash of the latents."""
        manifest = read_manifest(self.source)
        origin = manifest["source"]
        return {
            "name": str(origin.get("source", self.source)),
            "source": f"{origin.get('source', '')} -> {self.source}",
            "licence": self.licence or origin.get("licence", ""),
            "card": self.card or origin.get("card", ""),
            "digest": f"{manifest['sha256'][:16]} {manifest['counts']['samples']} samples",
        }
