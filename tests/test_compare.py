"""A student beside its teacher: errors against closed forms, the command from two folders to its report."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from emmdit.encoders import SD3TextEncoders
from emmdit.encoders.standins import standin
from emmdit.evaluation import compare
from emmdit.evaluation.compare import Call, check_pair, compared, feature_errors, latency, spread_over
from emmdit.evaluation.report import write_report
from emmdit.files import read_settings
from emmdit.networks import attention_layers, linearize
from emmdit.pipeline import TextToImagePipeline
from emmdit.timing import Timing
from lightning_modules.commands.compare import _part, open_teacher, recorded_calls, teacher_calls
from lightning_modules.commands.load_model import open_model
from tests.test_evaluate import CLIP, CONFIG, MODEL
from tests.test_linearize import TEACHERS, awake, each, inputs, pixart, sd3
from tests.test_training import emmdit as command

# -- errors --------------------------------------------------------------------------------------------


def calls(name: str, dtype: torch.dtype = torch.float32) -> list[Call]:
    """Two timesteps of one image under guidance, say."""
    found = []
    for t in (900.0, 300.0):
        given = {k: v.to(dtype) for k, v in inputs(name, 8, 8).items()} | {"timestep": torch.full((2,), t)}
        found.append(Call(given.pop("hidden_states"), given))
    return found


def scaled(linear: nn.Module, factor: float) -> None:
    linear = linear[0] if isinstance(linear, nn.ModuleList) else linear
    for parameter in linear.parameters():
        parameter.data *= factor


@each
def test_a_teacher_is_no_distance_from_itself(name: str) -> None:
    teacher = TEACHERS[name]()
    found = feature_errors(copy.deepcopy(teacher), teacher, [calls(name), calls(name)])
    layers = list(attention_layers(teacher))
    assert found["timesteps"] == [900.0, 300.0] and list(found["image"]) == layers
    assert bool(found["prompt"]) == (name != "pixart") and set(found["prompt"]) <= set(layers)
    assert found["prediction"] == [0, 0] and set(found["mean"].values()) == {0}
    assert all(values == [0, 0] for part in ("image", "prompt") for values in found[part].values())


@each
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_an_output_scaled_by_a_tenth_is_a_tenth_off(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Of the last layer, the prediction after it, and the prompt tokens of the first."""
    teacher = TEACHERS[name]().to(dtype)
    student, (first, *_, last) = copy.deepcopy(teacher), attention_layers(teacher)
    scaled(student.get_submodule(last).to_out, 1.1)
    found = feature_errors(student, teacher, [calls(name, dtype)])
    assert found["image"][last] == pytest.approx([0.1, 0.1], rel=tolerance)
    assert all(error == [0, 0] for layer, error in found["image"].items() if layer != last)
    assert 0 < found["prediction"][0] < 0.5
    assert found["mean"]["image"] == pytest.approx(0.1 / len(found["image"]), rel=tolerance)

    student = copy.deepcopy(teacher)
    scaled(student.proj_out, 1.1)
    found = feature_errors(student, teacher, [calls(name, dtype)])
    assert found["prediction"] == pytest.approx([0.1, 0.1], rel=tolerance) and found["mean"]["image"] == 0

    if name != "pixart":
        student = copy.deepcopy(teacher)
        scaled(student.get_submodule(first).to_add_out, 0.9)
        found = feature_errors(student, teacher, [calls(name, dtype)])
        assert found["prompt"][first] == pytest.approx([0.1, 0.1], rel=tolerance) and found["image"][first] == [0, 0]


def test_a_predicted_variance_does_not_count() -> None:
    teacher = pixart(out_channels=8)
    student = copy.deepcopy(teacher)
    for parameter in student.proj_out.parameters():
        parameter.data.unflatten(0, (-1, 8))[:, 4:] *= 3
    assert not torch.equal(student(**inputs("pixart")).sample, teacher(**inputs("pixart")).sample)
    assert feature_errors(student, teacher, [calls("pixart")])["prediction"] == [0, 0]


def test_images_are_pooled_and_both_networks_see_the_same() -> None:
    """One error over all images, as if they were one batch; not a mean of errors."""
    teacher = sd3()
    student = awake(linearize(copy.deepcopy(teacher)))
    large = [Call(call.latents * 3, call.arguments) for call in calls("sd3")]
    with recorded_calls(student) as seen, recorded_calls(teacher) as expected:
        found = feature_errors(student, teacher, [calls("sd3"), large])
    assert len(seen) == len(expected) == 4
    for a, b in zip(seen, expected, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert all(torch.equal(a.arguments[key], b.arguments[key]) for key in b.arguments)
    for step in (0, 1):
        own, its = (
            torch.cat([trajectory[step](net) for trajectory in (calls("sd3"), large)]) for net in (student, teacher)
        )
        assert found["prediction"][step] == pytest.approx(((own - its).norm() / its.norm()).item(), rel=1e-4)
    assert set(found["image"]) == set(attention_layers(teacher)) and min(min(v) for v in found["image"].values()) > 0
    last = list(attention_layers(teacher))[-1]
    assert last not in found["prompt"]  # whose text nothing reads
    with pytest.raises(ValueError, match="timesteps"):
        feature_errors(student, teacher, [calls("sd3"), calls("sd3")[::-1]])


def test_timesteps_lie_in_the_middles_of_equal_parts() -> None:
    assert spread_over(range(20), 5) == [1, 5, 9, 13, 17] and spread_over(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread_over(range(3), 5) == [0, 1, 2] and spread_over(range(5), 1) == [2]


def test_latency_is_of_both_on_the_same_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [sd3(), sd3(num_layers=1)]
    call = calls("sd3")[0]
    predictions = [call(network) for network in networks]

    def clock(runs: dict, device: torch.device, rounds: int) -> dict[str, Timing]:
        assert all(torch.equal(run(), own) for run, own in zip(runs.values(), predictions, strict=True))
        return {name: Timing(s, s, s, rounds) for name, s in (("student", 0.01), ("teacher", 0.04))}

    monkeypatch.setattr(compare, "interleaved", clock)
    found = latency(*networks, call, torch.device("cpu"), rounds=3)
    assert found["speedup"] == pytest.approx(4) and found["student"]["ms"] == pytest.approx(10)
    assert found["teacher"]["parameters"] < found["student"]["parameters"]


def test_differences_and_ratios() -> None:
    found = compared({"a": 0.3, "b": 2.0, "c": 1.0}, {"a": 0.4, "b": 0.0})
    assert found["difference"] == {"a": pytest.approx(-0.1), "b": 2.0} and found["ratio"] == {"a": pytest.approx(0.75)}


# -- what cannot be compared ---------------------------------------------------------------------------


def test_networks_that_do_not_belong_together() -> None:
    student = linearize(sd3())
    check_pair(student, sd3())
    for teacher, words in (
        (pixart(), "MMEDiTTransformer2DModel.*PixArtTransformer2DModel"),
        (sd3(in_channels=8), r"\b16\b.*latent.*\b8\b"),
        (sd3(joint_attention_dim=20), r"\b12\b.*text.*\b20\b"),
        (sd3(pooled_projection_dim=6), r"\b10\b.*pooled.*\b6\b"),
        (sd3(num_attention_heads=4, caption_projection_dim=32), r"\b16\b.*attention.*\b32\b"),
        (nn.Linear(2, 2), r"\bLinear\b"),
    ):
        with pytest.raises(ValueError, match=words):
            check_pair(student, teacher)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained teacher of the shapes world, linearized and not distilled, as a pipeline's folder."""
    torch.manual_seed(0)
    pipeline = TextToImagePipeline.from_pretrained(MODEL)
    pipeline.transformer = linearize(pipeline.transformer)
    folder = tmp_path_factory.mktemp("pair") / "student"
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"with_mask": false', '"with_mask": true', "with_mask.*False.*True"),
        ("emmdit.flow.RectifiedFlow", "emmdit.flow.EpsilonDDPM", "RectifiedFlow.*EpsilonDDPM"),
        ('"whitening": 0.25', '"whitening": 0.5', r"whitening.*\b0\.25\b.*\b0\.5\b"),
        ('"cache_size": 4096', '"cache_size": 8', None),
    ],
)
def test_pipelines_that_differ_in_more_than_their_network(
    student: Path, tmp_path: Path, old: str, new: str, words: str | None
) -> None:
    index = shutil.copytree(MODEL, tmp_path / "teacher") / "model_index.json"
    text = index.read_text()
    assert old in text
    index.write_text(text.replace(old, new))
    with contextlib.nullcontext() if words is None else pytest.raises(ValueError, match=words):
        open_teacher(open_model(student), index.parent)


def test_defaults_and_what_a_yaml_says_are_the_same() -> None:
    said = {"source": "some/where/stable-diffusion-3.5-medium", "clip_channels": [768, 1280], "dtype": "float32"}
    told = []
    for given in ({}, said):
        pipeline = SimpleNamespace(text=SD3TextEncoders(), config={"text": {"init_args": given}})
        told.append(_part(pipeline, "text"))
    assert told[0] == told[1] and told[0]["t5_length"] == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--teacher-weights", "raw"], "--teacher"),
        (["--teacher", "no/such/run"], "no/such/run"),
        (["--teacher", MODEL, "--teacher-weights", "ema"], "--weights"),
    ],
)
def test_bad_input_ends_in_one_sentence(student: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "small.yaml").write_text(CONFIG)
    common = ["evaluate", "--ckpt", str(student), "-c", str(tmp_path / "small.yaml"), "--mlflow", "false"]
    status, output = command(*common, "--out", str(tmp_path / "out"), *arguments)
    assert status == 2 and words in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.png"))


# -- the command ---------------------------------------------------------------------------------------


def test_one_command_gives_both_side_by_side(student: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(CONFIG.replace("unseen: 1, images: 3", "images: 1"))
    common = ["evaluate", "-c", str(tmp_path / "small.yaml"), "--mlflow", "false", "--steps", "4"]
    ledger, out, alone = tmp_path / "ledger.json", tmp_path / "out", tmp_path / "alone"
    shared = ["--teacher", MODEL, "--teacher-images", str(tmp_path / "teacher")]
    named = ["--ledger", str(ledger), "--experiment", "shapes/emmdit_hybrid"]
    status, output = command(*common, "--ckpt", str(student), *shared, *named, "--out", str(out))
    assert status == 0, output
    result = json.loads((out / "evaluation.json").read_text())
    pair = result["pair"]

    # The teacher's numbers and images are those of its own evaluation.
    status, told = command(*common, "--ckpt", MODEL, "--out", str(alone))
    assert status == 0, told
    expected = json.loads((alone / "evaluation.json").read_text())
    assert pair["metrics"] == expected["metrics"] and pair["teacher"] == expected["source"]
    generated = {path.relative_to(alone / "images"): path.read_bytes() for path in (alone / "images").rglob("*.png")}
    assert len(generated) == 6
    assert all((tmp_path / "teacher" / path).read_bytes() == content for path, content in generated.items())
    assert any((out / "images" / path).read_bytes() != content for path, content in generated.items())
    for name, value in result["metrics"].items():
        assert pair["difference"][name] == value - pair["metrics"][name]

    errors = pair["features"]
    assert len(errors["timesteps"]) == 4 and errors["timesteps"] == sorted(errors["timesteps"], reverse=True)
    assert set(errors["image"]) == {f"blocks.{i}.attn" for i in range(8)} and len(errors["prompt"]) == 7
    assert errors["mean"]["prediction"] > 0.1 and pair["latency"]["speedup"] > 0
    assert pair["latency"]["latents"] == [2, 32, 8, 8]  # one image under guidance

    assert len(pair["shown"]) == 6 and len({row["prompt"] for row in pair["shown"]}) == 6
    grid = Image.open(out / "pair.png")
    assert grid.size == (6 * 130 + 2, 2 * 130 + 2) and read_settings(out / "pair.png")["rows"] == ["teacher", "student"]
    first = pair["shown"][0]
    for name, top in (("teacher", 2), ("student", 132)):
        own = Image.open(out / first[name])
        assert grid.getpixel((2 + 6, top + 6)) == own.getpixel((1, 1))

    page = (out / "report.html").read_text()
    for words in ("student", "teacher", "difference", "ratio", "Error of each layer", "blocks.3.attn", "Latency"):
        assert words in page
    assert "student" in output and "ratio" in output and page.count("<img") >= 12

    (row,) = json.loads(ledger.read_text())
    assert row["experiment"] == "shapes/emmdit_hybrid" and row["metrics"] == result["ledger_metrics"]
    assert row["teacher"]["metrics"] == expected["ledger_metrics"]
    assert row["teacher"]["errors"] == errors["mean"] and row["teacher"]["sha256"] == expected["source"]["sha256"]

    # Another student of the same teacher: here the teacher itself, whose images are there already.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").rglob("*.png")}
    status, output = command(*common, "--ckpt", MODEL, *shared, "--out", str(tmp_path / "same"))
    assert status == 0, output
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").rglob("*.png")}
    pair = json.loads((tmp_path / "same/evaluation.json").read_text())["pair"]
    assert set(pair["difference"].values()) == {0} and set(pair["ratio"].values()) <= {1}
    assert set(pair["features"]["mean"].values()) == {0} and math.isclose(pair["latency"]["speedup"], 1, abs_tol=0.8)


def stock(name: str, folder: Path) -> None:
    """Teacher and student as pipelines of diffusers itself, alike but for the network."""
    if name == "pixart":
        text = standin("t5?caption_channels=12")
        encoders = dict(
            tokenizer=AutoTokenizer.from_pretrained(text), text_encoder=T5EncoderModel.from_pretrained(text)
        )
        teacher, vae, pipeline, scheduler = pixart(), "sdxl_vae", PixArtSigmaPipeline, DPMSolverMultistepScheduler()
    else:
        text = standin("sd3_text", clip_l=16, clip_g=24, caption_channels=64)
        text = SD3TextEncoders(str(text), caption_channels=64, clip_channels=(16, 24), dtype="float32")
        encoders, teacher = text.components(), sd3(joint_attention_dim=64, pooled_projection_dim=40)
        vae, pipeline, scheduler = "sd3_vae", StableDiffusion3Pipeline, FlowMatchEulerDiscreteScheduler()
    parts = dict(**encoders, vae=AutoencoderKL.from_pretrained(standin(vae)), scheduler=scheduler)
    for what, network in (("teacher", teacher), ("student", awake(linearize(copy.deepcopy(teacher))))):
        pipeline(transformer=network, **parts).save_pretrained(folder / what)


def test_stock_pipelines(tmp_path: Path) -> None:
    stock("pixart", tmp_path)
    (tmp_path / "two.txt").write_text("a photo of a red circle\na photo of a cross\n")
    (tmp_path / "clip.yaml").write_text(
        f"prompts: {{class_path: emmdit.evaluation.PromptFile, init_args: {{path: {tmp_path}/two.txt}}}}\n"
        f"metrics: [{{class_path: emmdit.evaluation.CLIPScore, init_args: {{clip: {CLIP}}}}}]\n"
    )
    pair = ["--ckpt", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    size = ["--height", "64", "--width", "64", "--steps", "2", "--dtype", "bfloat16"]
    out = tmp_path / "out"
    status, output = command(
        "evaluate", *pair, "-c", str(tmp_path / "clip.yaml"), "--mlflow", "false", *size, "--out", str(out)
    )
    assert status == 0, output
    result = json.loads((out / "evaluation.json").read_text())
    assert result["source"]["pipeline"] == result["pair"]["teacher"]["pipeline"] == "PixArtSigmaPipeline"
    errors = result["pair"]["features"]
    assert (
        list(errors["image"]) == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"] and not errors["prompt"]
    )
    assert 0 < errors["mean"]["prediction"] < math.inf and errors["mean"]["image"] > 0


def test_both_start_from_the_same_noise_and_text(tmp_path: Path) -> None:
    """The first calls of both networks carry the same tensors, the second ones follow from other predictions."""
    stock("sd3", tmp_path)
    model = open_model(tmp_path / "student", settings={"steps": 2, "height": 64, "width": 64, "guidance": 3.0})
    teacher = open_teacher(model, tmp_path / "teacher")
    own, seen = model.network, []
    for one in (model, teacher):
        with recorded_calls(one.network) as found:
            one.generate(["a photo", "a cat"], [3, 4])
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 2 and model.network is own is not teacher.network
    for key in ("timestep", "encoder_hidden_states", "pooled_projections"):
        assert torch.equal(seen[0][0].arguments[key], seen[1][0].arguments[key])
    noise = seen[0][0].latents
    assert torch.equal(noise, seen[1][0].latents)
    assert noise.shape[0] == 4 and torch.equal(noise[:2], noise[2:]) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(seen[0][1].latents, seen[1][1].latents)


@pytest.mark.parametrize("sampler", ["euler", "dpm_solver"])
def test_calls_from_the_trajectory_are_those_that_generation_makes(student: Path, sampler: str) -> None:
    """Inside the interval of guidance and outside it."""
    model = open_model(student, settings={"steps": 4, "sampler": sampler})
    model.pipeline.sampling = model.pipeline.sampling.replace(guidance_interval=[100.0, 800.0])
    teacher = open_teacher(model, MODEL)
    found = teacher_calls(model, teacher, "a photo of a star", 3)
    with recorded_calls(teacher.network) as expected:
        teacher.generate(["a photo of a star"], [3])
    assert [len(call.latents) for call in found] == [1, 2, 2, 1]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.latents, b.latents) and a.arguments.keys() == b.arguments.keys()
        assert all(torch.equal(a.arguments[key], value) for key, value in b.arguments.items())


def test_a_report_survives_missing_images(tmp_path: Path) -> None:
    times = {"ms": 1.0, "ms_low": 0.9, "ms_high": 1.1, "parameters": 10, "peak_memory_mib": 5.0}
    pair = {
        "teacher": {"source": "runs/teacher"},
        "metrics": {"a": 0.5},
        "difference": {"a": -0.25},
        "ratio": {"a": 0.5},
        "features": {"timesteps": [500.0], "image": {"l|1": [0.2]}, "prompt": {"l|1": [0.3]}, "prediction": [0.1]},
        "latency": {"student": times, "teacher": times, "speedup": 1.0, "rounds": 3, "latents": [2, 4, 8, 8]},
        "shown": [{"prompt": "a <b>|c", "seed": 0, "teacher": "no.png", "student": "no.png"}],
    }
    page = write_report(tmp_path, {"metrics": {"a": 0.25}, "pair": pair}, [], tmp_path).read_text()
    assert page.count('class="missing"') == 2 and "a &lt;b&gt;|c" in page and "-0.250" in page
    assert "MiB" in page and "runs/teacher" in page
    assert "<td>l|1</td>" in page and "0.300" in page
