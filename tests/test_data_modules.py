"""Data modules: several captions, buckets from images and from latents, mixtures, stored text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CaptionedImagesDataModule, LatentsDataModule, MixtureDataModule, TextImageDataModule
from emmdit.data.buckets import Buckets, cropped, image_sizes
from emmdit.data.images import fit, image_size, open_image, to_tensor
from emmdit.data.loader import ResumableLoader
from emmdit.data.precompute.latents import LatentsDataset
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.open import open_source
from emmdit.data.stream import Order
from emmdit.encoders import DCTCodec, TextEncoder
from lightning_modules import TextToImage
from tests.command_line import elsewhere as elsewhere
from tests.test_precompute import Vision

SHAPES = [(40, 40), (64, 32), (32, 64), (48, 32), (90, 30)]  # height, width; the last is taller than any bucket
COUNT = 40
BUCKETS = Buckets(step=8, max_ratio=2)


def png(number: int, height: int, width: int, **options) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    shapes = [SHAPES[i % 5] for i in range(COUNT)]
    columns = {
        "image": [{"bytes": png(i, *shape), "path": None} for i, shape in enumerate(shapes)],
        "height": [height for height, _ in shapes],
        "width": [width for _, width in shapes],
        "caption": [f"{i} long" for i in range(COUNT)],
        "short": [f"{i} short" for i in range(COUNT)],
        "many": [[f"{i} one", f"{i} two"] if i % 2 else [] for i in range(COUNT)],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def ready(data: TextImageDataModule, rank: int = 0, world: int = 1, **module) -> TextImageDataModule:
    """As Lightning leaves it when the training begins; without a codec nothing is compared."""
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(samples_seen=0, **module),
        global_rank=rank,
        world_size=world,
        is_global_zero=rank == 0,
        default_root_dir="run",
    )
    data.prepare_data()
    data.setup("fit")
    return data


def hub(table: Path, **arguments) -> CaptionedImagesDataModule:
    defaults = {"resolution": 32, "batch_size": 4, "num_workers": 0, "validation_samples": 5}
    return CaptionedImagesDataModule(str(table), **(defaults | arguments))


def take(data: TextImageDataModule, batches: int) -> list[dict]:
    loader, out = data.train_dataloader(), []
    while len(out) < batches:
        out += [batch for _, batch in zip(range(batches - len(out)), loader, strict=False)]
    return out


# -- several captions --------------------------------------------------------------------------------


def test_captions_are_chosen_by_weight_seed_and_position(table: Path) -> None:
    arguments = dict(caption_column=["caption", "short", "many"], caption_weights=[2.0, 0, 1], image_column="image")
    data = ready(hub(table, **arguments))
    seen = [caption for batch in take(data, 180) for caption in batch["caption"]]
    kinds = [caption.split()[1] for caption in seen]
    share = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    # half of the rows have nothing in `many`; where there are two texts, they share its weight
    assert share == pytest.approx({"long": 0.5 + 0.5 * 2 / 3, "one": 1 / 12, "two": 1 / 12}, abs=0.04)
    assert len(set(seen)) > 60

    dataset = data.train_dataset()
    merged = {}
    for rank in range(2):
        for batch in ResumableLoader(dataset, Order(len(dataset)), 4, rank, 2, num_workers=rank):
            merged.update(zip(batch["position"].tolist(), batch["caption"], strict=True))
    assert [merged[p] for p in sorted(merged)] == seen[: len(merged)]
    assert [batch["caption"] for batch in data.val_dataloader()][0] == [f"{i} long" for i in range(4)]
    for arguments, message in (
        ({"caption_weights": [1.0, 2.0]}, r"\b2\b.*caption_weights.*\b1\b"),
        ({"caption_weights": [0.0]}, r"caption_weights.*\[0\.0\]"),
        ({"caption_column": []}, "CaptionedImagesDataModule.*image_column.*caption_column"),
        ({"caption_column": ["caption", "none"]}, "'none'.* caption_column "),
    ):
        with pytest.raises(ValueError, match=message):
            ready(hub(table, **arguments))


# -- buckets -----------------------------------------------------------------------------------------


def test_bucket_sizes_and_what_they_crop() -> None:
    assert Buckets(128).sizes(512) == [(384, 640), (512, 512), (640, 384)]
    for height, width in Buckets(64, 2).sizes(1024):
        assert height % 64 == width % 64 == 0 and 0.9 < height * width / 1024**2 < 1.1
        assert 0.5 <= height / width <= 2
    sizes = np.array([*SHAPES, (0, 0)])
    assert BUCKETS.sizes(32) == [(24, 40), (32, 32), (40, 24)]
    expected = [(32, 32), (40, 24), (24, 40), (40, 24), (40, 24), (32, 32)]
    assert [BUCKETS.sizes(32)[i] for i in BUCKETS.assign(sizes, 32)] == expected
    assert cropped(np.array([(48, 32), (40, 24), (64, 32)]), (40, 24)) == pytest.approx([0.1, 0, 1 / 6])
    for arguments in (dict(step=0), dict(max_ratio=0.5)):
        with pytest.raises(ValueError, match="step.*max_ratio"):
            Buckets(**arguments)
    with pytest.raises(ValueError, match=r"resolution.*\b100\b.*\b64\b"):
        Buckets().sizes(100)


def test_sizes_are_told_by_columns_or_headers_and_kept(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMMDIT_CACHE", "emmdit")
    rows = open_source(str(table))
    expected = [SHAPES[i % 5] for i in range(COUNT)]
    assert image_sizes(rows, "image", ("height", "width")).tolist() == [list(shape) for shape in expected]
    assert image_sizes(rows, "image").tolist() == [list(shape) for shape in expected]
    monkeypatch.setattr("emmdit.data.buckets.image_size", None)  # not read again
    assert image_sizes(rows, "image").tolist() == [list(shape) for shape in expected]
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned = png(0, 20, 30, exif=exif)
    assert image_size(turned) == (30, 20) == open_image(turned).size[::-1]


def test_images_come_in_batches_of_one_bucket_on_all_ranks(table: Path, capsys) -> None:
    whole = {}
    for rank in range(2):
        data = ready(hub(table, buckets=BUCKETS, bucket_batch=8, shuffle_block=4), rank, 2)
        for batch in take(data, 40):
            for index, position, image in zip(batch["sample_id"], batch["position"], batch["image"], strict=True):
                whole[int(position)] = (int(index), tuple(image.shape[1:]))
                original = open_image(data.rows()[int(index) + 5]["image"])
                expected = to_tensor(fit(original, *image.shape[1:]))
                assert torch.equal(image, expected)
    for start in range(0, 320, 8):
        assert len({whole[position][1] for position in range(start, start + 8)}) == 1
    times = np.bincount([index for index, _ in whole.values()])
    assert len(times) == COUNT - 5 and times.min() >= 8 and times.max() <= 10
    told = json.loads(Path("run/data_report.json").read_text())
    assert sum(row["samples"] for row in told["buckets"]) == COUNT - 5
    tall = told["buckets"][-1]
    assert (tall["height"], tall["width"], tall["samples"]) == (40, 24, 21)
    assert tall["cropped"] == pytest.approx((1 / 6 + 0.1 + 4 / 9) / 3)
    assert "{height: 40, width: 24, samples: 21, draws: 21" in capsys.readouterr().out

    shares = []
    for rank in range(2):  # one size a batch, and the same number of batches
        data = ready(hub(table, buckets=BUCKETS, bucket_batch=8, validation_samples=15), rank, 2)
        batches = list(data.val_dataloader())
        shares.append([(len(batch["caption"]), tuple(batch["image"].shape)) for batch in batches])
    assert shares[0] == shares[1] and sum(count for count, _ in shares[0]) == 6
    for arguments, message in (
        ({}, r"\b3\b.*bucket_batch"),
        ({"bucket_batch": 6}, r"bucket_batch.*\b6\b.*\b8\b"),
        ({"bucket_batch": 8, "latents_column": "short"}, "emmdit precompute --buckets"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(hub(table, buckets=BUCKETS, **arguments), 0, 2)


def made(table: Path, out: Path, **changes) -> Path:
    others = {name: changes.pop(name) for name in ("text", "vision") if name in changes}
    settings = Settings(**{"resolution": 32, "batch_size": 4, "rows_per_shard": 7, "min_side": 1} | changes)
    source = {"source": out.name, "license": "CC0-1.0", "card": "https://example.org"}
    precompute(open_source(str(table)), source, DCTCodec(), out, settings, **others)
    return out


def test_latents_are_precomputed_and_read_in_buckets(table: Path, tmp_path: Path) -> None:
    out = made(table, tmp_path / "latents", buckets=BUCKETS, keep_images=100, vision=Vision())
    rows = LatentsDataset(out)
    assert [row["sample_id"] for row in rows.table] == list(range(COUNT))
    codec, (bucket_sizes, index) = DCTCodec(), rows.buckets()
    for i, (height, width) in enumerate([(32, 32), (40, 24), (24, 40), (40, 24), (40, 24)]):
        expected = codec.encode(to_tensor(fit(Image.open(io.BytesIO(png(i, *SHAPES[i]))), height, width))[None])[0]
        assert torch.equal(rows[i]["latents"], expected.half().float())
        assert rows[i]["image"].shape[1:] == (height, width) and bucket_sizes[index[i]] == (height, width)
        assert rows[i]["features"].shape == (width, 3)
    order = [4, 0, 3, 3, 2]  # several sizes in one batch, one of them twice
    for i, sample in zip(order, rows.__getitems__(order), strict=True):
        assert sample["sample_id"] == i and all(torch.equal(sample[k], rows[i][k]) for k in ("latents", "features"))
    arguments = dict(batch_size=8, num_workers=0, validation_samples=10, bucket_batch=8)
    data = ready(LatentsDataModule(str(out), **arguments), codec=codec)
    batches = take(data, 30)
    assert {tuple(batch["latents"].shape[2:]) for batch in batches} == {(8, 8), (10, 6), (6, 10)}
    assert set(range(COUNT - 10)) == {i for batch in batches for i in batch["sample_id"].tolist()}
    assert json.loads(Path("run/data_report.json").read_text())["buckets"][-1]["cropped"] > 0.1

    def refuse(height: int, width: int, text: int) -> None:
        if height != width:
            raise ValueError("square only.")

    network, text = SimpleNamespace(check_sizes=refuse), SimpleNamespace(max_length=4)
    data.trainer.lightning_module = SimpleNamespace(codec=codec, text=text, denoiser_factory=lambda: network)
    with pytest.raises(ValueError, match="24 x 40.*square only"):
        data.setup("fit")


# -- mixtures ----------------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight_and_each_is_logged(table: Path, tmp_path: Path, capsys) -> None:
    open_source(str(table)).table.select(range(12)).to_parquet(tmp_path / "few.parquet")
    sources = {"many": made(table, tmp_path / "many"), "few": made(tmp_path / "few.parquet", tmp_path / "few")}

    def mixture(rank: int = 0, world: int = 1, **arguments) -> MixtureDataModule:
        parts = {name: LatentsDataModule(str(folder), images=False) for name, folder in sources.items()}
        common = dict(batch_size=8 // world, num_workers=0, validation_samples=4)
        return ready(MixtureDataModule(parts, **common, **arguments), rank, world, codec=DCTCodec())

    data = mixture()
    ids = [i for batch in take(data, 11) for i in batch["sample_id"].tolist()]
    assert sorted(ids[:44]) == list(range(44)) == sorted(ids[44:])  # 36 and 8 samples: each once an epoch
    dataset = data.train_dataset()
    for sample, index in zip(dataset.__getitems__([40, 3, 36, 0]), (40, 3, 36, 0), strict=True):
        name, local = ("many", index) if index < 36 else ("few", index - 36)
        expected = LatentsDataset(sources[name], 4)[local]
        assert sample["sample_id"] == index and sample["caption"] == expected["caption"] == f"{local + 4} long"
        assert torch.equal(sample["latents"], expected["latents"])
    with pytest.raises(IndexError):
        dataset[44]
    captions = [caption for batch in data.val_dataloader() for caption in batch["caption"]]
    assert captions == ["0 long", "1 long"] * 2  # two of each source

    weights = {"many": 1, "few": 3}
    shares = [[i for b in take(mixture(r, 2, weights=weights), 44) for i in b["sample_id"].tolist()] for r in range(2)]
    drawn = np.array(shares).reshape(-1)
    assert (drawn >= 36).mean() == pytest.approx(0.75, abs=0.01)
    assert "{name: few, samples: 8, draws: 33, share: 0.75, passes: 4.125}" in capsys.readouterr().out
    told = data.provenances()
    assert [found["name"] for found in told] == ["many", "few"] and told[0]["license"] == "CC0-1.0"

    part = LatentsDataModule(str(sources["many"]))
    for arguments, message in (
        ({"sources": {}}, "(?i)mixture.*source"),
        ({"sources": {"a": part}, "weights": {"b": 1.0}}, r"weights.*\bb\b.*sources.*\ba\b"),
        ({"sources": {"a": part}, "weights": {"a": 0.0}}, r"weights.*'a': 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureDataModule(**arguments)
    images = hub(table, resolution=32)
    with pytest.raises(ValueError, match="'few'.*caption, latents, sample_id.*caption, image, sample_id"):
        few = LatentsDataModule(str(sources["few"]))
        ready(MixtureDataModule({"few": few, "images": images}, validation_samples=2))
    with pytest.raises(ValueError, match=r"'few'.*\b12\b.*\b30\b.*validation_samples"):
        ready(MixtureDataModule({"few": LatentsDataModule(str(sources["few"]))}, validation_samples=30))


# -- stored text -------------------------------------------------------------------------------------


def test_stored_text_features_spare_the_encoder(table: Path, tmp_path: Path) -> None:
    made_with = dict(source="standin:llama?caption_channels=16", caption_channels=16, max_length=8, with_mask=True)
    text = TextEncoder(**made_with)
    columns = ("short", "caption")
    out = made(table, tmp_path / "latents", text=text, caption_columns=columns)
    arguments = dict(num_workers=0, validation_samples=5, batch_size=4)
    data = ready(LatentsDataModule(str(out), **arguments), codec=DCTCodec(), text=text)
    (batch,) = take(data, 1)
    assert all(caption.endswith("short") for caption in batch["caption"])  # the one that was encoded
    expected = text(batch["caption"])
    assert batch["condition"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch["condition"][name].dtype == tensor.dtype and torch.equal(batch["condition"][name], tensor)

    class Silent(TextEncoder):
        def __call__(self, captions: list[str]):
            assert captions == [""], "the text encoder was run"
            return super().__call__(captions)

    module = SimpleNamespace(text=Silent(**made_with), device=torch.device("cpu"), dtype=torch.float32)
    drop = torch.tensor([False, True, False, False])
    found = TextToImage.condition(module, batch["caption"], drop, batch["condition"])
    null = text.null(4)
    for name, tensor in expected.items():
        wanted = torch.where(drop.view(-1, *[1] * (tensor.ndim - 1)), null[name], tensor)
        assert torch.equal(found[name], wanted.float() if wanted.is_floating_point() else wanted)

    for changed, message in (
        ({"max_length": 9}, r"max_length.*\b8\b.*\b9\b"),
        ({"with_mask": False}, "features.*'encoder_attention_mask', 'encoder_hidden_states'"),
        ({"hidden_layer": -2}, "hidden_layer.*-1.*-2"),
    ):
        with pytest.raises(ValueError, match=message):
            other = TextEncoder(**(made_with | changed))
            ready(LatentsDataModule(str(out), **arguments), codec=DCTCodec(), text=other)
    with pytest.raises(ValueError, match=r"caption.*\btext\b.*false"):
        ready(LatentsDataModule(str(out), caption_weights=[1, 1], **arguments), codec=DCTCodec())
    several = ready(LatentsDataModule(str(out), text=False, caption_weights=[1, 3], **arguments), codec=DCTCodec())
    batches = take(several, 40)
    assert "condition" not in batches[0]
    long = np.mean([caption.endswith("long") for batch in batches for caption in batch["caption"]])
    assert 0.6 < long < 0.9
