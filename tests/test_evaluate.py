"""`emmdit evaluate` and the evaluation callbacks, from a checkpoint to numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from emmdit.encoders.standins import standin
from emmdit.evaluation.geneval import read_results
from emmdit.evaluation.image_set import ImageSet
from emmdit.evaluation.prompts import GenEvalPrompts, PromptFile
from emmdit.shapes import ShapesPrompts
from tests.test_training import ROOT, emmdit

MODEL = str(ROOT / "assets/shapes_emmdit")
CLIP = f"{{class_path: emmdit.evaluation.CLIP, init_args: {{source: {ROOT}/assets/shapes_clip}}}}"
CONFIG = f"""
prompts: {{class_path: emmdit.shapes.ShapesPrompts, init_args: {{per_task: 1, images: 3}}}}
metrics:
  - class_path: emmdit.evaluation.GenEval
    init_args: {{detector: {{class_path: emmdit.shapes.ShapesDetector}}}}
  - class_path: emmdit.evaluation.CLIPScore
    init_args: {{clip: {CLIP}}}
  - class_path: emmdit.evaluation.FID
    init_args:
      features: {{class_path: emmdit.evaluation.CLIPFeatures, init_args: {{clip: {CLIP}}}}}
      reference: {ROOT}/assets/shapes_clip/shapes_p200_32_clip_shapes_6000_d32b7483.npz
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(CONFIG)
    return str(tmp_path / "small.yaml")


def evaluate(out: Path, *args: str) -> tuple[int, str]:
    return emmdit("evaluate", "--ckpt", MODEL, "--out", str(out), "--steps", "4", "--mlflow", "false", *args)


def result(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text())


def pictures(out: Path) -> dict[str, bytes]:
    folder = out / "images"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_one_command_gives_numbers_report_and_ledger_row(tmp_path: Path, config: str) -> None:
    ledger = tmp_path / "ledger.json"
    status, output = evaluate(
        tmp_path / "out", "-c", config, "--bounds", "--ledger", str(ledger), "--experiment", "shapes/emmdit"
    )
    assert status == 0, output
    found = result(tmp_path / "out")
    assert found["images"] == 18 and found["prompts"]["prompts"] == 6
    assert {"geneval_shapes", "geneval_shapes_position", "clip_score_shapes", "fid_clip_shapes_18"} <= set(
        found["metrics"]
    )
    assert found["sampling"]["steps"] == 4 and len(found["source"]["sha256"]) == 64 and found["libraries"]["torch"]
    upper, own, lower = (
        columns.get("metrics", columns)
        for columns in (found["columns"]["real renders"], found, found["columns"]["noise"])
    )
    assert upper["geneval_shapes"] >= 0.9 > 0.1 >= lower["geneval_shapes"]
    assert upper["clip_score_shapes"] > own["clip_score_shapes"] > lower["clip_score_shapes"]
    assert max(own["fid_clip_shapes_18"], upper["fid_clip_shapes_18"]) < lower["fid_clip_shapes_18"] / 2
    rows = read_results(tmp_path / "out/geneval_results.jsonl")
    assert len(rows) == 18 and (tmp_path / "out/images" / rows[0]["filename"]).is_file()
    tasks = {row["tag"]: row["correct"] for row in rows}
    assert len(tasks) == 6 and "geneval_shapes" in output and "real renders" in output
    assert "<html" in (tmp_path / "out/report.html").read_text()
    (row,) = json.loads(ledger.read_text())
    assert row["experiment"] == "shapes/emmdit"
    assert row["metrics"]["geneval_overall"] == found["metrics"]["geneval_shapes"]
    assert {"geneval_colors", "fid_clip", "clip_score"} <= set(row["metrics"])


def test_a_killed_evaluation_makes_what_is_missing_and_no_more(tmp_path: Path, config: str) -> None:
    out = tmp_path / "out"
    assert evaluate(out, "-c", config)[0] == 0
    whole, numbers = pictures(out), result(out)["metrics"]
    gone = list(whole)[4:9]
    for name in gone:
        (out / "images" / name).unlink()
    stamps = {name: (out / "images" / name).stat().st_mtime_ns for name in whole if name not in gone}
    (out / "evaluation.json").unlink()
    assert evaluate(out, "-c", config)[0] == 0
    assert all((out / "images" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    for name in gone:  # drawn in a batch of another size: the same but for rounding
        a, b = (
            torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).int()
            for path in (out / "images" / name, _save(tmp_path / "before.png", whole[name]))
        )
        assert (a - b).abs().max() <= 1
    assert result(out)["metrics"] == pytest.approx(numbers, rel=0.02)


def _save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, config: str) -> None:
    assert evaluate(tmp_path / "out", "-c", config)[0] == 0
    status, output = evaluate(tmp_path / "out", "-c", config, "--guidance", "1.5")
    assert status == 2 and "sampling" in output and str(tmp_path / "out/images") in output
    status, output = evaluate(tmp_path / "out", "-c", config, "--seed", "1")
    assert status == 2 and "seed" in output and "sampling" not in output


def test_broken_pictures_are_named(tmp_path: Path, config: str) -> None:
    assert evaluate(tmp_path / "out", "-c", config)[0] == 0
    victim = tmp_path / "out/images/00002/samples/00001.png"
    victim.write_bytes(victim.read_bytes()[:60])
    status, output = evaluate(tmp_path / "out", "-c", config)
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


def test_missing_weights_show_before_a_picture_is_drawn(tmp_path: Path, config: str) -> None:
    text = Path(config).read_text().replace(f"{ROOT}/assets/shapes_clip}}", "openai/clip-vit-base-patch32}")
    Path(config).write_text(text)
    status, output = evaluate(tmp_path / "out", "-c", config)
    assert status == 2 and "openai/clip-vit-base-patch32" in output
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("launcher", ["torchrun", "trainer"])
def test_two_processes_measure_what_one_does(tmp_path: Path, config: str, launcher: str) -> None:
    assert evaluate(tmp_path / "one", "-c", config, "--bounds")[0] == 0
    command = [
        "-m",
        "lightning_modules",
        "evaluate",
        "--ckpt",
        MODEL,
        "--steps",
        "4",
        "--mlflow",
        "false",
        "-c",
        config,
    ]
    command += ["--out", str(tmp_path / "two"), "--bounds"]
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
    assert pictures(tmp_path / "two").keys() == pictures(tmp_path / "one").keys()
    assert result(tmp_path / "two")["metrics"] == pytest.approx(result(tmp_path / "one")["metrics"], rel=0.02)
    assert len(read_results(tmp_path / "two/geneval_results.jsonl")) == 18
    one, two = (result(tmp_path / name)["columns"] for name in ("one", "two"))
    assert two.keys() == one.keys() and all(two[name] == pytest.approx(one[name], rel=1e-3) for name in one)


def test_numbers_go_to_a_run_in_mlflow(tmp_path: Path, config: str) -> None:
    status, output = emmdit("evaluate", "--ckpt", MODEL, "--out", str(tmp_path / "out"), "--steps", "2", "-c", config)
    assert status == 0, output
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs(["1"])
    assert run.data.metrics["eval/geneval_shapes"] == result(tmp_path / "out")["metrics"]["geneval_shapes"]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "evaluation")] == ["evaluation/report.html"]


def test_a_released_file_and_a_stock_pipeline_of_diffusers(tmp_path: Path) -> None:
    """Whatever draws can be measured: with tiny random models, only that it goes through."""
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

    text, vae = standin("t5?caption_channels=32"), standin("sdxl_vae")
    pipeline = PixArtSigmaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(text),
        text_encoder=T5EncoderModel.from_pretrained(text),
        vae=AutoencoderKL.from_pretrained(vae),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, cross_attention_dim=16,
            caption_channels=32, norm_type="ada_norm_single",
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "pixart")
    out = tmp_path / "stock"
    status, output = emmdit(
        *("evaluate", "--ckpt", str(tmp_path / "pixart"), "--out", str(out), "--height", "32", "--width", "32"), *common
    )
    assert status == 0, output
    assert result(out)["source"]["pipeline"] == "PixArtSigmaPipeline" and result(out)["images"] == 2


# -- sets ----------------------------------------------------------------------------------------------


def test_no_two_pictures_share_a_seed_within_or_between_evaluations() -> None:
    prompts = ShapesPrompts(per_task=3, images=4)
    seeds = [sample.seed for seed in range(3) for sample in prompts.samples(seed)]
    assert len(set(seeds)) == len(seeds) == 3 * 4 * 6 * 3
    assert len(ShapesPrompts().lines) == 300


def test_shares_of_the_ranks_make_the_whole(tmp_path: Path) -> None:
    prompts = ShapesPrompts(per_task=1, images=3)
    for world in (1, 2, 4, 5, 23):
        shares = [ImageSet(tmp_path, prompts, 0, {}, rank, world).samples for rank in range(world)]
        together = sorted((s.index, s.number) for share in shares for s in share)
        assert together == [(i, n) for i in range(6) for n in range(3)]


def test_ranks_of_a_sharded_network_draw_equally_often(tmp_path: Path) -> None:
    prompts = ShapesPrompts(per_task=1, images=3)
    calls = []
    for rank in range(4):  # shares of 5, 5, 4 and 4
        images = ImageSet(tmp_path / str(rank), prompts, 0, {}, rank, 4)
        drawn: list[int] = []

        def draw(asked: list[str], seeds: list[int], drawn: list[int] = drawn) -> torch.Tensor:
            drawn.append(len(asked))
            return torch.zeros(len(asked), 3, 4, 4)

        assert images.make(draw, batch_size=4, together=True) == len(images.samples)
        assert not images.missing()
        calls.append(len(drawn))
    assert calls == [2, 2, 2, 2]


def test_prompt_sets(tmp_path: Path) -> None:
    assert len(GenEvalPrompts().lines) == 553 and len(GenEvalPrompts(first=2).lines) == 12
    assert GenEvalPrompts().sha256 != GenEvalPrompts(first=2).sha256
    (tmp_path / "mine.txt").write_text("a cat\na dog on a mat\n")
    mine = PromptFile(str(tmp_path / "mine.txt"))
    assert [line["prompt"] for line in mine.lines] == ["a cat", "a dog on a mat"] and mine.name == "mine"
    with pytest.raises(ValueError, match=r"mine\.txt.*\b2\b.*\b3\b.*count"):
        _ = PromptFile(str(tmp_path / "mine.txt"), count=3).lines
