"""`benchmarks.loader`: every case reads the same samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader
from datamodules import CaptionedImagesDataModule, LatentsDataModule
from tests.command_line import elsewhere as elsewhere


def test_all_formats_hold_the_same_latents(tmp_path: Path) -> None:
    for name, write in (
        ("latents", loader.write_latents),
        ("tars", loader.write_tars),
        ("mds", loader.write_mds),
    ):
        write(tmp_path / name, 70)
    stored = {"image_column": None, "latents_column": "latents", "latents_shape": loader.SHAPE, "num_workers": 0}
    common = {"batch_size": 8, "validation_samples": 2}
    streams = [
        loader.batches(LatentsDataModule(str(tmp_path / "latents"), num_workers=0, **common)),
        loader.batches(CaptionedImagesDataModule(str(tmp_path / "latents"), **stored, **common)),
        loader.batches(CaptionedImagesDataModule(str(tmp_path / "mds"), **stored, **common)),
        loader.batches(CaptionedImagesDataModule(str(tmp_path / "tars"), caption_column="txt", **stored, **common)),
    ]
    for _ in range(3):
        first, *others = [next(stream) for stream in streams]
        assert len(set(first["sample_id"].tolist())) == 8
        expected = [np.frombuffer(loader.latents(2 + i), np.float16) for i in first["sample_id"].tolist()]
        assert (first["latents"].flatten(1).numpy() == np.stack(expected)).all()
        for other in others:
            assert other["sample_id"].tolist() == first["sample_id"].tolist() and other["caption"] == first["caption"]
            assert (other["latents"] == first["latents"]).all()


@pytest.mark.slow
def test_the_benchmark_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loader.main(["--samples", "400", "--rounds", "1", "--quick", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert {row["case"] for row in found["rows"]} >= {"LatentsDataModule", "CaptionedImagesDataModule, MDS"}
    assert all(row["rate"] > 0 for row in found["rows"] + found["jpeg"]) and found["rows"][0]["ratio"] == 1
    assert found["memory"][-1]["samples"] >= 10_000 and "samples/s" in capsys.readouterr().out
