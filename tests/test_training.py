"""Whole trainings by the command line: resume after a kill, one process against two, overfitting, export round trip."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from emmdit import EMMDiTPipeline
from emmdit.data.buckets import Buckets
from emmdit.data.precompute.precompute import Settings, precompute
from emmdit.data.readers.open import open_source
from emmdit.encoders import DCTCodec
from emmdit.files import read_settings
from emmdit.shapes import ShapesWorld
from emmdit.weights import checkpoint_state, find_checkpoint
from lightning_modules.commands.main import main
from tests.recorder import read

ROOT = Path(__file__).parents[1]
TINY = [
    "--model.init_args.denoiser.init_args.num_attention_heads=2",
    "--model.init_args.denoiser.init_args.attention_head_dim=16",
    "--model.init_args.denoiser.init_args.block_groups=[1,1,1]",
    "--model.init_args.scheduler.init_args.total=100",
    "--data.init_args.batch_size=8",
    "--data.init_args.validation_samples=8",
    "--trainer.precision=32-true",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--samples.prompts=null",
]


def fit(
    run_dir: Path, *extra: str, ranks: int = 1, check: bool = True, timeout: float = 240
) -> subprocess.CompletedProcess:
    """`emmdit fit` in its own process, as a user would start it."""
    command = [
        *(sys.executable, "-m", "lightning_modules", "fit", "-c", "experiments/shapes/emmdit.yaml", *TINY),
        f"--trainer.default_root_dir={run_dir}",
        f"--trainer.callbacks+={{class_path: tests.recorder.Recorder, init_args: {{folder: {run_dir}/record}}}}",
        f"--trainer.devices={ranks}",
        *extra,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def evaluation(folder: Path, every_n_steps: int = 0) -> str:
    """The evaluation callback with three metrics of five images, no multiple of two processes."""
    prompts = folder / "five.jsonl"
    lines = [line for line in ShapesWorld().prompts(5) if line["tag"] == "colors"]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asset = f"{ROOT}/assets/shapes_clip"
    clip = f"{{class_path: emmdit.evaluation.CLIP, init_args: {{source: {asset}}}}}"
    reference = next(Path(asset).glob("shapes_p48_*.npz"))
    features = f"{{class_path: emmdit.evaluation.CLIPFeatures, init_args: {{clip: {clip}}}}}"
    metrics = ", ".join(
        f"{{class_path: emmdit.evaluation.{name}, init_args: {{{arguments}}}}}"
        for name, arguments in (
            ("GenEval", "detector: {class_path: emmdit.shapes.ShapesDetector}"),
            ("CLIPScore", f"clip: {clip}"),
            ("FID", f"features: {features}, reference: {reference}"),
        )
    )
    return (
        "--trainer.callbacks+={class_path: lightning_modules.callbacks.Evaluation, init_args: {"
        f"prompts: {{class_path: emmdit.evaluation.PromptFile, init_args: {{path: {prompts}}}}}, metrics: [{metrics}], "
        f"every_n_steps: {every_n_steps}, batch_size: 2, steps: 3}}}}"
    )


def emmdit(*args: str) -> tuple[int, str]:
    """Exit status and output of the command, in this process: starting one takes longer than what it does."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            main(list(args))
        except SystemExit as end:
            return end.code or 0, out.getvalue()
    return 0, out.getvalue()


def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path: Path) -> None:
    schedule = ("--trainer.max_steps=8", "--checkpoint.every_n_train_steps=3", "--trainer.val_check_interval=4")
    fit(tmp_path / "whole", *schedule)
    kill = f"{{class_path: tests.recorder.Recorder, init_args: {{folder: {tmp_path}/unused, kill_at: 5}}}}"
    killed = fit(tmp_path / "broken", *schedule, f"--trainer.callbacks+={kill}", check=False)
    assert killed.returncode == -9
    before = read(tmp_path / "broken/record")
    fit(tmp_path / "broken", *schedule, "--ckpt_path=last")

    whole, broken = read(tmp_path / "whole/record"), read(tmp_path / "broken/record")
    assert [line["step"] for line in whole] == list(range(1, 9))
    assert before == whole[: len(before)]
    resumed = broken[len(before) :]
    assert resumed[0]["step"] == 4  # the checkpoint of step 3 was the last before the kill
    assert resumed == whole[3:]  # ids, losses, learning rates, EMA: to the last bit

    for run in ("whole", "broken"):
        last = [path.name for path in (tmp_path / run / "checkpoints").glob("last*")]
        assert last == ["last.ckpt"] and find_checkpoint(tmp_path / run).name.endswith("step=8.ckpt")
    ids = {tuple(line["ids"]) for line in whole}
    assert len(ids) == 8
    a, b = (checkpoint_state(find_checkpoint(tmp_path / run)) for run in ("whole", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    runs = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).search_runs(["1"])
    by_name = {run.info.run_name: run for run in runs}
    assert len(runs) == 2 and set(by_name) == {"whole", "broken"}
    assert by_name["broken"].info.status == "FINISHED"
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    curves = {
        name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
        for name, run in by_name.items()
    }
    assert curves["whole"] == curves["broken"] and len(curves["whole"]) == 8


@pytest.mark.parametrize(
    "optimizer", ["emmdit.optim.MuonAdamW", pytest.param("torch.optim.AdamW", marks=pytest.mark.slow)]
)
def test_one_process_ddp_and_fsdp_agree(tmp_path: Path, optimizer: str) -> None:
    common = (
        "--trainer.max_steps=4",
        f"--model.init_args.optimizer={{class_path: {optimizer}, init_args: {{lr: 0.001}}}}",
        "--trainer.val_check_interval=2",
        "--samples.prompts=[a photo of a circle, a photo of two squares, a photo of a star]",  # no multiple of two
        "--samples.steps=3",
        evaluation(tmp_path, every_n_steps=2),
    )
    fit(tmp_path / "one", *common)
    two = (*common, "--data.init_args.batch_size=4")
    fit(tmp_path / "ddp", *two, "--trainer.strategy=ddp", ranks=2)
    fit(tmp_path / "fsdp", *two, "--trainer.strategy={class_path: lightning_modules.parallel.FSDP2Strategy}", ranks=2)

    one = read(tmp_path / "one/record")
    for name in ("ddp", "fsdp"):
        ranks = [read(tmp_path / name / "record", rank) for rank in (0, 1)]
        for step, line in enumerate(one):
            mean = np.mean([rank[step]["loss"] for rank in ranks])
            assert mean == pytest.approx(line["loss"], rel=1e-5), f"{name} step {step}"
            assert sorted(ranks[0][step]["ids"] + ranks[1][step]["ids"]) == sorted(line["ids"])
            for rank in ranks:
                assert rank[step]["ema"] == pytest.approx(line["ema"], rel=1e-6)
                assert rank[step]["raw"] == pytest.approx(line["raw"], rel=1e-6)
        paths = [tmp_path / run / "samples/step_0000004.png" for run in ("one", name)]
        a, b = (np.asarray(Image.open(path)).astype(int) for path in paths)
        assert np.abs(a - b).max() <= 2, f"{name} generates other images"
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    values = {run.info.run_name: run.data.metrics for run in client.search_runs(["1"])}
    for name in ("ddp", "fsdp"):
        for metric in ("train/loss", "val/loss_ema", "val/loss_raw"):
            assert values[name][metric] == pytest.approx(values["one"][metric], rel=1e-5), (name, metric)
        for metric in ("eval/clip_score_shapes", "eval/fid_clip_shapes_5"):  # images differ by 2 of 255
            assert values[name][metric] == pytest.approx(values["one"][metric], rel=0.02), (name, metric)
        assert values[name]["eval/geneval_shapes_colors"] == values["one"]["eval/geneval_shapes_colors"]
    # the sharded checkpoint is read back by one process
    status, output = emmdit("export", "--ckpt", str(tmp_path / "fsdp"), "--out", str(tmp_path / "export"))
    assert status == 0, output
    a = EMMDiTPipeline.from_pretrained(tmp_path / "export").transformer.state_dict()
    b = checkpoint_state(find_checkpoint(tmp_path / "one"))
    for key, value in a.items():
        torch.testing.assert_close(value, b[f"ema_denoiser.{key}"], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Folder of a run with a checkpoint at step 2 and one of the end, its MLflow store, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        schedule = ("--trainer.max_steps=3", "--trainer.val_check_interval=3", "--checkpoint.every_n_train_steps=2")
        done = fit(folder / "run", *schedule, "--samples.prompts=[a photo of a circle, a photo of two squares]")
    return folder / "run", f"sqlite:///{folder}/mlflow.db", done.stdout


def test_an_evaluation_leaves_the_training_alone(tmp_path: Path, trained: tuple[Path, str, str]) -> None:
    schedule = ("--trainer.max_steps=3", "--trainer.val_check_interval=3")
    fit(tmp_path / "measured", *schedule, evaluation(tmp_path, every_n_steps=1))
    assert read(tmp_path / "measured/record") == read(trained[0] / "record")

    folder = tmp_path / "measured/evaluation"
    for step in (1, 2, 3):
        (images,) = (folder / f"step_{step:07d}").iterdir()  # one image set for three metrics
        found = json.loads((images / "evaluation.json").read_text())
        assert found["step"] == step
        assert {"fid_clip_shapes_5", "clip_score_shapes", "geneval_shapes"} <= set(found["metrics"])
        assert (images / "geneval_results.jsonl").is_file()
        assert len(list(images.rglob("*.png"))) == (5 if step == 3 else 0)  # the last evaluation's are kept
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = next(run for run in client.search_runs(["1"]) if run.info.run_name == "measured")
    curve = client.get_metric_history(run.info.run_id, "eval/fid_clip_shapes_5")
    assert [point.step for point in curve] == [1, 2, 3]
    assert all(point.value > 100 for point in curve)  # untrained
    record = json.loads((tmp_path / "measured/train.json").read_text())
    assert record["steps"] == 3 and record["hardware"] and record["val_loss_ema"] > 0


def test_an_evaluation_names_what_is_missing_before_the_first_step(tmp_path: Path) -> None:
    callback = evaluation(tmp_path).replace(f"{ROOT}/assets/shapes_clip}}", "openai/clip-vit-base-patch32}")
    done = fit(tmp_path / "run", "--trainer.max_steps=3", callback, check=False)
    assert done.returncode == 2 and "openai/clip-vit-base-patch32" in done.stderr
    assert not (tmp_path / "run/record").exists()


def test_eight_samples_are_learnt_by_heart(tmp_path: Path) -> None:
    fit(
        tmp_path,
        "--trainer.max_steps=150",
        "--data.init_args.length=8",
        "--model.init_args.denoiser.init_args.num_attention_heads=4",
        "--model.init_args.optimizer.init_args.lr=0.01",
        "--model.init_args.scheduler.init_args.total=150",
        "--trainer.val_check_interval=150",
    )
    record = read(tmp_path / "record")
    first, last = (np.mean([line["loss"] for line in part]) for part in (record[:10], record[-10:]))
    assert last < 0.35 * first
    assert {i for line in record for i in line["ids"]} == set(range(8))


def test_checkpoint_to_export_to_sample(tmp_path: Path, trained: tuple[Path, str, str]) -> None:
    run, store, printed = trained
    prompts = f"emmdit sample --ckpt {run} --prompt 'a photo of a circle' "
    for told in ("curve.png", "step_0000003.png", "last.ckpt", "sqlite:///", prompts):
        assert told in printed
    rows = (run / "curve.csv").read_text().splitlines()
    assert rows[0] == "step,train/loss,val/loss_ema,val/loss_raw" and len(rows) >= 4
    assert Image.open(run / "curve.png").width > 300
    client = mlflow.MlflowClient(store)
    (tracked,) = client.search_runs(["1"])
    assert any("images" in artifact.path for artifact in client.list_artifacts(tracked.info.run_id))
    assert tracked.inputs.dataset_inputs[0].dataset.name == "ShapesDataModule"
    grids = sorted((run / "samples").glob("*.png"))
    assert [path.name for path in grids] == ["step_0000003.png"]
    assert read_settings(grids[0])["step"] == 3

    prompt = ("--prompt", "a photo of a red circle", "--prompt", "a photo of two squares", "--seed", "5")
    run, folder = str(run), str(tmp_path / "export")
    for command in (
        ("sample", "--ckpt", run, *prompt, "--steps", "4", "--out", str(tmp_path / "from_run")),
        ("export", "--ckpt", run, "--out", folder),
        ("sample", "--ckpt", folder, *prompt, "--steps", "4", "--out", str(tmp_path / "from_export")),
        ("sample", "--ckpt", run, *prompt, "--weights", "raw", "--out", str(tmp_path / "raw")),
    ):
        status, output = emmdit(*command)
        assert status == 0, output
    for name in ("00000.png", "00001.png", "grid.png"):
        a, b = (np.asarray(Image.open(tmp_path / source / name)) for source in ("from_run", "from_export"))
        assert np.array_equal(a, b)
    card = (tmp_path / "export/README.md").read_text()
    assert all(word in card for word in ("3 optimizer steps", "24 samples", "seed 0", "MuonAdamW(lr=0.003"))
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"grid.png", "curve.csv", "curve.png", "config.yaml"} <= files
    settings = read_settings(tmp_path / "from_run/00001.png")
    expected = {"prompt": "a photo of two squares", "seed": 6, "steps": 4, "guidance": 4.0, "weights": "ema"}
    assert {key: settings[key] for key in expected} == expected
    assert read_settings(tmp_path / "raw/00001.png")["weights"] == "raw"

    nowhere = ("--out", str(tmp_path / "no"))
    for command, words in (
        (("export", "--ckpt", run, "--out", folder), (folder, "--out")),
        (("sample", "--ckpt", folder, "--prompt", "a photo of a giraffe", *nowhere), ("giraffe", "circle")),
        (("sample", "--ckpt", str(tmp_path / "nothing"), *prompt, *nowhere), ("nothing",)),
    ):
        status, output = emmdit(*command)
        assert status == 2 and all(word in output for word in words), output


def test_validate_repeats_what_fit_measured(trained: tuple[Path, str, str]) -> None:
    folder, store, _ = trained
    saved = (folder / "config.yaml").read_text()
    assert "default_root_dir: null" in saved and "dirpath: null" in saved
    (run,) = mlflow.MlflowClient(store).search_runs(["1"])
    status, output = emmdit(
        *("validate", "-c", str(folder / "config.yaml"), "--ckpt_path", str(find_checkpoint(folder))),
        "--trainer.logger=false",
    )
    assert status == 0, output
    line = next(line for line in output.splitlines() if "val/loss_ema" in line)
    printed = float(line.split("val/loss_ema")[1].split()[0])
    assert printed == pytest.approx(run.data.metrics["val/loss_ema"], rel=1e-3)


def latents_of_two_sizes(folder: Path, rows: int = 40) -> Path:
    """Random images as latents in buckets, read back by `LatentsDataModule`."""
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 48, 48, 3), dtype=np.uint8)
    images = [Image.fromarray(p[:, : 48 if i % 3 else 16]) for i, p in enumerate(pixels)]
    captions = [f"a photo of a {'red' if i % 2 else 'blue'} circle" for i in range(rows)]
    datasets.Dataset.from_dict({"image": images, "caption": captions}).to_parquet(folder / "rows.parquet")
    settings = Settings(resolution=32, buckets=Buckets(step=16, max_ratio=4), min_side=1)
    table, codec = open_source(str(folder / "rows.parquet")), DCTCodec(whitening=0.25)
    precompute(table, {"source": "rows"}, codec, folder / "latents", settings)
    return folder / "latents"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four runs, seven processes
def test_killed_on_two_ranks_goes_on_with_one_then_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents in buckets, 32 draws an epoch: killed in mid epoch, then behind an epoch's end, and on to the end."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = (
        "--data=datamodules.LatentsDataModule",
        f"--data.init_args.source={latents_of_two_sizes(tmp_path)}",
        "--data.init_args.num_workers=0",
        "--data.init_args.validation_samples=8",
        "--data.init_args.bucket_batch=12",
        "--model.init_args.denoiser.init_args.subregion_pattern=[full]",
        "--trainer.limit_val_batches=0",
        "--checkpoint.every_n_train_steps=1",
    )

    def run(name: str, ranks: int, steps: int, kill_at: int | None = None) -> list[dict]:
        """The ids of each step, all ranks together in stream order; at `kill_at` rank zero ends by SIGKILL."""
        record = tmp_path / "record" / f"{name}_{ranks}_{steps}"
        recorder = f"{{class_path: tests.recorder.Recorder, init_args: {{folder: {record}, kill_at: {kill_at}}}}}"
        done = fit(
            tmp_path / name,
            *data,
            f"--data.init_args.batch_size={12 // ranks}",
            f"--trainer.max_steps={steps}",
            f"--trainer.callbacks+={recorder.replace('None', 'null')}",
            *(("--trainer.strategy=ddp",) if ranks > 1 else ()),
            *(("--ckpt_path=last",) if (tmp_path / name / "checkpoints").exists() else ()),
            ranks=ranks,
            check=kill_at is None,
            timeout=900,
        )
        assert (done.returncode != 0) == (kill_at is not None), done.stderr[-3000:]
        shares = [read(record, rank) for rank in range(ranks)]
        count = min(map(len, shares))  # a killed rank may be a step ahead of the others
        steps = [[part[i]["ids"] for part in shares] for i in range(count)]
        return [{"step": shares[0][i]["step"], "ids": interleave(ids)} for i, ids in enumerate(steps)]

    whole = run("whole", 1, 9)
    assert [line["step"] for line in whole] == list(range(1, 10))
    for ranks, steps, kill_at in ((2, 9, 2), (1, 9, 5), (3, 9, None)):
        part = run("broken", ranks, steps, kill_at)
        first = part[0]["step"] - 1
        assert part == whole[first : first + len(part)], (ranks, first)
    assert part[-1]["step"] == 9
    assert {i for line in whole for i in line["ids"]} == set(range(32))


def interleave(ids: list[list[int]]) -> list[int]:
    return [i for together in zip(*ids, strict=True) for i in together]
