"""Non-finite gradients, saved configs, throughput and progress in a real Trainer, on a toy module."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from emmdit.timing import core_seconds
from lightning_modules.callbacks import NonFinite, ProgressBar, SaveConfig, Throughput
from lightning_modules.callbacks.save_config import write_config
from lightning_modules.callbacks.throughput import peak_tflops
from lightning_modules.runs import latest_config
from tests.toy import Metrics, Points, Toy, trainer

PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

# -- NonFinite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_step_is_skipped(tmp_path, accumulate):
    model = Toy(Points(bad=(7,)), momentum=0.9, shuffle=False)  # 7 is in the second batch
    logger, guard = Metrics(tmp_path), NonFinite()
    with pytest.warns(UserWarning, match=r"\bnan\b.*\b7\b"):
        trainer(tmp_path, [guard], logger=logger, max_steps=3, accumulate_grad_batches=accumulate).fit(model)
    assert guard.skipped == 1 and guard.consecutive == 0
    before, after = [(0, 1), (0, 1)][accumulate - 1]
    weights = [state["0.weight"] for state in model.history]
    assert all(torch.isfinite(w).all() for w in weights)
    # neither the gradient nor momentum nor weight decay moved anything in the skipped step
    assert torch.equal(weights[before], weights[after])
    assert not torch.equal(weights[after], weights[after + accumulate])
    assert model.samples_seen == {1: 12, 2: 20}[accumulate]  # the skipped samples count
    (row,) = [json.loads(line) for line in (tmp_path / "non_finite.jsonl").read_text().splitlines()]
    assert row["sample_id"] == ([4, 5, 6, 7] if accumulate == 1 else list(range(8)))
    assert row["position"] == row["sample_id"] and row["parameters_on_rank_zero"] == [
        "denoiser.0.weight",
        "denoiser.0.bias",
    ]
    assert logger.values("skipped_steps")[-1] == 1.0


def test_grad_norm_is_the_one_before_clipping(tmp_path):
    class Norms(pl.Callback):
        seen = []

        def on_after_backward(self, trainer, pl_module):
            grads = [p.grad.flatten() for p in pl_module.denoiser.parameters()]
            self.seen.append(torch.cat(grads).norm().item())

    logger, norms = Metrics(tmp_path), Norms()
    trainer(tmp_path, [NonFinite(), norms], logger=logger, gradient_clip_val=1e-3).fit(Toy())
    assert logger.values("grad_norm") == pytest.approx(norms.seen) and min(norms.seen) > 1e-3


def test_non_finite_stops_at_the_limit(tmp_path):
    everything = Points(bad=tuple(range(20)))
    guard = NonFinite(limit=3)
    with pytest.raises(ValueError, match=r"\b3\b.*\bstep 2\b.*non_finite\.jsonl"), pytest.warns(UserWarning):
        trainer(tmp_path, [guard]).fit(Toy(everything))
    assert guard.skipped == 3
    with pytest.raises(ValueError, match=r"\bstep 0\b.*non_finite\.jsonl"):
        trainer(tmp_path, [NonFinite(policy="raise")]).fit(Toy(everything))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.Muon])
def test_optimizers_leave_all_alone_without_gradients(optimizer):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    opt = optimizer([weight], lr=0.1)
    weight.square().sum().backward()
    opt.step()
    before, state = weight.detach().clone(), copy.deepcopy(opt.state_dict()["state"])
    weight.grad = None
    opt.step()
    assert torch.equal(weight, before) and str(opt.state_dict()["state"]) == str(state)


# -- SaveConfig ----------------------------------------------------------------------------------------------


class Parser:
    def dump(self, config, skip_none):
        return "".join(f"{key}: {value}\n" for key, value in config.items())


def save(folder: Path, config: dict, logger=False, **options) -> None:
    callbacks = [SaveConfig(Parser(), config), ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)]
    trainer(folder, callbacks, max_steps=config["steps"], enable_checkpointing=True, logger=logger).fit(
        Toy(), **options
    )


def test_save_config_twice(tmp_path):
    logger = Metrics(tmp_path)
    save(tmp_path, {"steps": 1, "lr": 0.1}, logger)
    assert latest_config(tmp_path).read_text() == "steps: 1\nlr: 0.1\n" and logger.params == {"steps": 1, "lr": 0.1}
    last = str(tmp_path / "last.ckpt")
    save(tmp_path, {"steps": 2, "lr": 0.1, "ckpt_path": last}, ckpt_path=last)
    assert (tmp_path / "config.yaml").read_text() == "steps: 1\nlr: 0.1\n"
    assert latest_config(tmp_path).name == "config-1.yaml"
    save(tmp_path, {"steps": 2, "lr": 0.1, "ckpt_path": None}, ckpt_path=last)  # as before but for the path
    assert latest_config(tmp_path).name == "config-1.yaml"
    save(tmp_path, {"steps": 1, "lr": 0.3})  # a fresh start
    assert {p.name for p in tmp_path.glob("config*")} == {"config.yaml", "config.yaml.old", "config-1.yaml.old"}
    assert latest_config(tmp_path).read_text() == "steps: 1\nlr: 0.3\n"


def test_write_config_counts_on(tmp_path):
    names = [write_config(tmp_path, f"a: {n}\n", resume=True).name for n in range(12)]
    assert names == ["config.yaml", *(f"config-{n}.yaml" for n in range(1, 12))]
    assert latest_config(tmp_path).name == "config-11.yaml"
    with pytest.raises(FileNotFoundError, match="config.yaml"):
        latest_config(tmp_path / "none")


# -- Throughput and progress ---------------------------------------------------------------------------------


class Clock:
    """A second between each two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def test_throughput_maths(tmp_path, monkeypatch):
    from lightning_modules.callbacks import throughput

    monkeypatch.setattr(throughput, "time", Clock())
    meter, logger = Throughput(window=3, peak_tflops=1e-12, flops_per_sample=0.1), Metrics(tmp_path)
    trainer(tmp_path, [meter], logger=logger, accumulate_grad_batches=5, max_steps=4, log_every_n_steps=1).fit(Toy())
    # 5 micro batches of 4 in a second; the first step only starts the clock
    assert logger.values("throughput/images_per_second") == [20.0] * 3
    assert logger.values("throughput/seconds_per_step") == [1.0] * 3
    assert logger.values("throughput/mfu") == pytest.approx([20 * 0.1 / 1.0] * 3)
    assert all(0 < share < 1 for share in logger.values("throughput/data_wait"))
    assert len(meter._steps) == 3
    assert [step for step, row in logger.rows if "throughput/mfu" in row] == [1, 2, 3]


def test_training_time_goes_on_in_a_resume_and_rests_in_pauses(tmp_path, monkeypatch):
    from lightning_modules.callbacks import throughput

    clock, spent = Clock(), iter(range(0, 10_000, 3))
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "core_seconds", lambda: next(spent))

    class Work(pl.Callback):
        """Something else after steps 1 and 3, for 1,000 seconds; 10 seconds in each step."""

        def on_train_batch_start(self, *_):
            clock.now += 10

        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.training_steps in (1, 3):
                with Throughput.paused(trainer), Throughput.paused(trainer):
                    clock.now += 1000

    def fit(steps, **options):
        meter, checkpoint = Throughput(window=3), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
        trainer(tmp_path, [meter, Work(), checkpoint], max_steps=steps, enable_checkpointing=True).fit(Toy(), **options)
        return meter

    first = fit(2)
    again = fit(4, ckpt_path=str(tmp_path / "last.ckpt"))
    assert 20 < first.totals["seconds"] < 40 < again.totals["seconds"] < 80  # 10 a step, and a second each look
    assert first.totals == first.state_dict() and 0 < first.totals["core_seconds"] < again.totals["core_seconds"]
    with Throughput.paused(trainer(tmp_path, [again])):
        pass
    assert again._since is None  # training has ended: a pause does not start it


def test_core_seconds_count_threads_and_children():
    before = core_seconds()
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    spent = core_seconds() - before
    assert 0.45 < spent < 3
    child = subprocess.Popen([sys.executable, "-c", code + "\nprint('done', flush=True)\ninput()"], **PIPES)
    assert child.stdout.readline() == b"done\n"  # and is still running
    assert core_seconds() - before > spent + 0.45
    child.communicate(b"\n")
    assert core_seconds() - before > spent + 0.45


def test_throughput_leaves_checkpoints_out(tmp_path):
    meter = Throughput()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    trainer(tmp_path, [meter, checkpoint], max_steps=6, enable_checkpointing=True).fit(Toy())
    assert len(meter._steps) == 3  # of the five intervals those after steps 2 and 4 are dropped


@pytest.mark.parametrize(
    "name,peak",
    [
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI250X", 191.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40", None),
    ],
)
def test_peak(name, peak):
    assert peak_tflops(name) == peak


def test_progress_lines(tmp_path, capsys):
    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 0.25)

        def val_dataloader(self):
            return torch.utils.data.DataLoader(self.dataset, batch_size=20)

    trainer(tmp_path, [ProgressBar(every=0.0)], max_steps=5, num_sanity_val_steps=1).fit(Validated())
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "step" in line]
    assert "\r" not in out and [line.split("  ")[0] for line in lines] == [f"step {n}/5" for n in range(1, 6)] + [
        "step 5"
    ]
    assert "images/s" in lines[1] and ":" in lines[1] and " loss " in lines[1]  # a clock
    assert ":" not in lines[4] and lines[5] == "step 5  val/loss 0.25"
    trainer(tmp_path, [ProgressBar(every=1e9)], max_steps=5).fit(Toy())
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert [line.split("  ")[0] for line in lines] == ["step 1/5", "step 5/5"]


def test_progress_redraws_on_a_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("lightning_modules.callbacks.progress.sys.stdout", terminal)
    trainer(tmp_path, [ProgressBar(refresh=0.0)], max_steps=3).fit(Toy())
    out = terminal.getvalue()
    assert (
        out.count("\n") == 1
        and out.endswith("\n")
        and out.count("\r") >= 3
        and "[####################] step 3/3" in out
    )
