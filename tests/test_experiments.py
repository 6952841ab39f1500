"""Every YAML under experiments/ is parsed and instantiated, and the published stages are trained, tiny."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import datasets
import mlflow
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datamodules import LatentsDataModule, MixtureDataModule
from emmdit.data.buckets import Buckets
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.huggingface import HuggingFaceRows
from emmdit.encoders import DCAE
from emmdit.evaluation import ImageMetric, PromptSet
from emmdit.networks import EMMDiTTransformer2DModel
from emmdit.optim import MuonAdamW
from lightning_modules import TextToImage
from lightning_modules.commands.config_files import default_run_dir, named_bases
from lightning_modules.commands.evaluate import evaluation_parser
from lightning_modules.commands.fit import SuiteCLI
from lightning_modules.commands.main import main
from lightning_modules.commands.precompute import precompute_parser
from tests.command_line import EXPERIMENTS, ON_CPU, SHAPES, STAGES, change, cli, files, model_args
from tests.command_line import elsewhere as elsewhere

FILES = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.rglob("*.yaml"))
EVALUATIONS = [name for name in FILES if name.startswith("evaluation/")]
PRECOMPUTED = [name for name in FILES if name.startswith("precompute/")]
DATA = [name for name in FILES if name.startswith("data/")]
SWEEPS = [name for name in FILES if name.startswith("sweeps/")]  # tests/test_tables.py
ALL = [name for name in FILES if name not in (*EVALUATIONS, *PRECOMPUTED, *SWEEPS)]
OF_SHAPES = [name for name in ALL if name.startswith("shapes/")]
DIFFS = [name for name in ALL if named_bases(EXPERIMENTS / name)]


def laid(name: str) -> list[str]:
    """The file; data and trainers, which go with any experiment, over one."""
    if name.startswith("data/"):
        return files(STAGES["stage1" not in name], name)
    return files(SHAPES, name) if name.startswith("trainer/") else files(name)


@functools.cache
def instantiated(name: str) -> SuiteCLI:
    """Shared between tests, which only look at it."""
    return cli(*laid(name), *ON_CPU, "--trainer.default_root_dir=run")


# -- every file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_is_parsed_instantiated_and_reread(name: str) -> None:
    run = instantiated(name)
    assert isinstance(run.model, TextToImage) and run.model.denoiser is None  # checked, nothing built
    text = run.parser.dump(run.config, skip_none=False)
    assert "${" not in text
    again = run.parser.parse_string(text)
    assert run.parser.dump(again, skip_none=False) == text


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_is_parsed_and_built(name: str) -> None:
    parser = evaluation_parser()
    built = parser.instantiate(parser.parse_args(["-c", str(EXPERIMENTS / name), "--ckpt", "unused"]))
    assert isinstance(built.prompts, PromptSet) and all(isinstance(metric, ImageMetric) for metric in built.metrics)
    assert len({metric.kind for metric in built.metrics}) == len(built.metrics)


@pytest.mark.parametrize("name", DATA)
def test_data_files_hold_data_alone_and_say_where_they_come_from(name: str) -> None:
    assert set(yaml.safe_load((EXPERIMENTS / name).read_text())) == {"data"}
    data, base = instantiated(name).datamodule, instantiated(STAGES[1]).datamodule
    for key in ("batch_size", "num_workers", "validation_samples"):  # the experiment's own
        assert getattr(data, key) == getattr(base, key)
    if isinstance(data, MixtureDataModule):  # of what `emmdit precompute` makes of other files here
        for source, part in data.sources.items():
            assert (part.source, part.resolution) == (f"latents/{source}", base.resolution)
            assert f"data/{source}.yaml" in DATA and part.images == ("stage1" in name)
    elif not isinstance(data, LatentsDataModule):
        assert data.source and data.license and data.card.startswith("https://") and data.resolution == base.resolution
        parser = precompute_parser()  # and the same file is a source to precompute
        args = parser.parse_args([*files(name, PRECOMPUTED[0]), "--out", "unused"])
        assert parser.instantiate(args).data.columns == data.columns


@pytest.mark.parametrize("name", PRECOMPUTED)
def test_a_precompute_file_is_parsed_and_built(name: str) -> None:
    parser = precompute_parser()
    args = parser.parse_args([*files("data/pd12m.yaml", name, "trainer/ddp_8gpu.yaml"), "--out", "unused"])
    codec = parser.instantiate(args).codec
    assert args.resolution % codec.downsample == 0 and args.trainer["devices"] == 8
    assert not codec.loaded


def test_several_captions_and_buckets_are_options_of_data_and_precompute() -> None:
    parser = precompute_parser()
    options = ["--buckets.step=128", "--caption_columns=[long, short]", "--out", "unused"]
    built = parser.instantiate(parser.parse_args([*files("data/pd12m.yaml", PRECOMPUTED[0]), *options]))
    assert built.buckets == Buckets(step=128) and built.caption_columns == ["long", "short"]
    text = "{buckets: {step: 128}, size_columns: [h, w], caption_column: [a, b], caption_weights: [3, 1]}"
    laid = change(f"data: {{init_args: {text}}}")
    data = cli(*files(STAGES[1], "data/pd12m.yaml"), *laid, *ON_CPU).datamodule
    assert data.buckets == Buckets(step=128) and data.caption_columns == ["a", "b"]
    assert tuple(data.size_columns) == ("h", "w") and data.caption_weights == [3, 1]


@pytest.mark.parametrize("name", FILES)
def test_says_what_it_is_for_and_how_it_is_run(name: str) -> None:
    text = (EXPERIMENTS / name).read_text()
    assert text.startswith("# "), "a comment in the first line says what the file shows"
    assert max(map(len, text.splitlines())) <= 130
    listed = (EXPERIMENTS / "README.md").read_text()
    assert f"`{name.removesuffix('.yaml')}`" in listed, f"experiments/README.md does not list {name}"


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_changes_what_it_says_and_nothing_else(name: str) -> None:
    (base,) = named_bases(EXPERIMENTS / name)
    base = os.path.relpath((EXPERIMENTS / name).parent / base, EXPERIMENTS)
    before, after = (flat(instantiated(which).config.as_dict()) for which in (base, name))
    changed = {key for key in before.keys() | after.keys() if before.get(key, "-") != after.get(key, "-")}
    content = yaml.safe_load((EXPERIMENTS / name).read_text())
    said = [key.removesuffix("class_path") for key in flat({k: v for k, v in content.items() if k != "base"})]
    changed.discard(".config")  # the names of the files
    assert changed
    assert not [key for key in changed if not any(key.startswith(own) or own.startswith(f"{key}.") for own in said)]


@pytest.mark.parametrize("name", STAGES)
def test_the_published_stages_are_the_released_network(name: str) -> None:
    run = instantiated(name)
    with torch.device("meta"):
        network = run.model.denoiser_factory()
        released = EMMDiTTransformer2DModel()  # its own defaults
    assert sum(p.numel() for p in network.parameters()) == 302_449_952
    different = {k for k, v in network.config.items() if json.dumps(v) != json.dumps(released.config.get(k))}
    expected = {"sample_size", "subregion_pattern"} if "1024" in name else set()
    assert different - {"_use_default_values"} == expected
    assert run.datamodule.batch_size * run.trainer.accumulate_grad_batches * 8 == 2048
    assert run.datamodule.resolution == network.config.sample_size * run.model.codec.downsample
    assert bool(run.model.components) == ("stage1" in name) and run.model.ema == ("stage1" not in name)


@pytest.mark.parametrize("name", [name for name in DIFFS if name.startswith(("emmdit/", "edit/", "mm_edit/"))])
def test_a_later_stage_begins_with_the_run_of_its_base(name: str) -> None:
    run, (base,) = instantiated(name), named_bases(EXPERIMENTS / name)
    base_run = instantiated(os.path.relpath((EXPERIMENTS / name).parent / base, EXPERIMENTS))
    inherited = model_args(base_run).init_from
    assert model_args(run).init_from in (inherited, default_run_dir([str((EXPERIMENTS / name).parent / base)]))


@pytest.mark.parametrize("name", OF_SHAPES)
def test_shapes_networks_run_forward(name: str) -> None:
    run = instantiated(name)
    network = run.model.build_denoiser()
    condition = run.model.condition(["a photo of a red circle", "a photo of two squares"])
    side = network.config.sample_size
    latents = torch.randn(2, run.model.codec.latent_channels, side, side)
    with torch.no_grad():
        output = network(latents, timestep=torch.tensor([10.0, 900.0]), **condition).sample
    assert output.shape == latents.shape and output.isfinite().all()


def flat(tree, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: str(tree)}
    return {key: value for k, v in tree.items() for key, value in flat(v, f"{prefix}.{k}").items()}


def test_an_optimizer_named_in_yaml_keeps_its_own_defaults() -> None:
    """An optimizer as the default of the argument would leave its betas and weight decay in every other."""
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


# -- interpolation: facts of jsonargparse's mode "omegaconf+" that the files rely on ------------------

TOTAL = "model: {init_args: {scheduler: {init_args: {total: '${trainer.max_steps}'}}}}"


@pytest.mark.parametrize("command", [None, "fit"])
def test_interpolation(command: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    base = [*files(SHAPES), *change(TOTAL, "reference.yaml")]  # refers to what another file sets

    def total(*args: str) -> int:
        return model_args(cli(*args, *ON_CPU, command=command)).scheduler.init_args.total

    assert total(*base) == yaml.safe_load((EXPERIMENTS / SHAPES).read_text())["trainer"]["max_steps"]
    assert total(*base, "--trainer.max_steps=77") == 77  # an override reaches those who refer to it
    assert total(*base, *change("trainer: {max_steps: 55}")) == 55  # a later file wins
    monkeypatch.setenv("STEPS", "33")
    assert total(*base, *change(TOTAL.replace("trainer.max_steps", "oc.decode:${oc.env:STEPS}"))) == 33
    with pytest.raises(Exception, match=r"trainer\.max_step\'"):
        total(*base, *change(TOTAL.replace("max_steps", "max_step")))
    if command:  # the rule that users meet: not on the command line
        with pytest.raises(Exception, match=r"trainer\.max_steps\'"):
            total(*files(SHAPES), "--model.init_args.scheduler.init_args.total=${trainer.max_steps}")


# -- the published stages, tiny, in a chain ----------------------------------------------------------

TINY = """
model:
  init_args:
    denoiser:
      init_args:
        {num_attention_heads: 2, attention_head_dim: 16, block_groups: [1, 1, 1], caption_channels: 64}
    codec: {init_args: {source: "standin:dc_ae?downsample=8", downsample: 8}}
    text: {init_args: {source: "standin:llama?caption_channels=64", caption_channels: 64, max_length: 32}}
    sampling: {steps: 2}
    compile: false
data:
  init_args:
    source: rows.parquet
    data_files: null
    resolution: 128
    batch_size: 2
    num_workers: 0
    validation_samples: 4
trainer: {accelerator: cpu, max_steps: 2, val_check_interval: 2, log_every_n_steps: 1}
checkpoint: {every_n_train_steps: 2}
samples: {every_n_steps: 0, prompts: [a photo of a red circle, a photo of a cat]}
"""
REPA = """
model:
  init_args:
    components:
      - class_path: emmdit.losses.REPA
        init_args:
          block: blocks.0
          feature_dim: 32
          projector_dim: 16
          vision:
            class_path: emmdit.encoders.DINOv2
            init_args: {source: "standin:dinov2?feature_dim=32", feature_dim: 32}
"""
LARGE = """
model: {init_args: {denoiser: {init_args: {sample_size: 32}}}}
data: {init_args: {resolution: 256}}
trainer: {val_check_interval: 8}
"""


def test_the_published_stages_train_and_hand_over(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 128, 150, 3), generator=noise, dtype=torch.uint8).numpy()
    images = [Image.fromarray(p) for p in pixels]
    columns = {"image": images, "caption": [f"a photo of a dog {i}" for i in range(20)]}
    datasets.Dataset.from_dict(columns).to_parquet("rows.parquet")

    weights = {}
    for name, extra in zip(STAGES, (REPA, "", LARGE), strict=True):
        changes = [*change(TINY, "tiny.yaml"), *change(extra or "{}", "extra.yaml")]
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


def test_the_published_mixes_train_from_precomputed_latents(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    settings = Settings(resolution=128, keep_images=95, batch_size=4, rows_per_shard=5)
    codec = DCAE(source="standin:dc_ae?downsample=8", downsample=8, dtype="float32")
    counts = {"sa1b": 9, "journeydb": 8, "recap_datacomp_flux": 7, "diffusiondb_flux": 6}
    for name, count in counts.items():
        images = [Image.fromarray(p) for p in noise.integers(0, 256, (count, 128, 140, 3), dtype=np.uint8)]
        rows = datasets.Dataset.from_dict({"image": images, "caption": [f"{name} {i}" for i in range(count)]})
        source = yaml.safe_load((EXPERIMENTS / f"data/{name}.yaml").read_text())["data"]["init_args"]
        precompute(HuggingFaceRows(rows), source, codec, f"latents/{name}", settings)

    tiny = yaml.safe_load(TINY)
    tiny["data"]["init_args"] = {"batch_size": 5, "num_workers": 0, "validation_samples": 4}
    for stage, base, extra in ((1, STAGES[0], REPA), (2, STAGES[1], "{}")):
        names = list(counts)[stage - 1 :]
        changes = [*change(yaml.safe_dump(tiny), "tiny.yaml"), *change(extra, "extra.yaml")]
        changes += [f"--data.init_args.sources.{name}.init_args.resolution=128" for name in names]
        changes += ["--model.init_args.init_from=runs/data/nitro_e_stage1"] if stage == 2 else []
        folder = Path(f"runs/data/nitro_e_stage{stage}")
        main(["fit", *files(base, f"data/nitro_e_stage{stage}.yaml"), *changes, f"--trainer.default_root_dir={folder}"])
        saved = torch.load((folder / "checkpoints/last.ckpt").resolve(), weights_only=True)
        assert saved["samples_seen"] == 10
        told = json.loads((folder / "data_report.json").read_text())
        assert [(row["name"], row["samples"], row["passes"]) for row in told["sources"]] == [
            (name, counts[name] - 4, 1) for name in names
        ]
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    for run, names in zip(client.search_runs(["1"]), (list(counts)[1:], list(counts)), strict=True):  # the latest first
        inputs = {found.dataset.name: found for found in client.get_run(run.info.run_id).inputs.dataset_inputs}
        assert inputs.keys() == set(names)
        assert {"license", "card"} <= {tag.key for tag in inputs["journeydb"].tags}
