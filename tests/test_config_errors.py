"""Wrong and contradictory configs end in one sentence, before a weight is allocated or a model loaded."""

from __future__ import annotations

import pytest
import torch

from emmdit.networks import EMMDiTTransformer2DModel
from lightning_modules import TextToImage
from lightning_modules.commands.config_errors import LONGEST, sentence
from lightning_modules.commands.main import main
from tests.command_line import ON_CPU, SHAPES, STAGES, change, cli, files
from tests.command_line import elsewhere as elsewhere

NETWORK = "--model.init_args.denoiser.init_args."
STAGE1 = files(STAGES[0])
TEXT = "--model.init_args.text.init_args."
REPA = "--model.init_args.components=[{{class_path: emmdit.losses.REPA, init_args: {{{}}}}}]"
CONTRADICTIONS = {
    "grid": (files(SHAPES), f"{NETWORK}sample_size=6", ("sample_size 6", "(2, 4)")),
    "depth": (STAGE1, REPA.format("block: blocks.30"), ("REPA", "blocks.30", "EMMDiTTransformer2DModel")),
    "tap": (STAGE1, REPA.format("block: blocks.7"), ("blocks.7", "blocks.4", "blocks.19")),
    "latents": (files(SHAPES), f"{NETWORK}in_channels=16", ("16", "DCTCodec", "32", "in_channels")),
    "text width": (STAGE1, f"{NETWORK}caption_channels=768", ("768", "TextEncoder", "2048")),
    "text length": (STAGE1, f"{TEXT}max_length=100", ("100", "chunked", "block 2")),
    "groups": (files(SHAPES), f"{NETWORK}subregion_groups=8", ("12", "strided", "block 1")),
    "vision width": (
        STAGE1,
        REPA.format("block: blocks.3, feature_dim: 384, vision: {class_path: emmdit.encoders.DINOv2}"),
        ("feature_dim", "384", "DINOv2", "768"),
    ),
    "no last blocks": (files(SHAPES), f"{NETWORK}block_groups=[2,2,0]", ("block_groups", "(2, 2, 0)")),
    "precision": (files(SHAPES), "--trainer.precision=bf16-true", ("bf16-true", "bf16-mixed")),
    "dropout": (files(SHAPES), "--model.init_args.caption_dropout=1.5", ("caption_dropout", "1.5")),
    "batch": (files(SHAPES), "--data.init_args.batch_size=0", ("batch_size", "1", "0")),
    "no column": (STAGE1, "--data.init_args.image_column=null", ("image_column", "latents_column")),
}


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Where parameters of networks were made; building for training is an error."""
    made: set[str] = set()
    reset = EMMDiTTransformer2DModel.reset_parameters

    def record(network: EMMDiTTransformer2DModel) -> None:
        made.update(p.device.type for p in network.parameters())
        reset(network)

    def refuse(*args: object) -> None:
        raise AssertionError("the network was built, or a model loaded")

    monkeypatch.setattr(EMMDiTTransformer2DModel, "reset_parameters", record)
    monkeypatch.setattr(TextToImage, "build_denoiser", refuse)
    monkeypatch.setattr("emmdit.encoders.base.load_model", refuse)
    return made


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(case: str, devices: set[str]) -> None:
    base, override, words = CONTRADICTIONS[case]
    with pytest.raises(Exception) as caught:
        cli(*base, *ON_CPU, override)
    assert all(word in sentence(caught.value) for word in words)  # not in the namespace that jsonargparse dumps
    assert "\n" not in sentence(caught.value) and sentence(caught.value).endswith(".")
    assert devices <= {"meta"}


def test_the_recorder_sees_a_network_that_is_built(devices: set[str]) -> None:
    cli(*files(SHAPES), *ON_CPU)
    assert devices == {"meta"}
    EMMDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, block_groups=[1, 1, 1])
    assert devices == {"meta", "cpu"}


MODEL = "model: {{init_args: {{{}}}}}"
WRONG = {
    MODEL.format("denoiser: {init_args: {dimm: 3}}"): "model.denoiser dimm",
    "modle: {init_args: {ema: false}}": "modle.init_args.ema",
    "trainer: {max_step: 3}": "'trainer.max_step'",
    "trainer: {max_steps: many}": "trainer.max_steps int many",
    MODEL.format("denoiser: {init_args: {modulation: gauss}}"): "model.denoiser.modulation affine single zero gauss",
    MODEL.format("sampling: {steps: a}"): "model.sampling.steps int a.",
    MODEL.format("codec: {class_path: emmdit.shapes.ShapesText}"): "model.codec emmdit.shapes.ShapesText ImageCodec",
    MODEL.format("denoiser: {class_path: torch.nn.Linear}"): "model.denoiser torch.nn.Linear ModelMixin",
    MODEL.format("optimizer: {class_path: emmdit.optim.Muon}"): "model.optimizer 'emmdit.optim' 'Muon'",
    "data: {class_path: datamodules.HubDataModule, init_args: {resolution: 64}}": "data source",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_yaml_ends_in_one_sentence(text: str, capsys: pytest.CaptureFixture, devices: set[str]) -> None:
    error = fails(capsys, *files(SHAPES), *change(text))
    assert "change.yaml, line 1: " in error
    assert all(word in error for word in WRONG[text].split()) and error.endswith(".")
    assert not devices


@pytest.mark.parametrize("text", ["first\n" + "x" * 10**5 + "\nthe way out.", "first\nthe way out."])
def test_any_message_is_one_bounded_line_with_its_way_out(text: str) -> None:
    told = sentence(ValueError(text))
    assert told.startswith("first ") and told.endswith(" the way out.")
    assert len(told.splitlines()) == 1 and len(told) <= LONGEST


def test_other_slips_of_the_command_line(capsys: pytest.CaptureFixture, devices: set[str]) -> None:
    assert "--trainer.max_step=3" in fails(capsys, *files(SHAPES), "--trainer.max_step=3")
    assert "nothing.yaml" in fails(capsys, "-c", "nothing.yaml")
    first = "-c experiments/shapes/emmdit.yaml -c "
    assert first in fails(capsys, *change("model: {init_args: {ema: false}}"))  # a diff that names no base
    assert first in fails(capsys, *files("trainer/cpu.yaml"))
    assert "trainer.max_steps" in fails(capsys, *files(SHAPES), "--trainer.max_steps=many").partition(" ")[0]  # no file
    assert "line 1, column 10" in fails(capsys, *change("trainer: [1, 2"))
    if not torch.cuda.is_available():
        assert "experiments/trainer/cpu.yaml" in fails(capsys, *files(SHAPES, "trainer/gpu.yaml"))


@pytest.mark.parametrize(
    "option, words",
    [
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches 1 0"),
        ("--trainer.val_check_interval=0", "val_check_interval 0"),
        ("--trainer.limit_train_batches=0", "limit_train_batches 0"),
        ("--trainer.max_steps=0", "max_steps 0"),
        ("--trainer.log_every_n_steps=0", "log_every_n_steps 1 0"),
        ("--trainer.gradient_clip_val=-1", "gradient_clip_val 0 -1"),
        ("--trainer.devices=many", "devices"),
        ("--seed_everything=-1", "seed_everything -1"),
        ("--seed_everything=4294967296", "seed_everything 4294967296"),
        ("--throughput.window=0", "throughput.window"),
        ("--model.init_args.init_from=nowhere", "nowhere"),
        ("--model.init_args.optimizer.init_args.lr=-1", "optimizer.lr -1"),
        ("--model.init_args.optimizer.init_args.lr=.nan", "optimizer.lr nan"),
        ("--model.init_args.optimizer.init_args.momentum=2", "model.optimizer momentum 2"),
        ("--model.init_args.scheduler.init_args.total=0", "model.scheduler total 0"),
        ("--model.init_args.scheduler.init_args.warmup=-1", "model.scheduler warmup -1"),
        (f"{NETWORK}num_attention_heads=0", "num_attention_heads 1 0"),
        (f"{NETWORK}patch_size=0", "patch_size 1 0"),
        ("--data.init_args.num_workers=-1", "num_workers 0 -1"),
        ("--data.init_args.validation_samples=-1", "validation_samples 1 -1"),
        ("--data.init_args.validation_samples=0", "validation_samples 1 0"),
    ],
)
def test_values_that_lightning_would_not_name(
    option: str, words: str, capsys: pytest.CaptureFixture, devices: set[str]
) -> None:
    error = fails(capsys, *files(SHAPES), *ON_CPU, option)
    assert all(word in error for word in words.split())


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "# a change\ntrainer:\n  max_steps: ${trainer.min_steps}\n  min_steps: ${trainer.max_steps}\n",
            "line 3 max_steps",
        ),
        ("trainer:\n  max_steps: ${nope.x}\n", "line 2 trainer.max_steps ${nope.x}"),
        ("trainer:\n  max_steps: ${trainer\n", "line 2 trainer.max_steps ${trainer"),
        ("trainer:\n  max_steps: ${oc.env:NOPE_X}\n", "line 2 trainer.max_steps NOPE_X"),
        ("ema: []\n", "ema"),
        ("trainer: 3\n", "trainer 3"),
    ],
)
def test_references_and_sections_that_hold_nothing(
    text: str, words: str, capsys: pytest.CaptureFixture, devices: set[str]
) -> None:
    error = fails(capsys, *files(SHAPES), *change(text), *ON_CPU)
    assert all(word in error for word in ("change.yaml", *words.split()))


def test_help_begins_with_examples_and_the_suites_own_sections(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "emmdit fit -c experiments/quickstart.yaml" in "".join(text.splitlines(True)[:8])
    places = [text.index(f"\n{name}") for name in ("model", "data", "checkpoint", "ema", "samples", "trainer")]
    assert places == sorted(places) and "{" not in text[: places[0]]


def fails(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The one sentence of `emmdit fit ARGS`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert "EMMDIT_TRACEBACK=1" in lines[-1] and len(lines) == 2, lines
    assert lines[0].startswith("emmdit fit: ")
    return lines[0].removeprefix("emmdit fit: ")


def test_settings_that_an_optimizer_of_torch_refuses(capsys: pytest.CaptureFixture, devices: set[str]) -> None:
    adamw = "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1, betas: [2, 0.9]}}}}"
    error = fails(capsys, *files(SHAPES), *ON_CPU, *change(adamw))
    assert all(word in error for word in ("model.optimizer", "beta", "2"))
    assert "optimizer.lr" in fails(capsys, *files(SHAPES), *ON_CPU, *change(adamw.replace("lr: 1,", "lr: -1,")))
