"""Metrics on two processes with unequal shares of the images, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emmdit.evaluation.metrics.cmmd import CMMD
from emmdit.evaluation.metrics.fid import FID
from emmdit.evaluation.metrics.kid import KID
from tests.test_fid import reference_of, scored
from tests.test_geneval_results import SAMPLES, judged
from tests.tiny_features import TinyFeatures, random_images

SCRIPT = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from tests.test_fid_distributed import metrics
from tests.test_geneval_results import SAMPLES, judged
from tests.tiny_features import random_images, samples

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
images, all_samples, values = random_images(21, seed=2), samples(21), {}
shares = {
    "every second": (slice(0, None, 2), slice(1, None, 2)),
    "17 and 4": (slice(0, 17), slice(17, None)),
    "all and none": (slice(0, None), slice(21, None)),
}
for name, both in shares.items():
    share = both[rank]
    for metric in metrics(folder):
        metric.prepare()
        mine = all_samples[share]
        for first in range(0, len(mine), 6):
            metric.update(images[share][first : first + 6], mine[first : first + 6])
        values[f"{name}: {metric.name}"] = metric.compute()[""]
    values[f"{name}: geneval"] = judged(SAMPLES[share]).compute()
try:
    judged(SAMPLES[5 * rank : 5 * rank + 1]).compute()
except ValueError as error:
    values["incomplete"] = str(error)
(folder / f"values_{rank}.json").write_text(json.dumps(values))
dist.barrier()
dist.destroy_process_group()  # or gloo's thread may still be alive at exit, which aborts
"""


def metrics(folder: Path) -> tuple[FID, KID, CMMD]:
    features, reference = TinyFeatures(), str(folder / "reference.npz")
    return FID(features, reference), KID(features, reference, 5, 9), CMMD(features, reference)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    reference_of(random_images(30, seed=1), tmp_path / "reference.npz")
    root = str(Path(__file__).resolve().parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    expected = {metric.name: scored(metric, random_images(21, seed=2)) for metric in metrics(tmp_path)}
    for process in ranks:
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
    first, second = (json.loads((tmp_path / f"values_{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 13
    incomplete = first.pop("incomplete")
    assert all(f" {number} " in incomplete for number in (6, 8, 4))
    for name, value in first.items():
        if name.endswith(": geneval"):
            assert value == judged(SAMPLES).compute(), name
        else:
            assert value == pytest.approx(expected[name.partition(": ")[2]], rel=1e-9), name
