"""Latents made by `emmdit precompute`, checked against the experiment's autoencoder before the network is built."""

from __future__ import annotations

from typing import Any

from datamodules.base import TextImageDataModule
from emmdit.data.captions import check_weights
from emmdit.data.inspect import Inspected, SampleItems
from emmdit.data.precompute.latents import LatentsDataset
from emmdit.data.precompute.manifest import check, check_text, read_manifest


class LatentsDataModule(TextImageDataModule):
    """A folder with `manifest.json`, the first `validation_samples` held out.

    Args:
        source: the folder.
        resolution: of the images behind the latents, in pixels; null takes what the manifest says.
        images: give kept images to the training, too, for a REPA that computes its features.
        text: use kept text features in place of running the text encoder (dropped captions still become its empty one).
            They are of the first caption, and so is the training then.
        caption_weights: of the first, second, ... caption where images have several; by default equal. Each position
            of the training takes one.
        license, card: in place of those that the manifest has from the source.
        stream: `batch_size`, `seed`, `validation_samples`, ... of `TextImageDataModule`.
    """

    def __init__(
        self,
        source: str,
        resolution: int | None = None,
        images: bool = True,
        text: bool = True,
        caption_weights: list[float] | None = None,
        license: str = "",
        card: str = "",
        **stream: Any,
    ) -> None:
        super().__init__(**stream)
        check_weights(caption_weights)
        self.text, self.caption_weights = text, caption_weights
        self.source, self.license, self.card = source, license, card
        self.resolution, self.images = resolution, images

    def setup(self, stage: str) -> None:
        """Compare manifest and experiment before the network is built. ValueError with one sentence."""
        manifest = read_manifest(self.source)
        self.check_held_out(manifest["counts"]["samples"])
        codec, text = self.module_part("codec"), self.module_part("text")
        if codec is not None:
            check(manifest, self.source, codec, self.resolution)
        if self._has_text(manifest):
            if self.caption_weights is not None:
                raise ValueError(
                    f"The text features in '{self.source}' are of the first caption: set text to false to train on "
                    "several."
                )
            if text is not None:
                check_text(manifest, self.source, text)
        if manifest.get("buckets"):
            self.check_order(self.train_dataset())

    def _has_text(self, manifest: dict[str, Any]) -> bool:
        return self.text and "text" in manifest

    def train_dataset(self) -> LatentsDataset:
        captions = not self._has_text(read_manifest(self.source))
        first, weights = self.validation_samples, self.caption_weights
        return LatentsDataset(self.source, first, None, self.images, self.text, captions, weights)

    def validation_dataset(self) -> LatentsDataset:
        return LatentsDataset(self.source, 0, self.validation_samples, self.images, self.text)

    def inspected(self, resolution: int | None = None, **settings: Any) -> Inspected:
        samples = LatentsDataset(self.source, captions=True)
        manifest, about = samples.manifest, self.provenance()
        made = {"class_path": "?", "source": "", "weights_sha256": "?"} | manifest["codec"]
        about = {name: about[name] for name in ("source", "license", "card")}
        about["kind"] = f"{len(manifest['shards'])} shards of latents"
        about["encoder"] = f"{made['class_path']} {made['source']}, weights {made['weights_sha256'][:12]}"
        return Inspected(SampleItems(samples), about, latents=samples)

    def provenance(self) -> dict[str, str]:
        """Where the images behind the latents come from, and the hash of the latents."""
        manifest = read_manifest(self.source)
        origin = manifest["source"]
        return {
            "name": str(origin.get("source", self.source)),
            "source": f"{origin.get('source', '')} -> {self.source}",
            "license": self.license or origin.get("license", ""),
            "card": self.card or origin.get("card", ""),
            "digest": f"{manifest['sha256'][:16]} {manifest['counts']['samples']} samples",
        }
