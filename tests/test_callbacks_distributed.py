"""EMA, the non-finite guard and the loader on two processes, with DDP and with FSDP2, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import copy, json, sys
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from lightning_modules.callbacks import EMA, NonFinite, Throughput
from lightning_modules.parallel import FSDP2Strategy
from tests.toy import Points, Toy, trainer

class Sharded(Toy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.denoiser[1] = torch.nn.Linear(3, 3)  # batch norm would differ from rank to rank
        self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.denoiser[0].weight, DTensor):
            for net in (self.denoiser, self.ema_denoiser):
                fully_shard(net[0], mesh=self.device_mesh["data_parallel"])
                fully_shard(net, mesh=self.device_mesh["data_parallel"])  # a forward leaves its root gathered

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
model, guard = Sharded(Points(bad=(7,)), momentum=0.9, shuffle=False), NonFinite()
callbacks = [EMA(decay=0.9), guard, Throughput()]
run = trainer(folder, callbacks, devices=1 if kind == "one" else 2, strategy=strategy, max_steps=6)
run.fit(model)
whole = lambda p: (p.full_tensor() if isinstance(p, DTensor) else p).detach().tolist()
weights = {name: whole(p) for name, p in model.named_parameters()}
if run.is_global_zero:
    row = json.loads(open(folder + "/non_finite.jsonl").read())
    extra = {"skipped": guard.skipped, "ids": sorted(row["sample_id"]), "seen": model.samples_seen}
    print("RESULT", json.dumps({"weights": weights, **extra}), flush=True)
"""


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    root = str(Path(__file__).resolve().parents[1])
    (tmp_path / "script.py").write_text(SCRIPT)
    results = {}
    for kind in ("one", "ddp", "fsdp"):
        run = subprocess.run(
            [sys.executable, str(tmp_path / "script.py"), kind, str(tmp_path / kind)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
        results[kind] = json.loads(line.removeprefix("RESULT"))
    one = results["one"].pop("weights")
    assert results["one"] == {"skipped": 1, "ids": [4, 5, 6, 7], "seen": 24}
    for kind in ("ddp", "fsdp"):
        weights = results[kind].pop("weights")
        for name, value in one.items():
            torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(value), msg=f"{kind} {name}")
        assert results[kind] == results["one"]
