"""The notebooks run from top to bottom, and lie in git without outputs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lightning_modules.commands.load_model import load_pipeline
from tests.test_training import ROOT, fit

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(name: str, folder: Path) -> tuple[Counter[str], str]:
    """Run a notebook in `folder`: the images by id of their cell, counted, and all text. A cell that fails raises."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    images, text = Counter(), []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            images[cell.id] += "image/png" in output.get("data", {})
            text.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return +images, "\n".join(text)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels without the user's start-up files and history, on one thread."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run, `run`, its MLflow store, and the run's pipeline, `export`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        # Without a warm-up: two steps of it would leave the output, which starts at zero, too small to see in 8 bits.
        warmup = "--model.init_args.scheduler.init_args.warmup=1"
        fit(folder / "run", "--trainer.max_steps=6", "--trainer.val_check_interval=3", warmup)
    load_pipeline(folder / "run")[0].save_pretrained(folder / "export")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "export"])
def test_explore_a_run(
    source: str, trained: Path, tmp_path: Path, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMMDIT_RUN", str(trained / source))
    expected = {"samples": 1, "guidance": 1, "samplers": 2, "forming": 1}
    if source == "run":  # an export meets the empty store that `isolation` names
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
        expected |= {"runs": 1, "timesteps": 1}
    images, text = execute("explore_a_run.ipynb", tmp_path)
    assert images == expected
    assert ("FINISHED" in text) == (source == "run")
    assert ("make quickstart" in text) == (source == "export")
    assert "Warning" not in text
    # the trajectory that the notebook shows ends in the pipeline's image
    assert float(re.search(r"pipeline\(.*: (\S+)$", text, re.MULTILINE)[1]) < 1e-4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_valid_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)  # cells have ids
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"{cell.id}: clear all outputs before saving"
    machine_path = re.search(r"(?<![\w.])(/(work|root|home|Users|tmp|mnt|data)/|[A-Z]:\\\\)\S*", path.read_text())
    assert machine_path is None, machine_path[0]


def test_every_notebook_is_described() -> None:
    readme = (ROOT / "notebooks/README.md").read_text()
    assert NOTEBOOKS and all(path.name in readme for path in NOTEBOOKS)
