"""CaptionedImagesDataModule: held-out rows, exact pixels, latents, provenance, and one sentence when it fails."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import datamodules
from datamodules import CaptionedImagesDataModule
from emmdit.data.images import load_image
from emmdit.data.loader import ResumableLoader
from emmdit.data.stream import Order
from lightning_modules.commands.config_errors import sentence
from tests.command_line import elsewhere as elsewhere

COUNT = 10
LATENTS = np.random.default_rng(0).standard_normal((COUNT, 4, 2, 2)).astype(np.float16)


def noise(number: int) -> Image.Image:
    width, height = 20 + 3 * number, 41 - 3 * number  # portraits and landscapes
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rows(**changes: list) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": png(noise(i)), "path": None} for i in range(COUNT)],
        "caption": [f"image {i}" for i in range(COUNT)],
        "json": [{"prompt": f"prompt {i}", "seed": i} for i in range(COUNT)],
        "latents": [latents.tobytes() for latents in LATENTS],
        **changes,
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def module(source: Path | str, codec: SimpleNamespace | None = None, **arguments) -> CaptionedImagesDataModule:
    """A data module as Lightning leaves it when the network is about to be built."""
    data = CaptionedImagesDataModule(str(source), **{"resolution": 16, "validation_samples": 3, **arguments})
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(codec=codec))
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    rows().to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_the_first_rows_are_held_out_and_samples_do_not_depend_on_workers(parquet: Path) -> None:
    data = module(parquet)
    validation, train = data.validation_dataset(), data.train_dataset()
    assert [validation[i]["caption"] for i in range(len(validation))] == [f"image {i}" for i in range(3)]
    assert {train[i]["caption"] for i in range(len(train))} == {f"image {i}" for i in range(3, COUNT)}
    assert train[2]["sample_id"] == 2
    with pytest.raises(IndexError):
        train.__getitems__([0, len(train)])

    alone, helped = (list(ResumableLoader(train, Order(len(train)), 4, num_workers=workers)) for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert a["caption"] == b["caption"] and torch.equal(a["image"], b["image"])
        assert a["image"].shape == (4, 3, 16, 16) and a["image"].dtype == torch.float32
        assert a["caption"] == [f"image {i + 3}" for i in a["sample_id"].tolist()]


def test_pixels_are_scaled_cropped_at_the_center_and_antialiased() -> None:
    for size in ((24, 16), (16, 16), (31, 77)):
        image = load_image(png(Image.new("RGB", size, (0, 51, 255))), 16)
        assert image.shape == (3, 16, 16) and image.is_contiguous()
        assert torch.allclose(image.amax((1, 2)), torch.tensor([-1.0, -0.6, 1.0]))
        assert torch.allclose(image.amin((1, 2)), torch.tensor([-1.0, -0.6, 1.0]))

    thirds = np.zeros((20, 60, 3), np.uint8)
    for i in range(3):
        thirds[:, 20 * i : 20 * i + 20, i] = 255
    middle = load_image(png(Image.fromarray(thirds)), 20)
    assert (middle[1] == 1).all() and (middle[[0, 2]] == -1).all()
    assert (load_image(png(Image.fromarray(thirds.transpose(1, 0, 2))), 20)[1] == 1).all()

    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    assert load_image(png(Image.fromarray(stripes)), 16).abs().max() < 0.1  # without a filter: -1 or 1


def test_modes_transparency_and_orientation() -> None:
    assert (load_image(png(Image.new("L", (8, 8), 255)), 8) == 1).all()
    hidden = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (load_image(png(hidden), 8) == 1).all()
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    turned = load_image(png(Image.fromarray(half), exif=exif), 8)
    assert (turned[:, :4] == -1).all() and (turned[:, 4:] == 1).all()


def test_precomputed_latents_from_bytes_and_arrays(tmp_path: Path, parquet: Path) -> None:
    common = dict(image_column=None, latents_column="latents", latents_scale=0.5)
    stored = module(parquet, latents_shape=(4, 2, 2), **common).train_dataset()[0]
    assert set(stored) == {"caption", "latents", "sample_id"}
    assert torch.equal(stored["latents"], torch.from_numpy(LATENTS[3].astype(np.float32)) * 0.5)
    rows(latents=LATENTS.tolist()).save_to_disk(tmp_path / "arrays")
    listed = module(tmp_path / "arrays", **common).train_dataset()[0]
    assert torch.allclose(listed["latents"], stored["latents"])
    both = module(parquet, latents_column="latents", latents_shape=(4, 2, 2)).train_dataset()[0]
    assert set(both) == {"caption", "image", "latents", "sample_id"}


def test_captions_inside_a_column_and_provenance(parquet: Path) -> None:
    data = module(parquet, caption_column="json.prompt", license="CC0-1.0", card="https://example.org/card")
    assert data.train_dataset()[0]["caption"] == "prompt 3"
    assert datamodules.HubDataModule is CaptionedImagesDataModule  # the name in users' YAML files
    told = data.provenance()
    assert told["license"] == "CC0-1.0" and told["card"] == "https://example.org/card"
    assert told["source"].startswith(str(parquet)) and "10 " in told["digest"]


def bad_image(number: int) -> dict[str, list]:
    images = [{"bytes": png(noise(i)), "path": None} for i in range(COUNT)]
    images[number]["bytes"] = images[number]["bytes"][:40]
    return {"image": images}


def test_rows_that_cannot_be_read_are_named(tmp_path: Path, parquet: Path) -> None:
    rows(**bad_image(5)).save_to_disk(tmp_path / "broken")
    train = module(tmp_path / "broken").train_dataset()
    train[1]
    with pytest.raises(ValueError, match=r"Row 5\b.*broken'.*'image'"):
        train[2]
    with pytest.raises(ValueError) as caught:  # from a worker process, with its traceback
        list(ResumableLoader(train, Order(len(train)), 4, num_workers=1))
    assert "Row 5 " in sentence(caught.value)
    assert "\n" not in sentence(caught.value)

    rows(caption=["text"] * 4 + [None] * 6).save_to_disk(tmp_path / "silent")
    with pytest.raises(ValueError, match=r"Row 4\b.*caption.*\bNone\b"):
        module(tmp_path / "silent").train_dataset()[1]
    with pytest.raises(ValueError, match=r"Row 0\b.*latents_shape"):
        module(parquet, latents_column="latents").validation_dataset()[0]
    with pytest.raises(ValueError, match=r"Row 0\b.*\(4, ?4, ?4\)"):
        module(parquet, latents_column="latents", latents_shape=(4, 4, 4)).validation_dataset()[0]


def test_what_the_codec_cannot_take_is_refused_before_the_network_is_built(parquet: Path) -> None:
    codec = SimpleNamespace(downsample=32, latent_channels=32)
    module(parquet, codec, resolution=64)
    with pytest.raises(ValueError, match=r"resolution.*\b48\b.*SimpleNamespace.*\b32\b"):
        module(parquet, codec, resolution=48)
    with pytest.raises(ValueError, match=r"\b4 channels.*SimpleNamespace.*\b32\b"):
        module(parquet, codec, image_column=None, latents_column="latents", latents_shape=(4, 2, 2))
