"""`benchmarks.loader`: every case reads the same samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader
from tests.command_line import elsewhere as elsewhere


def test_all_formats_hold_the_same_latents(tmp_path: Path) -> None:
    opened = loader.modules(tmp_path, 70, batch_size=8, validation_samples=2)
    streams = [loader.batches(data) for data in opened.values()]
    for _ in range(3):
        first, *others = [next(stream) for stream in streams]
        assert len(set(first["sample_id"].tolist())) == 8
        expected = [np.frombuffer(loader.latents(2 + i), np.float16) for i in first["sample_id"].tolist()]
        assert (first["latents"].flatten(1).numpy() == np.stack(expected)).all()
        for other in others:
            assert other["sample_id"].tolist() == first["sample_id"].tolist() and other["caption"] == first["caption"]
            assert (other["latents"] == first["latents"]).all()


def test_the_benchmark_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loader.main(["--samples", "1000", "--batch_size", "32", "--rounds", "1", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert {row["case"] for row in found["rows"]} >= {"LatentsDataModule", "CaptionedImagesDataModule, MDS"}
    assert all(row["rate"] > 0 for row in found["rows"] + found["jpeg"]) and found["rows"][0]["ratio"] == 1
    assert found["memory"][-1]["samples"] >= 900 and "samples/s" in capsys.readouterr().out
