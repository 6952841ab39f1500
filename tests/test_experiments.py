"""Every YAML under experiments/ is parsed, instantiated and (tiny, on stand-ins) trained; wrong ones end in one sentence."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image

from emmdit.networks import EMMDiTTransformer2DModel
from lightning_modules import TextToImage
from lightning_modules.cli import SuiteCLI, default_run_dir, main
from lightning_modules.config_errors import sentence

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SHAPES = "shapes/emmdit.yaml"
STAGES = ("emmdit/512_stage1.yaml", "emmdit/512_stage2.yaml", "emmdit/1024.yaml")
ALL = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.rglob("*.yaml"))
ABLATIONS = [name for name in ALL if name.startswith("shapes/") and name != SHAPES]
ON_CPU = ["--trainer.accelerator=cpu"]


class Parsed(SuiteCLI):
    """The command line without the training behind it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def cli(*args: str, command: str | None = None) -> SuiteCLI:
    """`emmdit fit ARGS`, parsed and instantiated; without a command as notebooks do it."""
    if command is None:
        return SuiteCLI(args=list(args), run=False, exit_on_error=False)
    return Parsed(args=[command, *args], exit_on_error=False)


def files(*names: str | Path) -> list[str]:
    return [part for name in names for part in ("-c", str(EXPERIMENTS / name))]


def stack(name: str) -> list[str]:
    """The files a diff is meant to be laid over, and itself."""
    text = yaml.safe_load((EXPERIMENTS / name).read_text())
    if "class_path" in text.get("model", {}):
        return files(name)
    base = "emmdit/512_stage2.yaml" if name.startswith("emmdit/") else SHAPES
    return files(base, name)


@functools.cache
def instantiated(name: str) -> SuiteCLI:
    """Shared between tests, which only look at it."""
    return cli(*stack(name), *ON_CPU)


def model_args(run: SuiteCLI):
    return (run.config[run.subcommand] if run.subcommand else run.config).model.init_args


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs land in the test's folder, stand-ins are made once per session, and no example is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["emmdit"])  # Lightning warns of arguments beside its own
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str, name: str = "change.yaml") -> list[str]:
        (tmp_path / name).write_text(text)
        return ["-c", str(tmp_path / name)]

    return write


# -- every file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_is_parsed_instantiated_and_reread(name: str) -> None:
    run = instantiated(name)
    assert isinstance(run.model, TextToImage) and run.model.denoiser is None  # checked, nothing built
    text = run.parser.dump(run.config, skip_none=False)
    assert "${" not in text
    again = run.parser.parse_string(text)
    assert run.parser.dump(again, skip_none=False) == text


@pytest.mark.parametrize("name", ALL)
def test_says_what_it_is_for_and_how_it_is_run(name: str) -> None:
    text = (EXPERIMENTS / name).read_text()
    assert text.startswith("# "), "a comment in the first line says what the file shows"
    assert max(map(len, text.splitlines())) <= 130
    if name in ABLATIONS:
        assert len(text.splitlines()) <= 12
    listed = (EXPERIMENTS / "README.md").read_text()
    assert f"`{name.removesuffix('.yaml')}`" in listed, f"experiments/README.md does not list {name}"


@pytest.mark.parametrize("name", STAGES)
def test_the_published_stages_are_the_released_network_and_schedule(name: str) -> None:
    run = instantiated(name)
    with torch.device("meta"):
        network = run.model.denoiser_factory()
    projector = sum(p.numel() for p in network.repa_projector.parameters()) if "stage1" in name else 0
    assert sum(p.numel() for p in network.parameters()) - projector == 302_449_952
    with torch.device("meta"):
        released = EMMDiTTransformer2DModel()  # its own defaults
    different = {key for key, value in network.config.items() if listed(value) != listed(released.config.get(key))}
    expected = {"sample_size", "subregion_pattern"} if "1024" in name else set()
    assert different - {"repa_feature_dim", "repa_depth", "_use_default_values"} == expected

    settings, trainer, data = model_args(run), run.trainer, run.datamodule
    optimizer = settings.optimizer.init_args
    assert settings.optimizer.class_path == "torch.optim.AdamW"
    assert (optimizer.eps, optimizer.weight_decay, tuple(optimizer.betas)) == (1e-10, 0.03, (0.9, 0.999))
    assert data.batch_size * trainer.accumulate_grad_batches * 8 == 2048
    assert data.resolution == network.config.sample_size * run.model.codec.downsample
    assert data.licence and data.card
    stage = {
        STAGES[0]: (3e-4, 0.5, 100_000, False, 1),
        STAGES[1]: (1e-4, 1.0, 50_000, True, 0),
        STAGES[2]: (1e-4, 1.0, 20_000, True, 0),
    }[name]
    found = (optimizer.lr, trainer.gradient_clip_val, trainer.max_steps, run.model.ema, len(run.model.components))
    assert found == stage
    assert run.model.compile_blocks and not run.model.text.with_mask and run.model.text.max_length == 128
    assert settings.init_from == {STAGES[1]: "runs/emmdit/512_stage1", STAGES[2]: "runs/emmdit/512_stage2"}.get(name)


def listed(value: object) -> object:
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", [SHAPES, *ABLATIONS])
def test_shapes_networks_run_forward(name: str) -> None:
    run = instantiated(name)
    network = run.model.build_denoiser()
    condition = run.model.condition(["a photo of a red circle", "a photo of two squares"])
    latents = torch.randn(2, run.model.codec.latent_channels, 8, 8)
    with torch.no_grad():
        output = network(latents, timestep=torch.tensor([10.0, 900.0]), **condition).sample
    assert output.shape == latents.shape and output.isfinite().all()


def test_each_ablation_changes_what_its_name_says() -> None:
    plain = flat(model_args(instantiated(SHAPES)).as_dict())
    for name in ABLATIONS:
        changed = flat(model_args(instantiated(name)).as_dict())
        keys = {key for key in plain.keys() | changed.keys() if plain.get(key, "-") != changed.get(key, "-")}
        word = {
            "one_path": "compression_ratios",
            "no_compression": "compression_ratios",
            "no_reinforcement": "position_reinforcement",
            "no_subregions": "subregion_pattern",
            "adaln_single": "modulation",
            "adaln_zero": "modulation",
            "adamw": "optimizer",
            "faithful_init": "init_args.init",
            "masked_text": "with_mask",
            "epsilon": ("path", "timesteps", "sampling"),
            "short": "scheduler",
        }.get(Path(name).stem)
        if word is None:  # written by a later piece of work
            continue
        words = (word,) if isinstance(word, str) else word
        assert keys, name
        assert all(any(word in key for word in words) for key in keys), (name, keys)
        assert all(any(word in key for key in keys) for word in words), (name, keys)


def flat(tree, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: str(tree)}
    return {key: value for k, v in tree.items() for key, value in flat(v, f"{prefix}.{k}").items()}


def test_run_folders_are_named_after_the_experiment() -> None:
    assert default_run_dir(["experiments/shapes/emmdit.yaml", "experiments/trainer/gpu.yaml"]) == "runs/shapes/emmdit"
    short = [f"experiments/shapes/{name}.yaml" for name in ("emmdit", "short", "one_path")]
    assert default_run_dir(short) == "runs/shapes/one_path"


def test_an_optimizer_named_in_yaml_keeps_its_own_defaults() -> None:
    """A default optimizer of the module would leave its betas and weight decay in every other (jsonargparse)."""
    from emmdit.optim import MuonAdamW

    optimizer = instantiated(SHAPES).model.optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    defaults = MuonAdamW([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    given = yaml.safe_load((EXPERIMENTS / SHAPES).read_text())["model"]["init_args"]["optimizer"]["init_args"]
    assert optimizer.defaults == {**defaults, **given}


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("trainer/")])
def test_trainer_files_hold_a_trainer_section_alone(name: str) -> None:
    assert set(yaml.safe_load((EXPERIMENTS / name).read_text())) == {"trainer"}
    run = cli(*files(SHAPES, name), *ON_CPU, "--trainer.devices=2")
    expected = {"ddp": "DDPStrategy", "fsdp": "FSDP2Strategy"}.get(name.split("/")[1].split("_")[0])
    if expected:
        assert type(run.trainer.strategy).__name__ == expected and run.trainer.world_size == 2


# -- interpolation: facts of jsonargparse's mode "omegaconf+" that the files rely on -----------------------------

TOTAL = "model: {init_args: {scheduler: {init_args: {total: '${trainer.max_steps}'}}}}"


@pytest.mark.parametrize("command", [None, "fit"])
def test_interpolation(command: str | None, yaml_file, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = yaml_file(TOTAL, "reference.yaml")
    whole = yaml.safe_load((EXPERIMENTS / SHAPES).read_text())
    whole["model"]["init_args"]["scheduler"]["init_args"]["total"] = "${trainer.max_steps}"
    one_file = yaml_file(yaml.safe_dump(whole), "whole.yaml")

    def total(*args: str) -> int:
        return model_args(cli(*args, *ON_CPU, command=command)).scheduler.init_args.total

    assert total(*one_file) == 12000  # inside one file
    assert total(*one_file, "--trainer.max_steps=77") == 77  # an override reaches those who refer to it
    assert total(*files(SHAPES), *reference) == 12000  # from another file
    assert total(*files(SHAPES), *reference, *yaml_file("trainer: {max_steps: 55}")) == 55  # a later file wins
    monkeypatch.setenv("STEPS", "33")
    assert total(*files(SHAPES), *yaml_file(TOTAL.replace("trainer.max_steps", "oc.decode:${oc.env:STEPS}"))) == 33
    with pytest.raises(Exception, match="Interpolation key"):
        total(*files(SHAPES), *yaml_file(TOTAL.replace("max_steps", "max_step")))
    if command:  # with run=False a reference on the command line happens to work
        with pytest.raises(Exception, match="Interpolation key"):
            total(*files(SHAPES), "--model.init_args.scheduler.init_args.total=${trainer.max_steps}")


# -- contradictions end in one sentence, before anything is allocated ---------------------------------------------

NETWORK = "--model.init_args.denoiser.init_args."
STAGE1 = files(STAGES[0])
TINY_TEXT = "--model.init_args.text.init_args.max_length="
CONTRADICTIONS = {
    "grid": (files(SHAPES), [f"{NETWORK}sample_size=6"], "sample_size 6 gives a grid of side 6, not divisible by 4"),
    "depth": (STAGE1, [f"{NETWORK}repa_depth=30"], "repa_depth 30 lies beyond the network of 24 blocks"),
    "tap": (STAGE1, [f"{NETWORK}repa_depth=8"], r"repa_depth 8 lies among the compressed tokens \(blocks 5 to 20\)"),
    "latents": (
        files(SHAPES),
        [f"{NETWORK}in_channels=16"],
        "takes 16 latent channels, but DCTCodec gives 32: set in_channels",
    ),
    "prediction": (files(SHAPES), [f"{NETWORK}out_channels=16"], "predicts 16 channels of the 32 that DCTCodec has"),
    "text width": (STAGE1, [f"{NETWORK}caption_channels=768"], "width 768, but TextEncoder gives 2048: make them equal"),
    "text length": (STAGE1, [f"{TINY_TEXT}100"], "100 text tokens can not be cut into the strided|100 text tokens"),
    "groups": (files(SHAPES), [f"{NETWORK}subregion_groups=8"], "20 compressed image tokens can not be cut"),
    "loss without projector": (
        files(SHAPES),
        ["--model.init_args.components=[{class_path: emmdit.losses.REPA}]"],
        "REPA needs a network with a projector: set the denoiser's repa_feature_dim",
    ),
    "projector without loss": (STAGE1, ["--model.init_args.components=[]"], "has a REPA projector that no loss trains"),
    "vision width": (STAGE1, [f"{NETWORK}repa_feature_dim=384"], "repa_feature_dim 384, but DINOv2 gives features of w"),
    "no last blocks": (files(SHAPES), [f"{NETWORK}block_groups=[2,2,0]"], "end in compressed tokens"),
    "precision": (files(SHAPES), ["--trainer.precision=bf16-true"], "use bf16-mixed"),
    "dropout": (files(SHAPES), ["--model.init_args.caption_dropout=1.5"], "caption_dropout is a probability below 1"),
    "batch": (files(SHAPES), ["--data.init_args.batch_size=0"], "batch_size must be at least 1, got 0"),
    "no column": (STAGE1, ["--data.init_args.image_column=null"], "needs image_column, latents_column or both"),
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
    base, change, message = CONTRADICTIONS[case]
    with pytest.raises(Exception, match=message) as caught:
        cli(*base, *ON_CPU, *change)
    assert "\n" not in sentence(caught.value) and sentence(caught.value).endswith(".")
    assert devices <= {"meta"}


def test_the_check_sees_every_network_of_the_contract(devices: set[str]) -> None:
    """The recorder above does see a network that is built for real."""
    cli(*files(SHAPES), *ON_CPU)
    assert devices == {"meta"}
    EMMDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, block_groups=[1, 1, 1])
    assert devices == {"meta", "cpu"}


WRONG = {
    "model: {init_args: {denoiser: {init_args: {dimm: 3}}}}": "model.denoiser: there is no option 'dimm'.",
    "model: {init_args: {lerning: 3}}": "model: there is no option 'lerning'.",
    "modle: {init_args: {ema: false}}": "there is no option 'modle.init_args.ema'.",
    "trainer: {max_step: 3}": "there is no option 'trainer.max_step'.",
    "trainer: {max_steps: many}": "trainer.max_steps: Expected int, got many.",
    "samples: {prompt: 3}": "there is no option 'samples.prompt'.",
    "model: {init_args: {denoiser: {init_args: {modulation: gauss}}}}": (
        "model.denoiser.modulation: Expected one of 'affine', 'single', 'zero', got gauss."
    ),
    "model: {init_args: {sampling: {steps: a}}}": "model.sampling.steps: Expected int, got a.",
    "model: {init_args: {codec: {class_path: emmdit.encoders.ShapesText}}}": (
        "model.codec: emmdit.encoders.ShapesText is not a subclass of ImageCodec."
    ),
    "model: {init_args: {denoiser: {class_path: torch.nn.Linear}}}": (
        "model.denoiser: Expected 'torch.nn.Linear' to be a subclass of ModelMixin."
    ),
    "model: {init_args: {optimizer: {class_path: emmdit.optim.Muon}}}": (
        "model.optimizer: module 'emmdit.optim' has no attribute 'Muon'."
    ),
    "data: {class_path: datamodules.HubDataModule, init_args: {resolution: 64}}": (
        "data: the following arguments are required: source."
    ),
    "trainer: {strategy: {class_path: lightning_modules.strategies.FSDP3}}": (
        "trainer.strategy: module 'lightning_modules.strategies' has no attribute 'FSDP3'."
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_yaml_ends_in_one_sentence(text: str, yaml_file, capsys: pytest.CaptureFixture, devices: set) -> None:
    assert fails(capsys, *files(SHAPES), *yaml_file(text)) == WRONG[text]
    assert not devices


def test_other_slips_of_the_command_line(yaml_file, capsys: pytest.CaptureFixture, devices: set[str]) -> None:
    assert fails(capsys, *files(SHAPES), "--trainer.max_step=3").startswith("unrecognized arguments: --trainer.max_st")
    assert "File does not exist" in fails(capsys, "-c", "nothing.yaml")
    first = "give the experiment first, then what is laid over it"
    assert first in fails(capsys, *files("shapes/one_path.yaml"))
    assert first in fails(capsys, *files("trainer/cpu.yaml"))
    assert "Problems parsing config" in fails(capsys, *yaml_file("trainer: [1, 2"))
    if not torch.cuda.is_available():
        assert "gpu" in fails(capsys, *files(SHAPES, "trainer/gpu.yaml"))
    contradiction = fails(capsys, *files(SHAPES), *ON_CPU, f"{NETWORK}in_channels=16")
    assert contradiction.startswith("The denoiser takes 16 latent channels")


def fails(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The one sentence of `emmdit fit ARGS`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert lines[-1] == "(EMMDIT_TRACEBACK=1 shows where.)" and len(lines) == 2, lines
    assert lines[0].startswith("emmdit fit: ")
    return lines[0].removeprefix("emmdit fit: ")


# -- the published stages, tiny, in a chain ------------------------------------------------------------------------

TINY = """
model:
  init_args:
    denoiser:
      init_args: {num_attention_heads: 2, attention_head_dim: 16, block_groups: [1, 1, 1], caption_channels: 64}
    codec: {init_args: {source: "standin:dc_ae?downsample=8", downsample: 8}}
    text: {init_args: {source: "standin:llama?caption_channels=64", caption_channels: 64, max_length: 32}}
    sampling: {steps: 2}
    compile: false
data:
  init_args: {source: rows.parquet, data_files: null, resolution: 128, batch_size: 2, num_workers: 0, validation_samples: 2}
trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 2, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 2}
samples: {every_n_steps: 0, prompts: [a photo of a red circle, a photo of a cat]}
"""
REPA = """
model:
  init_args:
    denoiser: {init_args: {repa_feature_dim: 32, repa_projector_dim: 16, repa_depth: 1}}
    components:
      - class_path: emmdit.losses.REPA
        init_args:
          vision: {class_path: emmdit.encoders.DINOv2, init_args: {source: "standin:dinov2?feature_dim=32", feature_dim: 32}}
"""
LARGE = """
model: {init_args: {denoiser: {init_args: {sample_size: 32}}}}
data: {init_args: {resolution: 256}}
trainer: {val_check_interval: 8}
"""


def test_the_published_stages_train_and_hand_over(tmp_path: Path, yaml_file) -> None:
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 128, 150, 3), generator=noise, dtype=torch.uint8).numpy()
    columns = {"image": [Image.fromarray(p) for p in pixels], "caption": [f"a photo of a dog {i}" for i in range(20)]}
    datasets.Dataset.from_dict(columns).to_parquet("rows.parquet")

    weights = {}
    for name, extra in zip(STAGES, (REPA, "", LARGE), strict=True):
        changes = [*yaml_file(TINY, "tiny.yaml"), *yaml_file(extra or "{}", "extra.yaml")]
        folder = Path("runs", name).with_suffix("")
        main(["fit", *files(name), *changes, f"--trainer.default_root_dir={folder}"])
        saved = torch.load((folder / "checkpoints/last.ckpt").resolve(), weights_only=True)
        assert saved["global_step"] == 2
        assert saved["samples_seen"] == 2 * 2 * (4 if "1024" in name else 1)
        assert any(key.startswith("ema_denoiser.") for key in saved["state_dict"]) == ("stage1" not in name)
        assert (folder / "samples/step_0000002.png").is_file()
        weights[name] = saved["state_dict"]

    first, second, last = weights.values()
    key = next(k for k, value in first.items() if k.startswith("denoiser.blocks.1.") and value.ndim == 2)
    for before, after in ((first[key], second[key]), (second[f"ema_{key}"], last[key])):
        moved = (after - before).abs().max()
        assert 0 < moved < 1e-3  # two small steps away from what it was given, not from a fresh start
