"""`TextToImagePipeline`: saved, loaded and named encoders, seeds, settings, and what a folder may not name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from emmdit import TextToImagePipeline
from emmdit.encoders import DCAE, DCTCodec, MissingModelError, TextEncoder
from emmdit.files import grid, read_settings, save_png, to_uint8
from emmdit.flow import RectifiedFlow, classifier_free_guidance, sample, schedule
from emmdit.generate import Sampling, generate, generate_latents, generate_trajectory, initial_noise
from emmdit.networks import EMMDiTTransformer2DModel
from emmdit.shapes import ShapesText

ROOT = Path(__file__).parents[1]
RED, TWO = "a photo of a red circle", "a photo of two squares"
CODEC = {"class_path": "emmdit.encoders.DCTCodec", "init_args": {}}
TEXT = {"class_path": "emmdit.shapes.ShapesText", "init_args": {"with_mask": True}}


def network(**config) -> EMMDiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = dict(sample_size=8, num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1))
    return EMMDiTTransformer2DModel(**sizes | dict(caption_channels=64, subregion_pattern=("full",)) | config).eval()


def pipeline_with(**sampling) -> TextToImagePipeline:
    parts = DCTCodec().components() | ShapesText().components()
    return TextToImagePipeline(network(), **parts, codec=CODEC, text=TEXT, sampling=sampling)


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return pipeline_with(steps=3, guidance=2.0, guidance_interval=[100.0, 900.0])


@pytest.fixture(scope="module")
def folder(pipeline: TextToImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def standins(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Codec and text of the real classes, named by their (stand-in) sources."""
    monkeypatch.setenv("EMMDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    text = {"source": "standin:llama?caption_channels=64", "caption_channels": 64, "max_length": 8, "dtype": "float32"}
    return {
        "codec": {"class_path": "emmdit.encoders.DCAE", "init_args": {"source": "standin:dc_ae"}},
        "text": {"class_path": "emmdit.encoders.TextEncoder", "init_args": text},
    }


def image_of(pipeline: TextToImagePipeline, prompt: str | list[str] = RED, **call) -> torch.Tensor:
    return pipeline(prompt, output_type="pt", **call).images


# -------------------------------------------------------------------------------- saved and loaded


def test_a_fresh_process_loads_the_folder_and_makes_the_same_image(
    pipeline: TextToImagePipeline, folder: Path, tmp_path: Path
):
    """Fresh, because diffusers finds our classes only in modules that are imported already."""
    script = (
        "import sys, torch\n"
        "from emmdit import TextToImagePipeline\n"
        "pipeline = TextToImagePipeline.from_pretrained(sys.argv[1])\n"
        f"torch.save(pipeline({RED!r}, seed=5, output_type='pt').images, sys.argv[2])\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script, str(folder), str(tmp_path / "image.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
    assert noise == [] and done.stdout == ""
    assert torch.equal(torch.load(tmp_path / "image.pt", weights_only=True), image_of(pipeline, seed=5))


def test_everything_comes_back(pipeline: TextToImagePipeline, folder: Path):
    loaded = TextToImagePipeline.from_pretrained(folder)
    assert isinstance(loaded.codec, DCTCodec) and isinstance(loaded.text, ShapesText) and loaded.text.with_mask
    assert isinstance(loaded.path, RectifiedFlow)
    assert loaded.codec.model is loaded.vae and loaded.text.model is loaded.text_encoder  # not second ones
    assert loaded.sampling == Sampling(steps=3, guidance=2.0, guidance_interval=[100.0, 900.0])
    assert torch.equal(image_of(loaded, [RED, TWO], seed=[3, 4]), image_of(pipeline, [RED, TWO], seed=[3, 4]))


def test_a_pipeline_saved_again_is_the_same_folder(folder: Path, tmp_path: Path):
    TextToImagePipeline.from_pretrained(folder).save_pretrained(tmp_path)
    TextToImagePipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)  # over the files it came from
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix == ".safetensors" or file.name == "tokenizer.json":
            assert file.read_bytes() == (tmp_path / file.relative_to(folder)).read_bytes(), file
    index, again = (json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path))
    assert index == {key: value for key, value in again.items() if key != "_name_or_path"}


def test_sampling_defaults_are_stored_and_used(folder: Path):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["sampling"] == {"steps": 3, "guidance": 2.0, "guidance_interval": [100.0, 900.0]}
    assert index["codec"] == CODEC and index["text"] == TEXT
    loaded, calls = TextToImagePipeline.from_pretrained(folder), []
    loaded.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((len(args[0]), kwargs["timestep"][0].item())), with_kwargs=True
    )
    loaded(RED)
    assert calls == [(1, 1000.0), (2, 500.5), (1, 1.0)]  # guidance only between 100 and 900
    calls.clear()
    loaded(RED, num_inference_steps=2, guidance_scale=0.0, sampler="heun")
    assert [rows for rows, _ in calls] == [1, 1, 1] and loaded.sampling.steps == 3


def test_an_exchanged_or_cast_module_counts(folder: Path):
    loaded = TextToImagePipeline.from_pretrained(folder)
    loaded.to(torch.bfloat16)
    assert image_of(loaded).isfinite().all()
    assert loaded.codec.dtype == loaded.text.dtype == loaded.transformer.dtype == torch.bfloat16
    half = TextToImagePipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and image_of(half).isfinite().all()
    assert (image_of(half) - image_of(TextToImagePipeline.from_pretrained(folder))).abs().mean() < 0.05


# -------------------------------------------------------------------------------- named encoders


def test_encoders_that_are_named_load_at_first_use(standins: dict[str, dict], tmp_path: Path):
    parts = dict(vae=None, text_encoder=None, tokenizer=None)
    made = TextToImagePipeline(network(sample_size=4), **parts, **standins, sampling={"steps": 2})
    made.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "transformer"]
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert not loaded.codec.loaded and not loaded.text.loaded
    images = loaded(RED).images
    assert images[0].size == (128, 128)
    assert loaded.codec.loaded and loaded.text.loaded and loaded.vae is None
    assert torch.equal(image_of(loaded), image_of(made))


def test_pretrained_encoders_can_be_copied_into_the_folder(standins: dict[str, dict], tmp_path: Path):
    """With them inside, the sources need not exist any more."""
    codec, text = DCAE(**standins["codec"]["init_args"]), TextEncoder(**standins["text"]["init_args"])
    absent = {
        name: {**part, "init_args": {**part["init_args"], "source": "nobody/nothing"}}
        for name, part in standins.items()
    }
    made = TextToImagePipeline(
        network(sample_size=4), **codec.components(), **text.components(), **absent, sampling={"steps": 2}
    )
    made.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.codec.model is loaded.vae and loaded.text.model is loaded.text_encoder
    assert loaded.text.tokenizer.pad_token == loaded.text.tokenizer.eos_token
    assert torch.equal(image_of(loaded), image_of(made))
    loaded.to(torch.bfloat16)
    assert image_of(loaded).isfinite().all() and loaded.codec.dtype == torch.bfloat16


def test_a_hub_id_is_fetched_and_loaded(
    pipeline: TextToImagePipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {}

    def snapshot_download(repo_id: str, **options) -> str:
        asked.update(repo_id=repo_id, **options)
        return str(shutil.copytree(folder, tmp_path / "cache"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = TextToImagePipeline.from_pretrained("someone/shapes", revision="main")
    assert asked["repo_id"] == "someone/shapes" and asked["revision"] == "main"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])
    assert torch.equal(image_of(loaded), image_of(pipeline))


def test_folders_that_are_no_pipeline_are_refused_in_a_sentence(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for source, match in (
        ("nobody/nothing", "nobody/nothing.*HF_HUB_OFFLINE"),
        (tmp_path / "absent", "/absent"),
        (tmp_path / "empty", "model_index.json"),
    ):
        with pytest.raises(MissingModelError, match=match) as error:
            TextToImagePipeline.from_pretrained(source)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_export_whose_weights_are_not_finite_is_refused(folder: Path, tmp_path: Path, value: float):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.1.attn.to_q.weight"][3, 4] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"copy.*transformer\.blocks\.1\.attn\.to_q\.weight") as error:
        TextToImagePipeline.from_pretrained(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part, name", [("transformer", "patch_embed.bias"), ("vae", "analysis")])
def test_an_export_that_lacks_weights_is_refused(folder: Path, tmp_path: Path, part: str, name: str):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(MissingModelError, match=rf"copy.*\b1 weights.*{part}\.{name}"):
        TextToImagePipeline.from_pretrained(copy)
    given = {part: pipeline_with().components[part]}
    assert TextToImagePipeline.from_pretrained(copy, **given).components[part] is given[part]


# -------------------------------------------------------------------------------- what a folder may name


def component(class_path: str) -> dict:
    return {"class_path": class_path, "init_args": {}}


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("codec", component("os.system"), r"os\.system.*emmdit"),
        ("text", component("emmditious.Text"), r"emmditious\.Text"),
        ("codec", component("emmdit.lazy.import_module"), "import_module.*ImageCodec"),  # a function that imports
        ("codec", component("emmdit.shapes.ShapesText"), "ShapesText.*ImageCodec"),
        ("text", component("emmdit.encoders.standin"), "standin.*TextConditioner"),
        ("path", component("emmdit.encoders.DCTCodec"), r"DCTCodec.*\bPath\b"),
        ("path", component("emmdit.flow.Absent"), r"emmdit\.flow\.Absent"),
        ("path", component("emmdit.absent.Path"), r"emmdit\.absent"),
        ("transformer", ["emmdit.networks.future", "FutureModel"], r"emmdit\.networks\.future"),
    ],
)
def test_only_classes_of_this_package_and_of_the_right_kind(folder: Path, tmp_path: Path, part: str, value, match: str):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {part: value}))
    with pytest.raises(ValueError, match=match):
        TextToImagePipeline.from_pretrained(copy)


# -------------------------------------------------------------------------------- images


def test_an_image_by_hand(pipeline: TextToImagePipeline):
    """What a call does, step by step, from the parts."""
    codec, text, denoiser = DCTCodec(), ShapesText(with_mask=True), pipeline.transformer
    predict = classifier_free_guidance(
        lambda x, t, condition: denoiser(x, timestep=t, **condition).sample,
        text([RED, TWO]),
        text.null(2),
        scale=2.0,
        interval=(100.0, 900.0),
    )
    noise = torch.cat([initial_noise([seed], (32, 8, 8)) for seed in (7, 9)])
    expected = codec.decode(sample(predict, noise, RectifiedFlow(), schedule(3)))
    found = image_of(pipeline, [RED, TWO], seed=[7, 9])
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-6)


def test_a_seed_is_an_image_whatever_the_batch(pipeline: TextToImagePipeline):
    together = image_of(pipeline, [RED, TWO, RED], seed=[1, 2, 3])
    for i, (prompt, seed) in enumerate([(RED, 1), (TWO, 2), (RED, 3)]):
        torch.testing.assert_close(image_of(pipeline, prompt, seed=seed)[0], together[i], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 0.1  # another seed, another image
    # a single seed counts on, and each prompt gets its images in turn
    counted = image_of(pipeline, [RED, TWO], seed=4, num_images_per_prompt=2)
    assert torch.equal(counted, image_of(pipeline, [RED, RED, TWO, TWO], seed=[4, 5, 6, 7]))
    assert torch.equal(initial_noise([3, 8], (2, 4, 4))[1], initial_noise([8], (2, 4, 4))[0])


def test_output_types(pipeline: TextToImagePipeline):
    tensor, array, pil = (pipeline(RED, output_type=kind).images for kind in ("pt", "np", "pil"))
    assert tensor.shape == (1, 3, 32, 32) and tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))


def test_sizes_and_callback(pipeline: TextToImagePipeline):
    seen: list[tuple[int, int]] = []
    images = image_of(pipeline, height=16, width=48, callback=lambda i, n: seen.append((i, n)))
    assert images.shape == (1, 3, 16, 48) and seen == [(1, 3), (2, 3), (3, 3)]
    for call, match in (
        (dict(height=30), r"30 x 32.*\b4\b"),
        (dict(height=20), r"5 x 8.*\b4\b"),
        (dict(seed=[1, 2, 3]), r"\b1\b.*\b3\b"),
    ):
        with pytest.raises(ValueError, match=match):
            pipeline(RED, **call)


def test_latents_and_trajectory_lead_to_the_image(pipeline: TextToImagePipeline):
    given = (pipeline.transformer, pipeline.codec, pipeline.text, [RED, TWO], [7, 9], RectifiedFlow())
    sampling = Sampling(schedule=[1000, 700, 300], guidance=2.0)
    with torch.no_grad():
        states = list(generate_trajectory(*given, sampling))
    assert [t for _, t, _, _ in states] == [1000.0, 700.0, 300.0, 0.0]
    assert torch.equal(states[0][2], initial_noise([7, 9], (32, 8, 8)))
    latents = generate_latents(*given, sampling)
    assert torch.equal(states[-1][2], latents) and not latents.requires_grad
    assert torch.equal(generate(*given, sampling), pipeline.codec.decode(latents))
    *_, (_, _, x, _) = generate_trajectory(*given, sampling)
    assert x.requires_grad  # where gradients are on


def test_a_listed_schedule_brings_its_steps(tmp_path: Path):
    """And is stored with the weights that need it."""
    listed = Sampling(schedule=[1000, 700, 300])
    assert listed.steps == 3 and listed.replace(schedule=[1000, 10]).steps == 2
    assert listed.replace(schedule="uniform").steps == 3 and Sampling().steps == 20
    with pytest.raises(ValueError, match=r"\b3\b.*\b8\b"):
        listed.replace(steps=8)
    made = pipeline_with(steps=None, schedule=[1000, 700, 300])
    made.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.sampling == listed and torch.equal(image_of(loaded), image_of(made))


def test_generate_in_half_precision_decodes_in_the_codecs_own():
    settings = dict(path=RectifiedFlow(), sampling=Sampling(steps=2, guidance=3.0))
    images = generate(network().to(torch.bfloat16), DCTCodec(), ShapesText(), [RED], [0], **settings)
    expected = generate(network(), DCTCodec(), ShapesText(), [RED], [0], **settings)
    assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
    assert (images - expected).abs().mean() < 0.1


# -------------------------------------------------------------------------------- files


def test_a_png_carries_its_settings(tmp_path: Path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    settings = {"prompt": 'a "red" circle ○', "seed": 3, "guidance_interval": [0.0, 1000.0], "checkpoint": None}
    path = save_png(image, tmp_path / "new" / "folder" / "a.png", settings)
    assert read_settings(path) == settings
    with Image.open(path) as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    assert read_settings(save_png(image, tmp_path / "plain.png")) == {}
    assert read_settings(save_png(image, tmp_path / "path.png", {"out": Path("x")})) == {"out": "x"}


def test_pixels_and_grid():
    images = torch.stack([torch.full((3, 2, 3), value) for value in (-1.0, 0.0, 1.0, 2.0, -3.0)])
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 128, 255, 255, 0]
    canvas = np.asarray(grid(images, columns=3, scale=2, gap=1))
    assert canvas.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
    assert canvas[0].min() == 255 and canvas[:, 0].min() == 255  # the gap is white
    assert (canvas[1:5, 1:7] == 0).all() and (canvas[1:5, 8:14] == 128).all() and (canvas[6:10, 8:14] == 0).all()
    pil = [Image.fromarray(array) for array in to_uint8(images)]
    np.testing.assert_array_equal(np.asarray(grid(pil, columns=3, scale=2, gap=1)), canvas)
