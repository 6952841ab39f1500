"""EMA, non-finite gradients, saved configs, throughput, progress and the loader, in a real Trainer on a toy module."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from emmdit.data.loader import ResumableLoader
from emmdit.ema import ema_decay, ema_update
from lightning_modules.callbacks import EMA, NonFinite, ProgressBar, SaveConfig, Throughput
from lightning_modules.callbacks.progress import clock
from lightning_modules.callbacks.save_config import latest_config, write_config
from lightning_modules.callbacks.throughput import peak_tflops


class Points(torch.utils.data.Dataset):
    """20 points; point `bad` is not a number."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict:
        x = torch.tensor([index / 10, 1.0])
        return {"image": x * float("nan") if index in self.bad else x, "caption": str(index)}


class Toy(pl.LightningModule):
    """The contract that the callbacks rely on: denoiser, ema_denoiser, samples_seen."""

    def __init__(self, dataset=None, momentum: float = 0.0, **loader) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.denoiser = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, affine=False))
        self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.dataset, self.loader, self.momentum = dataset or Points(), {"global_batch": 4} | loader, momentum
        self.samples_seen = 0
        self.history, self.ids = [], []

    def train_dataloader(self):
        return ResumableLoader(self.dataset, samples_seen=self.samples_seen, **self.loader)

    def training_step(self, batch, batch_idx):
        self.samples_seen += len(batch["sample_id"])
        self.ids += batch["sample_id"].tolist()
        loss = (self.denoiser[0](batch["image"]) ** 2).mean()
        self.denoiser[1](torch.randn(4, 3))  # moves the buffers
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *args):
        self.history.append(copy.deepcopy(self.denoiser.state_dict()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum, weight_decay=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["samples_seen"] = self.samples_seen

    def on_load_checkpoint(self, checkpoint):
        self.samples_seen = checkpoint["samples_seen"]


def trainer(folder: Path, callbacks=(), **options) -> pl.Trainer:
    defaults = {
        "max_steps": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


# -- EMA -------------------------------------------------------------------------------------------------------------


def test_ema_decay():
    assert [ema_decay(n, 0.5) for n in (0, 1, 8, 9)] == [0.1, 2 / 11, 0.5, 0.5]
    assert ema_decay(0, 0.5, warmup=False) == 0.5


def test_ema_update_is_float32_with_bfloat16_parameters():
    ema, params = [torch.ones(3), torch.zeros(())], [torch.full((3,), 2.0, dtype=torch.bfloat16), torch.ones(())]
    ema_update(ema, params, 0.9999)
    assert torch.allclose(ema[0], torch.full((3,), 1.0001), rtol=0, atol=1e-7) and ema[0].dtype == torch.float32
    assert torch.allclose(ema[1], torch.tensor(1e-4))
    with pytest.raises(ValueError):
        ema_update(ema, params[:1], 0.9)


@pytest.mark.parametrize("accumulate,every", [(1, 1), (2, 1), (1, 2)])
def test_ema_by_hand(tmp_path, accumulate, every):
    model = Toy()
    expected = copy.deepcopy(model.ema_denoiser.state_dict())
    callback = EMA(decay=0.15, every_n_steps=every)
    trainer(tmp_path, [callback], accumulate_grad_batches=accumulate, max_steps=4).fit(model)
    after_steps = model.history[accumulate - 1 :: accumulate]  # 5 batches an epoch: the 5th steps alone
    if accumulate == 2:
        after_steps = [model.history[i] for i in (1, 3, 4, 6)]
    updates = after_steps[every - 1 :: every]
    for n, weights in enumerate(updates):
        decay = min(0.15, (1 + n) / (10 + n))
        for name in expected:
            if "running" in name or "batches" in name:
                expected[name] = weights[name]
            else:
                expected[name] = decay * expected[name] + (1 - decay) * weights[name]
    assert callback.updates == len(updates) == 4 // every
    for name, value in model.ema_denoiser.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_ema_and_samples_survive_a_resume(tmp_path):
    def run(folder, steps, **options):
        model, ema = Toy(num_workers=options.pop("num_workers", 0)), EMA(decay=0.9)
        checkpoint = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_last=True)
        trainer(tmp_path, [ema, checkpoint], max_steps=steps, enable_checkpointing=True).fit(model, **options)
        return model, ema

    straight, ema = run("straight", 9)
    run("broken", 3)
    resumed, resumed_ema = run("broken", 9, ckpt_path=str(tmp_path / "broken" / "last.ckpt"))
    assert straight.ids[12:] == resumed.ids and len(resumed.ids) == 24  # 20 samples: over the end of an epoch
    assert ema.updates == resumed_ema.updates == 9
    for name, value in straight.state_dict().items():
        if "running" not in name:  # those come from global randomness here
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_loader_resumes_at_an_epoch_end_counted_in_epochs(tmp_path):
    def run(epochs, **options):
        model = Toy()
        checkpoint = ModelCheckpoint(tmp_path / "c", save_last=True)
        options = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True} | options
        ckpt_path = options.pop("ckpt_path", None)
        trainer(tmp_path, [checkpoint], **options).fit(model, ckpt_path=ckpt_path)
        return model.ids

    first = run(1)
    second = run(2, ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


def test_lightning_epochs_with_a_tail_and_a_limit(tmp_path):
    model = Toy(global_batch=8)  # 20 samples: 3 batches a pass, the third reaches into the next epoch
    trainer(tmp_path, max_steps=10).fit(model)
    assert len(model.ids) == 80 and all(sorted(model.ids[n : n + 20]) == list(range(20)) for n in range(0, 80, 20))
    limited = Toy(global_batch=8)
    trainer(tmp_path, max_steps=10, limit_train_batches=2).fit(limited)
    assert limited.ids == model.ids


def test_ema_without_a_copy_is_refused(tmp_path):
    model = Toy()
    model.ema_denoiser = None
    with pytest.raises(ValueError, match="ema_denoiser"):
        trainer(tmp_path, [EMA()]).fit(model)
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=1.0)
    with pytest.raises(ValueError, match="16 bit"):
        trainer(tmp_path, [EMA()]).fit(Toy().to(torch.bfloat16))


# -- NonFinite -------------------------------------------------------------------------------------------------------


class Metrics(pl.loggers.logger.Logger):
    """Keeps what it is given."""

    name, version = "", ""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.rows, self.params, self.save_dir_ = [], {}, str(folder)

    save_dir = property(lambda self: self.save_dir_)

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, params):
        self.params.update(params)

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.rows if key in metrics]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_step_is_skipped(tmp_path, accumulate):
    model = Toy(Points(bad=(7,)), momentum=0.9, shuffle=False)  # 7 is in the second batch
    logger, guard = Metrics(tmp_path), NonFinite()
    with pytest.warns(UserWarning, match=r"sample ids .*7"):
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
    assert row["position"] == row["sample_id"] and row["parameters_on_rank_zero"] == ["denoiser.0.weight", "denoiser.0.bias"]
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
    with pytest.raises(RuntimeError, match="3 steps in a row"), pytest.warns(UserWarning):
        trainer(tmp_path, [guard]).fit(Toy(everything))
    assert guard.skipped == 3
    with pytest.raises(RuntimeError, match="not finite"):
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


# -- the same on two processes -----------------------------------------------------------------------------------------

SCRIPT = """
import copy, json, sys
sys.path.insert(0, sys.argv[3])
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from lightning_modules.callbacks import EMA, NonFinite, Throughput
from lightning_modules.strategies import FSDP2Strategy
from tests.test_callbacks import Points, Toy, trainer

class Sharded(Toy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.denoiser[1] = torch.nn.Linear(3, 3)  # batch norm would differ from rank to rank
        self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.denoiser[0].weight, DTensor):
            for net in (self.denoiser, self.ema_denoiser):
                fully_shard(net[0], mesh=self.device_mesh["data_parallel"])
                fully_shard(net, mesh=self.device_mesh["data_parallel"])  # leaves the EMA's root whole after a forward
    def train_dataloader(self):
        self.loader |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return super().train_dataloader()
    def training_step(self, batch, batch_idx):
        self.samples_seen += self.loader["global_batch"]
        with torch.no_grad():
            self.ema_denoiser(batch["image"])
        return (self.denoiser(batch["image"]) ** 2).mean()
    def on_train_batch_end(self, *args):
        pass

kind, folder = sys.argv[1], sys.argv[2]
strategy = {"one": "auto", "ddp": "ddp", "fsdp": FSDP2Strategy()}[kind]
model, guard, meter = Sharded(Points(bad=(7,)), momentum=0.9, shuffle=False), NonFinite(), Throughput()
run = trainer(folder, [EMA(decay=0.9), guard, meter], devices=1 if kind == "one" else 2, strategy=strategy, max_steps=6)
run.fit(model)
full = lambda t: t.full_tensor() if isinstance(t, DTensor) else t
out = {n: full(p.detach()).tolist() for n, p in model.named_parameters()}
if run.is_global_zero:
    row = json.loads(open(folder + "/non_finite.jsonl").read())
    extra = {"skipped": guard.skipped, "ids": sorted(row["sample_id"]), "seen": model.samples_seen}
    print("RESULT", json.dumps({"weights": out, **extra}), flush=True)
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    root = str(Path(__file__).resolve().parents[1])
    (tmp_path / "script.py").write_text(SCRIPT)
    results = {}
    for kind in ("one", "ddp", "fsdp"):
        command = [sys.executable, str(tmp_path / "script.py"), kind, str(tmp_path / kind), root]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
        assert run.returncode == 0, run.stdout + run.stderr
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
        results[kind] = json.loads(line[7:])
    for kind in ("ddp", "fsdp"):
        for name, value in results["one"]["weights"].items():
            torch.testing.assert_close(torch.tensor(results[kind]["weights"][name]), torch.tensor(value), msg=name)
        assert {k: v for k, v in results[kind].items() if k != "weights"} == {"skipped": 1, "ids": [4, 5, 6, 7], "seen": 24}


# -- SaveConfig ------------------------------------------------------------------------------------------------------


class Parser:
    def dump(self, config, skip_none):
        return "".join(f"{key}: {value}\n" for key, value in config.items())


def save(folder: Path, config: dict, logger=None, **options) -> None:
    callback = SaveConfig(Parser(), config)
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    run = trainer(
        folder, [callback, checkpoint], max_steps=config["steps"], enable_checkpointing=True, logger=logger or False
    )
    run.fit(Toy(), **options)


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
    assert names[:3] == ["config.yaml", "config-1.yaml", "config-2.yaml"] and latest_config(tmp_path).name == "config-11.yaml"
    with pytest.raises(FileNotFoundError, match="config.yaml"):
        latest_config(tmp_path / "none")


# -- Throughput and progress -------------------------------------------------------------------------------------------


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
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce GTX 1080", None),
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
    assert "\r" not in out and [line.split("  ")[0] for line in lines] == [f"step {n}/5" for n in range(1, 6)] + ["step 5"]
    assert "images/s" in lines[1] and lines[1].endswith("left") and " loss " in lines[1]
    assert "left" not in lines[4] and lines[5] == "step 5  val/loss 0.25"


def test_progress_is_quiet_between(tmp_path, capsys):
    trainer(tmp_path, [ProgressBar(every=1e9)], max_steps=5).fit(Toy())
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert [line.split("  ")[0] for line in lines] == ["step 1/5", "step 5/5"]


def test_progress_redraws_on_a_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("lightning_modules.callbacks.progress.sys.stdout", terminal)
    trainer(tmp_path, [ProgressBar(refresh=0.0)], max_steps=3).fit(Toy())
    out = terminal.getvalue()
    assert out.count("\n") == 1 and out.endswith("\n") and out.count("\r") >= 3 and "[####################] step 3/3" in out


def test_clock():
    assert [clock(s) for s in (7, 75, 3675, 90000)] == ["0:07", "1:15", "1:01:15", "1d 1:00:00"]
