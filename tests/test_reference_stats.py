"""`emmdit reference-stats`: files that clean-fid reads, named by what went in."""

from __future__ import annotations

import json
from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from emmdit.evaluation.metrics.features import CleanInception
from emmdit.evaluation.metrics.fid import FID
from emmdit.evaluation.metrics.kid import KID
from emmdit.shapes import ShapesDataset
from lightning_modules.commands.reference_stats import build_features, reference_stats
from tests.tiny_features import TinyFeatures, random_images, samples, write_folder

TINY = "class_path: tests.tiny_features.TinyFeatures\ninit_args: {dim: 8}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


def made(capsys: pytest.CaptureFixture, *args: str) -> list[Path]:
    reference_stats([*args, "--features", "tiny.yaml", "--device", "cpu", "--batch_size", "5"])
    return [Path(line) for line in capsys.readouterr().out.split()]


def test_clean_fid_reads_the_file(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn, features = random_images(13, seed=1), random_images(11, seed=2), TinyFeatures(dim=8)
    write_folder(folder / "real" / "deeper", real[:6])
    write_folder(folder / "real" / "others", real[6:])
    stats, feats = made(capsys, "--images", "real", "--feats")
    assert stats.parent == Path("runs/references") and stats.name.startswith("real_native_tiny_13_")
    assert feats.name == f"{stats.stem}_kid.npz"

    options = dict(device=torch.device("cpu"), num_workers=0, verbose=False)
    vectors = cleanfid.fid.get_folder_features("real", features.resized, **options)
    with np.load(stats) as file:
        np.testing.assert_allclose(file["mu"], vectors.mean(0), rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(vectors, rowvar=False), rtol=1e-4, atol=1e-9)
        made_with = json.loads(str(file["made_with"]))
    assert made_with["features"] == features.identity()
    assert made_with["images"]["n"] == 13 and made_with["images"]["source"] == "real"
    with np.load(feats) as file:
        np.testing.assert_allclose(file["feats"], vectors, rtol=1e-5)

    # clean-fid looks for statistics in the folder of its own package.
    monkeypatch.setattr(cleanfid, "__file__", str(folder / "package" / "__init__.py"))
    (folder / "package" / "stats").mkdir(parents=True)
    (folder / "package" / "stats" / "real_clean_custom_na.npz").write_bytes(stats.read_bytes())
    write_folder(folder / "drawn", drawn)
    expected = cleanfid.fid.compute_fid(
        "drawn", dataset_name="real", dataset_split="custom", custom_feat_extractor=features.resized, **options
    )
    for kind, path in ((FID, stats), (KID, feats)):
        metric = kind(features, str(path))
        metric.prepare()
        metric.update(drawn, samples(11))
        if kind is FID:
            assert metric.compute()[""] == pytest.approx(expected, rel=1e-3)
        assert np.isfinite(metric.compute()[""])


def test_the_name_tells_what_went_in(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write_folder(folder / "real", random_images(9, seed=1))
    (first,), (again,) = made(capsys, "--images", "real"), made(capsys, "--images", "real", "--out", "elsewhere")
    assert first.name == again.name
    (cut,) = made(capsys, "--images", "real", "--resolution", "16")
    assert cut.name.startswith("real_16_tiny_9_")
    (some,) = made(capsys, "--images", "real", "--num", "4", "--seed", "1")
    (others,) = made(capsys, "--images", "real", "--num", "4", "--seed", "2")
    assert some.name.startswith("real_native_tiny_4_") and some.name != others.name
    Path("tiny.yaml").write_text(TINY.replace("dim: 8", "dim: 9"))
    (wider,) = made(capsys, "--images", "real")
    Path("tiny.yaml").write_text(TINY)
    Image.new("RGB", (20, 24)).save("real/00000.png")
    (changed,) = made(capsys, "--images", "real")
    assert len({first.name, wider.name, changed.name}) == 3


def test_images_of_several_sizes_and_kinds(folder: Path, capsys: pytest.CaptureFixture) -> None:
    images = [Image.new("L", (20, 30), 90), Image.new("RGB", (20, 30), "red"), Image.new("P", (16, 16))]
    Path("real").mkdir()
    for number, image in enumerate(images):
        image.save(f"real/{number}.png")
    Path("real/notes.txt").write_text("no image")
    stats, feats = made(capsys, "--images", "real", "--feats")
    arrays = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] for image in images]
    expected = torch.cat([TinyFeatures(dim=8)(array) for array in arrays]).numpy()
    np.testing.assert_allclose(np.load(feats)["feats"], expected, rtol=1e-5)


def test_renders_of_the_shapes_world_and_rows_of_a_dataset(folder: Path, capsys: pytest.CaptureFixture) -> None:
    stats, feats = made(capsys, "--shapes", "7", "--seed", "3", "--feats")
    assert stats.name.startswith("shapes_32_tiny_7_")
    scenes = ShapesDataset(seed=3, length=7)
    images = torch.stack([((scenes[i]["image"] + 1) * 127.5).round().byte() for i in range(7)])
    np.testing.assert_allclose(np.load(feats)["feats"], TinyFeatures(dim=8)(images).numpy(), rtol=1e-5)

    images = random_images(5, seed=1, height=16, width=16)
    write_folder(folder / "real", images)
    rows = [{"bytes": file.read_bytes(), "path": None} for file in sorted(Path("real").iterdir())]
    Dataset.from_dict({"photo": rows, "caption": ["x"] * 5}).to_parquet("rows.parquet")
    stats, feats = made(capsys, "--data", "rows.parquet", "--image_column", "photo", "--resolution", "16", "--feats")
    assert stats.name.startswith("rows_16_tiny_5_")
    np.testing.assert_allclose(np.load(feats)["feats"], TinyFeatures(dim=8)(images).numpy(), rtol=1e-5)


def test_bad_input_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(message: str, *args: str) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            made(capsys, *args)
        assert not Path("runs").exists()

    refused(r"'none'.*\.png", "--images", "none")
    Path("real").mkdir()
    refused(r"'real'.*\.png", "--images", "real")
    write_folder(folder / "noise", random_images(1, seed=1))
    Path("noise/00000.png").rename("real/a.png")
    refused(r"\b2\b.*\breal\b.*\b1\b", "--images", "real")
    refused(r"\b2\b.*\bshapes\b.*\b1\b", "--shapes", "1")
    for option, value in (("shapes", 0), ("resolution", 0), ("seed", -1), ("num", 0)):
        refused(f"--{option} {value}", *(() if option == "shapes" else ("--shapes", "5")), f"--{option}", str(value))
    refused("--num.*--images.*--shapes", "--shapes", "5", "--num", "4")
    refused(r"\b1\b.*--num.*\b4\b", "--images", "real", "--num", "4")
    refused("--data.*--resolution", "--data", "rows.parquet")
    good = Path("real/a.png").read_bytes()
    for broken in (b"no image", good[: len(good) // 2]):
        Path("real/b.png").write_bytes(broken)
        refused(r"'real/b\.png'", "--images", "real")
        refused(r"'real/b\.png'", "--images", "real", "--resolution", "16")
    for text in ("clip", "none.yaml"):
        with pytest.raises(ValueError, match=f"--features.*'clip:SOURCE'.*'{text}'"):
            build_features(text)
    Path("wrong.yaml").write_text("class_path: torch.nn.Linear\n")
    with pytest.raises(ValueError, match=r"'wrong\.yaml'.*FeatureExtractor"):
        build_features("wrong.yaml")
    assert isinstance(build_features("clean"), CleanInception)
    assert build_features("clip:openai/clip-vit-large-patch14").name == "clip_vitl14"
