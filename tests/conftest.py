"""Settings every test runs under: offline, its own MLflow store, fixed seeds, one thread per worker."""

from __future__ import annotations

import os

# Before anything imports torch, Hugging Face or MLflow, which read these once. Subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# Inside a SLURM job or under torchrun Lightning would take the tests for one of the job's ranks;
# and a run id in the environment would make them write into the user's own MLflow run.
OUTER_JOB = ("SLURM_", "TORCHELASTIC_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_", "NODE_RANK", "GROUP_")
for _name in list(os.environ):
    if _name.startswith((*OUTER_JOB, "MLFLOW_RUN", "MLFLOW_EXPERIMENT")):
        del os.environ[_name]

import random  # noqa: E402
import socket  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def isolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh MLflow store in the test's own folder and the same random state whatever ran before."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stand-ins for downloads are made once a session, and not in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMMDIT_CACHE", str(tmp_path_factory.mktemp("emmdit_cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connecting beyond this machine fails at once: no test may lean on a download that happens to work."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL_HOSTS:
            raise OSError(f"A test tried to reach {address[0]}; tests run without a network.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield
