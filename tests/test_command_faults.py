"""Commands that open models: bad options, damaged and hostile folders, weights that change or are not finite."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from emmdit.evaluation.image_set import ImageSet
from emmdit.evaluation.prompts import PromptFile
from emmdit.pipeline import TextToImagePipeline
from lightning_modules.commands import load_model, options
from lightning_modules.commands.load_model import open_model
from lightning_modules.commands.main import main
from lightning_modules.commands.model_card import plain_text
from lightning_modules.denoiser_module import DenoiserModule
from lightning_modules.runs import build_module
from tests.tiny_run import CONFIG, MODEL, ROOT, SMALL, configure, make_run, save, told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


# ----------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "option",
    [
        *("--height 0", "--height -32", "--width 1000000", "--columns 0", "--scale 0", "--steps 0", "--seed -1"),
        *("--seed 99999999999", "--num_images 0", "--batch_size 0", "--guidance nan", "--guidance inf"),
        *("--guidance .nan", "--device tpuu", "--device meta", "--device cuda:99", "--prompts /dev/null"),
        *("--prompts latin.txt", "--prompts empty.txt", "--out latin.txt", "--out latin.txt/below", "--out="),
        *("--out loop", "--out loop/below"),
    ],
)
def test_options_are_refused_before_a_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_model, "open_model", lambda *args, **kwargs: pytest.fail("opened"))
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("empty.txt").write_text("\n \n")
    Path("loop").symlink_to("loop")
    said = told(capsys, "sample", "--ckpt", MODEL, "--prompt", "x", "--device", "cpu", "--out", "out", *option.split())
    name, _, value = option.lstrip("-").replace("=", " ").partition(" ")
    assert name.split("_")[0] in said or value in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "latin.txt", "loop"]


@pytest.mark.parametrize(
    "option",
    [
        *("--height 0", "--seed -1", "--batch_size 0", "--device tpuu", "--steps 0", "--out="),
        *("--ledger l.json --experiment ../../x", "--ledger bad.json --experiment a/b", "--ledger . --experiment a/b"),
    ],
)
def test_evaluate_refuses_the_same_and_a_ledger_that_takes_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    config = ROOT / "experiments/evaluation/shapes.yaml"
    said = told(capsys, "evaluate", "--ckpt", MODEL, "-c", config, *option.split())
    assert any(word.strip("-=") in said for word in option.split())
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(height=0), dict(width=33), dict(height=40_000), dict(guidance_scale=float("nan"))),
        *(dict(num_inference_steps=0), dict(sampler="x"), dict(seed=-1), dict(seed="1"), dict(num_images_per_prompt=0)),
    ],
    ids=str,
)
def test_the_pipeline_refuses_them_too(shapes: TextToImagePipeline, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        shapes("a photo of a star", **{"num_inference_steps": 1, **settings})
    with pytest.raises(ValueError):
        shapes([])


@pytest.fixture(scope="module")
def shapes() -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(MODEL)


def test_too_little_memory_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="batch_size"), load_model.enough_memory(8):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="inner"), load_model.enough_memory(8):
        raise RuntimeError("inner dimensions")


# ----------------------------------------------------------------------------------- not finite


def test_an_image_that_is_not_finite_is_an_error_and_not_black(
    run: Path, capsys: pytest.CaptureFixture, shapes: TextToImagePipeline, tmp_path: Path
) -> None:
    network = build_module(CONFIG).build_denoiser()
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = torch.nan
    save(run / "checkpoints/last.ckpt", network, 4)
    for command in ("sample", "export"):
        extra = SMALL if command == "sample" else []
        told(capsys, command, "--ckpt", run, "--out", tmp_path / "out", *extra)
    overflow = ["--guidance", "1e38", "--steps", "3"]
    said = told(capsys, "sample", "--ckpt", MODEL, "--out", tmp_path / "out", *SMALL, *overflow, "--seed", 7)
    assert "'a photo of a star'" in said and "seed 7" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="seed 5"):
        shapes("a photo of a star", seed=5, num_inference_steps=3, guidance_scale=1e38)
    raw = shapes("a photo of a star", num_inference_steps=3, guidance_scale=1e38, output_type="pt").images
    assert raw.isnan().all()  # a decoder clamps what is infinite: it would be an image like any other


def test_an_evaluation_stops_at_an_image_that_is_not_finite(tmp_path: Path) -> None:
    images = image_set(tmp_path, "a\nb\n")
    images.open()

    def generate(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        made = torch.zeros(len(prompts), 3, 4, 4)
        made[[prompt == "b" for prompt in prompts]] = torch.nan
        return made

    with pytest.raises(ValueError, match="'b' with seed 1"):
        images.make(generate, 1)
    assert [sample.line["prompt"] for sample in images.missing()] == ["b"]


# ------------------------------------------------------------------------------------ image sets


def image_set(tmp_path: Path, prompts: str, **made_with: Any) -> ImageSet:
    (tmp_path / "prompts.txt").write_text(prompts)
    return ImageSet(tmp_path / "images", PromptFile(str(tmp_path / "prompts.txt")), 0, made_with)


def test_a_kill_at_any_moment_of_making_the_folders_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    calls = ("mkdir", "write_text")
    real = {name: getattr(Path, name) for name in calls}
    for kill in range(1, 12):
        left = [kill]

        def counted(name: str, left: list[int] = left) -> Any:
            def call(self: Path, *args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                if left[0] == 0 and name == "write_text":
                    real[name](self, args[0][: len(args[0]) // 2])
                    raise Killed
                return real[name](self, *args, **kwargs)

            return call

        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        images = image_set(tmp_path, "a\nb\nc\n")
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(Path, name, counted(name))
            with contextlib.suppress(Killed):
                images.open()
        images.open()
        metadata = [path.read_text() for path in sorted((tmp_path / "images").glob("*/metadata.jsonl"))]
        assert [json.loads(line)["prompt"] for line in metadata] == ["a", "b", "c"]
        assert len(images.missing()) == 3


def test_a_damaged_set_json_is_named_and_a_set_without_images_may_change(tmp_path: Path) -> None:
    images = image_set(tmp_path, "a\n", height=9)
    images.open()
    other = image_set(tmp_path, "a\n", height=8)
    other.open()
    other.make(lambda prompts, seeds: torch.zeros(len(prompts), 3, 4, 4), 1)
    with pytest.raises(ValueError, match="another height"):
        images.open()
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"[]"):
        (tmp_path / "images/set.json").write_bytes(content)
        with pytest.raises(ValueError, match=str(tmp_path / "images")) as error:
            other.open()
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ checkpoints


def test_step_and_hash_are_of_the_weights_that_were_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that goes on replaces the checkpoint while an evaluation opens it."""
    last, load = run / "checkpoints/last.ckpt", DenoiserModule.load_denoiser
    sha256 = hashlib.sha256(last.read_bytes()).hexdigest()
    before = torch.load(last, weights_only=True)["state_dict"]

    def save_another(self: DenoiserModule, *args: Any) -> Any:
        network = build_module(CONFIG).build_denoiser()
        with torch.no_grad():
            next(network.parameters()).add_(1)
        save(last.with_name("new.ckpt"), network, 99)
        os.replace(last.with_name("new.ckpt"), last)
        return load(self, *args)

    monkeypatch.setattr(DenoiserModule, "load_denoiser", save_another)
    model = open_model(run)
    assert (model.source["step"], model.source["sha256"]) == (3, sha256)
    assert all(before[f"denoiser.{key}"].equal(value) for key, value in model.network.state_dict().items())


def test_weights_of_a_folder_that_change_while_they_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    weights, load = folder / "transformer/diffusion_pytorch_model.safetensors", TextToImagePipeline.from_pretrained

    def replaced(source: Path) -> TextToImagePipeline:
        pipeline = load(source)
        shutil.copy(weights, tmp_path / "new")
        os.replace(tmp_path / "new", weights)
        return pipeline

    monkeypatch.setattr(TextToImagePipeline, "from_pretrained", replaced)
    with pytest.raises(ValueError, match="changed"):
        open_model(folder)


# ------------------------------------------------------------------------------------------ exports


def export(run: Path, out: Path, *more: str) -> None:
    main(["export", "--ckpt", str(run), "--out", str(out), *more])


def test_an_export_is_whole_or_not_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save_pretrained = TextToImagePipeline.save_pretrained

    def fail(self: TextToImagePipeline, folder: Path) -> None:
        save_pretrained(self, folder)
        raise SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "save_pretrained", fail)
        assert "No space left" in told(capsys, "export", "--ckpt", run, "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def end(self: TextToImagePipeline, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(TextToImagePipeline, "save_pretrained", end)
            with pytest.raises(SystemExit) as ended:
                export(run, out)
            assert ended.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    export(run, out)  # of a config without `data` and `trainer`
    assert TextToImagePipeline.from_pretrained(out).transformer.config.sample_size == 8
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for source, target in ((out, tmp_path / "again"), (run, out)):  # an export; a folder that is used
        told(capsys, "export", "--ckpt", source, "--out", target)
        assert not (tmp_path / "again").exists()


def test_an_export_publishes_names_as_text_and_no_file_from_elsewhere(tmp_path: Path, run: Path) -> None:
    named = run.rename(tmp_path / "<img src=x onerror=alert(1)> [a](javascript:x) `b`")
    (tmp_path / "secret").write_text("key")
    (named / "curve.csv").symlink_to(tmp_path / "secret")
    data = {"class_path": "datamodules.HubDataModule", "init_args": {"source": "a|b\n# <script>x</script>"}}
    configure(named, data=data)
    export(named, tmp_path / 'o"ut')
    card = (tmp_path / 'o"ut/README.md').read_text()
    assert "<img" not in card and "<script" not in card and not re.search(r"(?<!\\)\]\(javascript", card)
    assert r"a\|b" in card and not [line for line in card.splitlines()[1:] if line.startswith("#")]
    assert r'from_pretrained("o\"ut")' in card
    assert not (tmp_path / 'o"ut/curve.csv').exists()


def test_plain_text() -> None:
    assert plain_text("MuonAdamW(lr=0.003, weight_decay=0.1)") == "MuonAdamW(lr=0.003, weight_decay=0.1)"
    assert plain_text("a <b> & *c*\n|d| ![e](f)") == r"a &lt;b&gt; &amp; \*c\* \|d\| !\[e\](f)"


def test_a_folder_is_made_beside_its_place(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("new/below", "empty", "link"):
        with options.whole_folder(tmp_path / name) as folder:
            assert not (tmp_path / name / "a").exists()
            (folder / "a").touch()
        assert (tmp_path / name / "a").exists()
        shutil.rmtree((tmp_path / name).resolve())
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_a_full_disk_leaves_no_part_of_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"\x89PNG")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left" in told(capsys, "sample", "--ckpt", MODEL, "--out", tmp_path / "out", *SMALL)
    assert not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------- signals


def test_ctrl_c_is_one_line_and_leaves_whole_images(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_modules",
        "sample",
        "--ckpt",
        str(MODEL),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        [*command, *SMALL, "--num_images", "5000", "--batch_size", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "out/00000.png").exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said and said.rstrip().splitlines()[-1].startswith("emmdit sample: ")
    assert all(path.stat().st_size for path in (tmp_path / "out").iterdir())
