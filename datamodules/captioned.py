"""Captioned images or latents from the hub, Arrow, parquet, webdataset tars, MDS shards or folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.base import TextImageDataModule
from emmdit.data.buckets import Buckets, image_sizes
from emmdit.data.captions import check_weights
from emmdit.data.dataset import CaptionedDataset
from emmdit.data.inspect import Inspected, SampleItems
from emmdit.data.precompute.manifest import check, read_manifest
from emmdit.data.precompute.precompute import Items, Settings
from emmdit.data.readers.open import open_source, select_columns
from emmdit.data.readers.protocol import Rows


class CaptionedImagesDataModule(TextImageDataModule):
    """One source of rows, the first `validation_samples` held out; training sample i is the i-th after them.

    Args:
        source: hub id; folder made by `save_to_disk` or `emmdit precompute`; file, glob or folder of parquet,
            webdataset tars (`data/*.tar`) or Arrow; folder of MDS shards; folder of images with `metadata.csv`,
            `metadata.jsonl`, or a .txt or .json beside each.
        image_column: images (`datasets.Image`, or encoded bytes); null where there are latents alone.
        caption_column: text, or a list of texts; `json.prompt` reads `prompt` inside a column `json`. Several columns
            are several captions, of which each position of the training takes one.
        caption_weights: of the caption columns; by default equal.
        latents_column: precomputed latents, which then are not encoded from the image (REPA still sees it):
            an array (C, h, w), or the bytes of one in float16 together with `latents_shape`.
        latents_shape: (C, h, w) of latents stored as bytes.
        latents_scale: factor to the autoencoder's scaled latents: 1 if they are stored as `codec.encode` gives
            them, 0.41407 for the unscaled DC-AE latents of the Nitro-E recipe.
        resolution: images are resized to this short side and center-cropped to the square. In pixels.
        buckets: bring images to the nearest of several sizes of about resolution x resolution pixels instead.
        size_columns: height and width of the images, for the buckets; by default their headers are read, once.
        data_files: glob or list inside the source, as in `datasets.load_dataset`.
        split, revision: of the source; a revision pins a hub repository to a branch, tag or commit.
        license, card: recorded with the run; the card is the page that describes the data.
        stream: `batch_size`, `seed`, `validation_samples`, ... of `TextImageDataModule`.
    """

    def __init__(
        self,
        source: str,
        image_column: str | None = "image",
        caption_column: str | list[str] = "caption",
        caption_weights: list[float] | None = None,
        latents_column: str | None = None,
        latents_shape: tuple[int, int, int] | None = None,
        latents_scale: float = 1.0,
        resolution: int = 512,
        buckets: Buckets | None = None,
        size_columns: tuple[str, str] | None = None,
        data_files: str | list[str] | None = None,
        split: str = "train",
        revision: str | None = None,
        license: str = "",
        card: str = "",
        **stream: Any,
    ) -> None:
        super().__init__(**stream)
        self.caption_columns = [caption_column] if isinstance(caption_column, str) else list(caption_column)
        check_weights(caption_weights)
        if caption_weights is not None and len(caption_weights) != len(self.caption_columns):
            raise ValueError(
                f"There are {len(caption_weights)} caption_weights for {len(self.caption_columns)} caption columns."
            )
        self.caption_weights = caption_weights or [1.0] * len(self.caption_columns)
        columns = {"image": image_column, "caption": next(iter(self.caption_columns), None), "latents": latents_column}
        self.columns = {kind: column for kind, column in columns.items() if column is not None}
        if buckets is not None and (image_column is None or latents_column is not None):
            raise ValueError("buckets are for images: precompute bucketed latents with `emmdit precompute --buckets`.")
        if buckets is not None:
            buckets.sizes(resolution)  # raises where step and resolution do not fit
        self.buckets, self.size_columns = buckets, size_columns
        if len(self.columns) < 2 or "caption" not in self.columns:
            raise ValueError(f"{type(self).__name__} needs image_column, latents_column or both, and caption_column.")
        if resolution < 1:
            raise ValueError(f"resolution {resolution} must be at least 1.")
        self.source, self.license, self.card = source, license, card
        self.split, self.data_files, self.revision = split, data_files, revision
        self.latents_shape, self.latents_scale, self.resolution = latents_shape, latents_scale, resolution
        self._rows: Rows | None = None
        self._sizes: Any = None

    def rows(self) -> Rows:
        """The table of rows, opened at first use, with the columns that are read."""
        if self._rows is None:
            columns = self.columns | {"caption": self.caption_columns}
            self._rows = select_columns(self.source_rows(), columns, self.source)
        return self._rows

    def sizes(self) -> Any:
        """(rows, 2) height and width of all images, found without decoding them; None without buckets."""
        if self._sizes is None and self.buckets is not None:
            rows = self.rows() if self.size_columns is None else self.source_rows()
            self._sizes = image_sizes(rows, self.columns["image"], self.size_columns)
        return self._sizes

    def source_rows(self) -> Rows:
        """The table with all its columns."""
        return open_source(self.source, self.split, self.data_files, self.revision)

    def prepare_data(self) -> None:
        self.rows()  # one process of a node downloads; the others find it in the cache
        self.sizes()  # and reads headers

    def setup(self, stage: str) -> None:
        """Compare source and codec before the network is built. ValueError with one sentence."""
        self.check_held_out(len(self.rows()))
        if self.buckets is not None:
            self.check_order(self.train_dataset())
        codec = self.module_part("codec")
        if codec is None:
            return
        if "image" in self.columns and self.resolution % codec.downsample:
            raise ValueError(
                f"Images of resolution {self.resolution} do not fit {type(codec).__name__}, whose sides "
                f"divide by {codec.downsample}: change the data's resolution."
            )
        if "latents" in self.columns:
            if (Path(self.source).expanduser() / "manifest.json").is_file():
                check(read_manifest(self.source), self.source, codec, self.resolution)
            channels = len(self.validation_dataset()[0]["latents"])
            if channels != codec.latent_channels:
                raise ValueError(
                    f"The latents in '{self.source}' have {channels} channels, those of "
                    f"{type(codec).__name__} {codec.latent_channels}: name the codec that made them."
                )

    def train_dataset(self) -> CaptionedDataset:
        weights = dict(zip(self.caption_columns, self.caption_weights, strict=True))
        return self._part(self.validation_samples, None, weights)

    def validation_dataset(self) -> CaptionedDataset:
        return self._part(0, self.validation_samples)

    def _part(self, first: int, last: int | None, captions: dict[str, float] | None = None) -> CaptionedDataset:
        stored = dict(latents_shape=self.latents_shape, latents_scale=self.latents_scale)
        part = dict(first=first, last=last, captions=captions, sizes=self.sizes(), buckets=self.buckets)
        return CaptionedDataset(self.rows(), self.source, self.columns, self.resolution, **stored, **part)

    def inspected(self, resolution: int | None = None, **settings: Any) -> Inspected:
        rows, resolution = self.rows(), self.resolution if resolution is None else resolution
        about = {"kind": type(rows).__name__, "fingerprint": rows.fingerprint, "columns": ", ".join(rows.column_names)}
        settings["buckets"] = settings.get("buckets") or self.buckets
        if "image" not in self.columns:
            return Inspected(SampleItems(self._part(0, None)), about, resolution)
        settings |= {"image_column": self.columns["image"], "caption_columns": tuple(self.caption_columns)}
        return Inspected(Items(rows, Settings(resolution, **settings)), about, resolution, settings["buckets"])

    def provenance(self) -> dict[str, str]:
        rows = self.rows()
        source = self.source if self.revision is None else f"{self.source}@{self.revision}"
        about = {"source": f"{source} {self.split}", "digest": f"{rows.fingerprint} {len(rows)} rows"}
        return super().provenance() | {"name": self.source} | about
