"""The curves of the students: collected from runs, kept when the runs are gone."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import students_curves
from lightning_modules.callbacks.summary import write_csv


def run(folder: Path, name: str, seed: int, output: float) -> None:
    curves = {"train/task": {49: 0.4, 99: 0.2}, "train/output": {49: output, 99: output / 2}}
    curves |= {"train/features": {49: 0.5, 99: 0.3}, "val/loss_ema": {100: 0.25}}
    write_csv(curves, folder / "students" / name / f"seed{seed}" / "curve.csv")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_collected_and_those_that_are_gone_stay(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table, figure = tmp_path / "curves.csv", tmp_path / "docs" / "curves.png"
    where = ["--table", str(table), "--figure", str(figure)]
    assert students_curves.main(["--runs", str(tmp_path / "none"), *where]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err and not figure.exists()

    run(tmp_path / "a", "mm_edit", 0, 0.2)
    run(tmp_path / "a", "mm_edit_no_conv_fusion", 1, 0.4)
    run(tmp_path / "a", "something_else", 0, 0.9)
    assert students_curves.main(["--runs", str(tmp_path / "a"), *where]) == 0
    run(tmp_path / "b", "mm_edit", 0, 0.1)  # trained anew
    run(tmp_path / "b", "edit", 2, 0.3)
    assert students_curves.main(["--runs", str(tmp_path / "b"), *where]) == 0
    found = rows(table)
    runs = [(row["experiment"], row["seed"], row["train/output"]) for row in found if row["step"] == "49"]
    assert runs == [("edit", "2", "0.3"), ("mm_edit", "0", "0.1"), ("mm_edit_no_conv_fusion", "1", "0.4")]
    assert [row["val/loss_ema"] for row in found if row["experiment"] == "edit"] == ["", "", "0.25"]
    assert len(Image.open(figure).convert("RGB").getcolors(1 << 20)) > 10  # drawn
