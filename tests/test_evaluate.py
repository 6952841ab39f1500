"""`emmdit evaluate` and the evaluation callbacks, from a checkpoint to numbers."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from PIL import Image

from emmdit.evaluation.image_set import ImageSet
from emmdit.evaluation.prompts import GenEvalPrompts, PromptFile
from emmdit.shapes import ShapesPrompts
from tests.test_training import ROOT, emmdit

MODEL = str(ROOT / "assets/shapes_emmdit")
CLIP = f"{{class_path: emmdit.evaluation.CLIP, init_args: {{source: {ROOT}/assets/shapes_clip}}}}"
CONFIG = f"""
prompts:
  class_path: emmdit.shapes.ShapesPrompts
  init_args: {{per_task: 1, unseen: 1, images: 3, phrasings: 1}}  # the words that the model of assets knows
metrics:
  - class_path: emmdit.evaluation.GenEval
    init_args: {{detector: {{class_path: emmdit.shapes.ShapesDetector}}}}
  - class_path: emmdit.evaluation.CLIPScore
    init_args: {{clip: {CLIP}}}
  - class_path: emmdit.evaluation.FID
    init_args:
      features: {{class_path: emmdit.evaluation.CLIPFeatures, init_args: {{clip: {CLIP}}}}}
      reference: {ROOT}/assets/shapes_clip/shapes_p48_u48_32_clip_shapes_6000_8819d0fc.npz
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(CONFIG)
    return str(tmp_path / "small.yaml")


def evaluate(out: Path, *args: str) -> tuple[int, str]:
    return emmdit("evaluate", "--ckpt", MODEL, "--out", str(out), "--steps", "4", "--mlflow", "false", *args)


def result(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text())


def images_of(out: Path) -> dict[str, bytes]:
    folder = out / "images"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an evaluation with bounds and a ledger, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(CONFIG)
    ledger = ("--ledger", str(folder / "ledger.json"), "--experiment", "shapes/emmdit")
    status, output = evaluate(folder / "out", "-c", str(folder / "small.yaml"), "--bounds", *ledger)
    assert status == 0, output
    return folder / "out", output


@pytest.fixture
def out(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(finished[0], tmp_path / "out")


def test_one_command_gives_numbers_report_and_ledger_row(finished: tuple[Path, str]) -> None:
    out, output = finished
    found = result(out)
    assert found["images"] == 30 and found["prompts"]["prompts"] == 10
    names = {"geneval_shapes", "geneval_shapes_position", "clip_score_shapes", "fid_clip_shapes_30"}
    names |= {"geneval_shapes_unseen", "geneval_shapes_unseen_position"}
    assert names <= set(found["metrics"]) and "geneval_shapes_unseen_two_object" not in found["metrics"]
    assert found["sampling"]["steps"] == 4 and len(found["source"]["sha256"]) == 64 and found["libraries"]["torch"]
    upper, own, lower = found["columns"]["real renders"], found["metrics"], found["columns"]["noise"]
    for name in ("geneval_shapes", "geneval_shapes_unseen"):
        assert upper[name] >= 0.9 > 0.1 >= lower[name]
    assert upper["clip_score_shapes"] > own["clip_score_shapes"] > lower["clip_score_shapes"]
    assert max(own["fid_clip_shapes_30"], upper["fid_clip_shapes_30"]) < lower["fid_clip_shapes_30"] / 2
    rows = [json.loads(line) for line in (out / "geneval_results.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and (out / "images" / rows[0]["filename"]).is_file()
    tasks = {row["tag"]: row["correct"] for row in rows}
    assert len(tasks) == 6 and "geneval_shapes" in output and "real renders" in output
    assert "<html" in (out / "report.html").read_text()
    (row,) = json.loads((out.parent / "ledger.json").read_text())
    assert row["experiment"] == "shapes/emmdit"
    assert row["metrics"]["geneval_overall"] == found["metrics"]["geneval_shapes"]
    assert row["metrics"]["geneval_unseen"] == found["metrics"]["geneval_shapes_unseen"]
    assert {"geneval_colors", "fid_clip", "clip_score"} <= set(row["metrics"])


def test_a_killed_evaluation_makes_what_is_missing_and_no_more(out: Path, config: str) -> None:
    whole, numbers = images_of(out), result(out)["metrics"]
    gone = list(whole)[4:9]
    for name in gone:
        (out / "images" / name).unlink()
    stamps = {name: (out / "images" / name).stat().st_mtime_ns for name in whole if name not in gone}
    (out / "evaluation.json").unlink()
    assert evaluate(out, "-c", config)[0] == 0
    assert all((out / "images" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    for name in gone:  # generated in a batch of another size: the same but for rounding
        a, b = (
            torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).int()
            for path in (out / "images" / name, io.BytesIO(whole[name]))
        )
        assert (a - b).abs().max() <= 1
    assert result(out)["metrics"] == pytest.approx(numbers, rel=0.02)


def test_other_settings_and_broken_images_are_refused(out: Path, config: str) -> None:
    status, output = evaluate(out, "-c", config, "--guidance", "1.5")
    assert status == 2 and "sampling" in output and str(out / "images") in output
    status, output = evaluate(out, "-c", config, "--seed", "1")
    assert status == 2 and "seed" in output and "sampling" not in output
    victim = out / "images/00002/samples/00001.png"
    victim.write_bytes(victim.read_bytes()[:60])
    status, output = evaluate(out, "-c", config)
    assert status == 2 and str(victim) in output


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (["--ckpt", "no/such/run"], "no/such/run"),
        (["--metrics", "[]"], "experiments/evaluation/shapes.yaml"),
        (["--ledger", "x.json"], "--experiment"),
        (["--device", "cuda"], "--device cpu"),
        (["--weights", "ema"], "--weights"),
        (["--prompts.init_args.per_task", "0"], "per_task"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path: Path, config: str, argument: list[str], words: str) -> None:
    if "cuda" in argument and torch.cuda.is_available():
        pytest.skip("there is one")
    status, output = evaluate(tmp_path / "out", "-c", config, *argument)
    assert status == 2 and words in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.png"))


def test_missing_weights_show_before_an_image_is_generated(tmp_path: Path, config: str) -> None:
    text = Path(config).read_text().replace(f"{ROOT}/assets/shapes_clip}}", "openai/clip-vit-base-patch32}")
    Path(config).write_text(text)
    status, output = evaluate(tmp_path / "out", "-c", config)
    assert status == 2 and "openai/clip-vit-base-patch32" in output
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("launcher", ["torchrun", "trainer"])
def test_two_processes_measure_what_one_does(
    finished: tuple[Path, str], tmp_path: Path, config: str, launcher: str
) -> None:
    one, two = finished[0], tmp_path / "two"
    command = ["-m", "lightning_modules", "evaluate", "--ckpt", MODEL, "--steps", "4", "--mlflow", "false"]
    command += ["-c", config, "--out", str(two), "--bounds"]
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, "--device", "cpu"]
    else:
        (tmp_path / "trainer").mkdir()
        (tmp_path / "trainer/two.yaml").write_text("trainer: {accelerator: cpu, devices: 2, precision: bf16-mixed}")
        command += ["-c", str(tmp_path / "trainer/two.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert images_of(two).keys() == images_of(one).keys()
    assert result(two)["metrics"] == pytest.approx(result(one)["metrics"], rel=0.02)
    assert len((two / "geneval_results.jsonl").read_text().splitlines()) == 30
    one, two = (result(folder)["columns"] for folder in (one, two))
    assert two.keys() == one.keys() and all(two[name] == pytest.approx(one[name], rel=1e-3) for name in one)


def test_numbers_go_to_a_run_in_mlflow(tmp_path: Path, config: str) -> None:
    status, output = emmdit("evaluate", "--ckpt", MODEL, "--out", str(tmp_path / "out"), "--steps", "2", "-c", config)
    assert status == 0, output
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs(["1"])
    assert run.data.metrics["eval/geneval_shapes"] == result(tmp_path / "out")["metrics"]["geneval_shapes"]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "evaluation")] == ["evaluation/report.html"]


def test_a_released_file(tmp_path: Path) -> None:
    """With tiny random encoders only that it goes through; stock pipelines of diffusers are in test_compare.py."""
    (tmp_path / "two.txt").write_text("a photo of a red circle\na photo of a cross\n")
    (tmp_path / "clip.yaml").write_text(
        f"prompts: {{class_path: emmdit.evaluation.PromptFile, init_args: {{path: {tmp_path}/two.txt}}}}\n"
        f"metrics: [{{class_path: emmdit.evaluation.CLIPScore, init_args: {{clip: {CLIP}}}}}]\n"
    )
    common = ["-c", str(tmp_path / "clip.yaml"), "--mlflow", "false", "--steps", "2"]
    released = str(ROOT / "tests/data/emmdit/emmdit_512_small.weights.safetensors")
    encoders = ["--text-encoder", "standin:llama?caption_channels=24", "--autoencoder", "standin:dc_ae"]
    out = tmp_path / "released"
    status, output = emmdit("evaluate", "--ckpt", released, *encoders, *common, "--out", str(out))
    assert status == 0, output
    assert result(out)["source"]["resolution"] == 512 and "clip_score_shapes" in result(out)["metrics"]
    status, output = emmdit("evaluate", "--ckpt", released, *common, "--out", str(tmp_path / "without"))
    assert status == 2 and "meta-llama/Llama-3.2-1B" in output  # gated, and there is no network


# -- sets ----------------------------------------------------------------------------------------------


def test_no_two_images_share_a_seed_within_or_between_evaluations() -> None:
    prompts = ShapesPrompts(per_task=3, images=4)
    seeds = [sample.seed for seed in range(3) for sample in prompts.samples(seed)]
    assert len(set(seeds)) == len(seeds) == 3 * 4 * 6 * 3
    assert len(ShapesPrompts().lines) == 6 * 48


def test_shares_of_the_ranks_make_the_whole(tmp_path: Path) -> None:
    prompts = ShapesPrompts(per_task=1, images=3)
    for world in (1, 2, 4, 5, 23):
        shares = [ImageSet(tmp_path, prompts, 0, {}, rank, world).samples for rank in range(world)]
        together = sorted((s.index, s.number) for share in shares for s in share)
        assert together == [(i, n) for i in range(6) for n in range(3)]


def test_ranks_of_a_sharded_network_generate_equally_often(tmp_path: Path) -> None:
    prompts = ShapesPrompts(per_task=1, images=3)
    calls = []
    for rank in range(4):  # shares of 5, 5, 4 and 4
        images, sizes = ImageSet(tmp_path / str(rank), prompts, 0, {}, rank, 4), []

        def generate(asked: list[str], seeds: list[int], sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(len(asked))
            return torch.zeros(len(asked), 3, 4, 4)

        assert images.make(generate, batch_size=4, together=True) == len(images.samples)
        assert not images.missing()
        calls.append(len(sizes))
    assert calls == [2, 2, 2, 2]


def test_a_set_with_foreign_images_or_links_is_refused(tmp_path: Path) -> None:
    images = ImageSet(tmp_path / "set", ShapesPrompts(per_task=1, images=2), 0, {})
    images.open()
    images.make(lambda asked, seeds: torch.zeros(len(asked), 3, 4, 4), batch_size=4)
    assert images.read(images.samples).shape == (12, 3, 4, 4)
    odd = tmp_path / "set" / images.samples[3].path
    Image.new("RGB", (4, 5)).save(odd)
    with pytest.raises(ValueError, match=str(odd)):
        images.read(images.samples)
    outside = odd.parent.rename(tmp_path / "outside")
    odd.parent.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{odd.parent} is a link"):
        images.open()
    assert len(list(outside.iterdir())) == 2


def test_prompt_sets(tmp_path: Path) -> None:
    assert len(GenEvalPrompts().lines) == 553 and len(GenEvalPrompts(first=2).lines) == 12
    assert GenEvalPrompts().sha256 != GenEvalPrompts(first=2).sha256
    (tmp_path / "mine.txt").write_text("a cat\na dog on a mat\n")
    mine = PromptFile(str(tmp_path / "mine.txt"))
    assert [line["prompt"] for line in mine.lines] == ["a cat", "a dog on a mat"] and mine.name == "mine"
    with pytest.raises(ValueError, match=r"mine\.txt.*\b2\b.*\b3\b.*count"):
        _ = PromptFile(str(tmp_path / "mine.txt"), count=3).lines
