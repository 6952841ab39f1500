"""`benchmarks/shapes_score.py`: ground truth, an untrained model, and a model that can not go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import shapes_score
from emmdit import EMMDiTPipeline
from emmdit.data.shapes import TASKS, ShapesWorld, render_scene
from emmdit.encoders import DCTCodec, ShapesText
from emmdit.generate import Sampling
from emmdit.networks import EMMDiTTransformer2DModel

FEW = ["--prompts-per-task", "2", "--images", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model, exported."""
    network = EMMDiTTransformer2DModel(
        sample_size=8,
        num_attention_heads=2,
        attention_head_dim=16,
        block_groups=(1, 1, 1),
        caption_channels=64,
        subregion_pattern=("full",),
    )
    pipeline = EMMDiTPipeline(
        network,
        **DCTCodec().components(),
        **ShapesText().components(),
        codec={"class_path": "emmdit.encoders.DCTCodec"},
        text={"class_path": "emmdit.encoders.ShapesText"},
        sampling={"steps": 3, "guidance": 2.0},
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.save_pretrained(path)
    return path


class Painter:
    """A pipeline that paints `scenes[prompt]`, and keeps what it was asked."""

    def __init__(self, scenes: dict) -> None:
        self.scenes, self.sampling = scenes, Sampling()
        self.seeds, self.batches = [], []

    def to(self, device: str) -> None: ...

    def __call__(self, prompts: list[str], seed: list[int], output_type: str) -> SimpleNamespace:
        assert output_type == "pt" and len(prompts) == len(seed)
        self.seeds += seed
        self.batches.append(len(prompts))
        pictures = np.stack([render_scene(self.scenes[prompt]) for prompt in prompts])
        return SimpleNamespace(images=torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)


@pytest.fixture(scope="module")
def scenes() -> dict:
    """A scene for each prompt that `FEW` asks for."""
    wanted = [(line["tag"], line["prompt"]) for line in ShapesWorld().prompts(2)]
    found = {}
    for tag, prompt in wanted:
        world = ShapesWorld(task_weights=[float(task == tag) for task in TASKS])
        found[prompt] = next(s for s in (world.sample(0, i) for i in range(9999)) if s.caption == prompt)
    return found


def run(tmp_path: Path, *argv: str) -> dict:
    shapes_score.main([*argv, "--json", str(tmp_path / "score.json")])
    return json.loads((tmp_path / "score.json").read_text())


def scores(written: dict) -> dict[str, float]:
    return {row["task"]: row["score"] for row in written["rows"]}


def test_ground_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    written = run(tmp_path, "--real", "--quick", "--images", "4")
    assert [row["task"] for row in written["rows"]] == [*TASKS, "overall"]
    assert min(scores(written).values()) >= 0.99
    # at most 12 prompts of each task, and there are 4 shapes
    assert [row["pictures"] for row in written["rows"]] == [16, 48, 48, 48, 48, 48, 256]
    assert "ground truth" in capsys.readouterr().out


def test_the_script_prints_and_writes_the_same(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]):
    written = run(tmp_path, "--ckpt", str(export), *FEW, "--steps", "2", "--seed", "3", "--batch-size", "16")
    printed = capsys.readouterr()
    assert [row["pictures"] for row in written["rows"]] == [4] * 6 + [24]
    assert [row["prompts"] for row in written["rows"]] == [2] * 6 + [12]
    assert scores(written)["overall"] < 0.2  # untrained
    for row in written["rows"]:
        assert f"| {row['task']} | {row['score']:.3g} | {row['correct']} | {row['pictures']} |" in printed.out
    settings = written["settings"]
    assert settings["sampling"]["steps"] == 2 and settings["sampling"]["guidance"] == 2.0 and settings["seed"] == 3
    assert settings["source"] == "tiny" and str(export.parent) not in json.dumps(written) + printed.out
    assert written["machine"]["torch"] == torch.__version__ and "steps 2" in printed.out
    assert "24/24 pictures" in printed.err and "24/24" not in printed.out


def test_a_model_that_paints_what_it_is_told(tmp_path: Path, scenes: dict, monkeypatch: pytest.MonkeyPatch):
    painter = Painter(scenes)
    monkeypatch.setattr(shapes_score, "load_pipeline", lambda source, weights: (painter, {"weights": weights}))
    options = ["--ckpt", "runs/x", *FEW, "--batch-size", "10", "--weights", "raw", "--guidance", "1.5"]
    written = run(tmp_path, *options)
    assert set(scores(written).values()) == {1.0} and painter.batches == [10, 10, 4]
    assert painter.sampling.guidance == 1.5 and painter.sampling.steps == Sampling().steps
    assert written["settings"]["weights"] == "raw" and written["settings"]["source"] == "runs/x"
    run(tmp_path, *options)
    assert painter.seeds[24:] == painter.seeds[:24] and len(set(painter.seeds)) == 24


def test_seeds_share_no_noise(tmp_path: Path, scenes: dict):
    asked = [line for line in ShapesWorld().prompts(2) for _ in range(2)]
    painter = Painter(scenes)
    for seed in (0, 1, 2):
        list(shapes_score.sampled(painter, asked, seed, batch_size=7))
    assert len(set(painter.seeds)) == 3 * len(asked)


def test_a_model_that_mixes_up_colours(tmp_path: Path, scenes: dict, monkeypatch: pytest.MonkeyPatch):
    """Only the tasks that ask for colours fall; overall is the mean of the tasks, not of the pictures."""
    wrong = {"red": "green", "green": "blue", "blue": "yellow", "yellow": "purple", "purple": "black", "black": "red"}

    def recolored(scene):
        objects = tuple(type(o)(o.shape, wrong[o.color], o.cx, o.cy, o.size) for o in scene.objects)
        return type(scene)(scene.spec, objects, scene.image_size)

    painter = Painter({prompt: recolored(scene) for prompt, scene in scenes.items()})
    monkeypatch.setattr(shapes_score, "load_pipeline", lambda source, weights: (painter, {}))
    found = scores(run(tmp_path, "--ckpt", "runs/x", *FEW))
    assert {task for task, score in found.items() if score == 0.0} == {"colors", "color_attr"}
    assert found["overall"] == pytest.approx(4 / 6)


def test_overall_is_the_mean_of_the_tasks():
    world = ShapesWorld(task_weights=(1, 0, 0, 0, 0, 0))
    asked = [line for line in ShapesWorld().prompts(1) for _ in range(9 if line["tag"] == "single_object" else 1)]
    blank = np.full((32, 32, 3), 212, dtype=np.uint8)
    right = render_scene(next(s for s in (world.sample(0, i) for i in range(99)) if s.caption == asked[0]["prompt"]))
    rows = shapes_score.score((line, right if line["tag"] == "single_object" else blank) for line in asked)
    assert rows[0]["score"] == 1.0 and rows[-1] == {
        "task": "overall",
        "score": pytest.approx(1 / 6),
        "correct": 9,
        "pictures": 14,
        "prompts": 6,
    }


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "one of the arguments --ckpt --real is required"),
        (["--ckpt", "nowhere"], "There is nothing at nowhere"),
        (["--ckpt", "EXPORT", "--weights", "ema"], "leave --weights out"),
        (["--real", "--images", "0"], "must be at least 1, got 0"),
        (["--real", "--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_mistakes_get_a_sentence(argv: list[str], sentence: str, export: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        shapes_score.main([str(export) if word == "EXPORT" else word for word in argv])
    assert sentence in capsys.readouterr().err
