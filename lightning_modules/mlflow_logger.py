"""MLflow tracking: one run per training, through every resume of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock  # a requirement of torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from PIL import Image

from emmdit.config_text import flatten_config, mask_secrets
from emmdit.files import grid
from emmdit.provenance import git_state

RUN_FILE = "mlflow_run.json"
DEFAULT_STORE = "sqlite:///mlflow.db"  # also the default of `mlflow ui`


class MLflowLogger(MLFlowLogger):
    """Lightning's MLFlowLogger with a lazy client, a real folder, and runs that live through a resume.

    - The client is made on first use and on rank zero only, behind a file lock: several processes that set up
      a fresh sqlite store at once break it.
    - The MLflow run begins when training does. If training resumes from a checkpoint and the run folder holds
      `mlflow_run.json`, that run is continued, else a new one is created and recorded there. Parameters may be
      logged before; log anything else from `on_train_start` on.
    - It ends as FINISHED, FAILED (an error) or KILLED (SIGTERM, Ctrl-C). A process killed without warning
      leaves RUNNING.
    - A tracking server that does not answer costs metrics, with a warning, and not the training.
    - Checkpoints are not uploaded; the tag `checkpoint` says where the latest is.

    Args:
        save_dir: run folder, by default the Trainer's `default_root_dir`; checkpoints without a folder of
            their own go to its `checkpoints`.
        experiment_name, run_name: where it appears in MLflow; by default under the run folder's name.
        tracking_uri: address of the store; `MLFLOW_TRACKING_URI` or sqlite in the working folder by default.
        artifact_location: of the experiment, if this run creates it; with sqlite `mlartifacts` beside the database
            by default, else the server's choice.
        tags: of the run.
        run_id: continue this run whatever the run folder says.
        prefix: in front of the names of metrics.
    """

    LOGGER_JOIN_CHAR = "/"

    def __init__(
        self,
        save_dir: str | Path | None = None,
        experiment_name: str = "emmdit",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        tags: dict[str, str] | None = None,
        run_id: str | None = None,
        prefix: str = "",
    ) -> None:
        Logger.__init__(self)  # not MLFlowLogger's: it connects at once, on every rank
        self._save_dir = save_dir
        self._experiment_name = experiment_name
        self._experiment_id: str | None = None
        self._run_name = run_name
        self._tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
        self._artifact_location = artifact_location
        self.tags = dict(tags or {})
        self._run_id = run_id
        self._prefix = prefix
        self._initialized = False  # whether the run has begun
        self._log_model = False
        self._checkpoint_callback = None
        self._mlflow_client: MlflowClient | None = None
        self._trainer: Trainer | None = None
        self._pending: dict[str, Any] = {}  # parameters logged before the run began
        self._sets_status = True
        self._timestamp = 0

    # -- Lightning's interface ---------------------------------------------------------------------------------

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The MLflow client (a silent dummy on other ranks). Using it does not begin a run, `run_id` does."""
        if self._mlflow_client is None:
            with self._store_lock():
                client = self._mlflow_client = MlflowClient(self._tracking_uri)
                found = client.get_experiment_by_name(self._experiment_name)
                name = self._experiment_name
                self._experiment_id = (
                    found.experiment_id if found else client.create_experiment(name, self._artifacts())
                )
        return self._mlflow_client

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, begun or continued on first use; None on other ranks than zero."""
        if rank_zero_only.rank != 0:
            return None
        if not self._initialized:
            self._begin()
        return self._run_id

    @property
    def tracking_uri(self) -> str:
        """Address of the store."""
        return self._tracking_uri

    @property
    def save_dir(self) -> str | None:
        """The run folder; None until training starts if it was not given."""
        if self._save_dir is None and self._trainer is not None:
            self._save_dir = self._trainer.default_root_dir
        return None if self._save_dir is None else str(self._save_dir)

    @property
    def name(self) -> str:
        """Empty: Lightning's checkpoint folder is save_dir/name/version/..., and a resume must find it."""
        return ""

    @property
    def version(self) -> str:
        """Empty, see `name`; the id of the run is `run_id`."""
        return ""

    @rank_zero_only
    def log_graph(self, model: LightningModule, input_array: Any = None) -> None:
        # Called by the Trainer before each of its runs. Only `trainer.ckpt_path` tells a resume from a fresh start, and
        # under FSDP2 it is set later than this: so keep the trainer and ask it when the run begins.
        self._trainer = model.trainer
        if self._initialized and self._is_fit():  # a second fit with this logger
            self._sets_status = True
            self.experiment.update_run(self._run_id, status="RUNNING")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Flatten to the names of the command line (`model.optimizer.lr`) and set what is not set yet.

        MLflow's parameters cannot change. A resume that differs leaves them and lists them in the tag
        `changed_params`.
        """
        flat = flatten_config(params if isinstance(params, Mapping) or params is None else vars(params))
        for key, value in flat.items():
            value = re.sub(r" at 0x[0-9a-f]+", "", mask_secrets(str(value)))  # addresses differ from run to run
            self._pending[re.sub(r"[^\w./: -]", "_", key)[:250]] = value[:6000]
        if self._initialized:
            self._flush_params()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._prefix:
            metrics = {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{k}": v for k, v in metrics.items()}
        # strictly rising: some stores take no second value of a key at the same step and millisecond
        self._timestamp = max(int(time.time() * 1000), self._timestamp + 1)
        entities = [
            Metric(re.sub(r"[^a-zA-Z0-9_/. -]+", "", k), float(v), self._timestamp, step or 0)
            for k, v in metrics.items()
            if not isinstance(v, str)
        ]
        run_id = self.run_id
        with self._survive("metrics"):
            self.experiment.log_batch(run_id, metrics=entities)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path = getattr(checkpoint_callback, "last_model_path", "") or checkpoint_callback.best_model_path
        if path:
            run_id = self.run_id
            with self._survive("the checkpoint's path"):
                self.experiment.set_tag(run_id, "checkpoint", str(Path(path).absolute()))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        if not self._initialized:
            if status != "success" or self._trainer is None:
                return
            self._begin()  # a run too short to log anything
        if not self._sets_status:
            return
        # Lightning says "failed" for a signal too; this is called while it handles the exception.
        error = sys.exc_info()[0]
        killed = error is not None and issubclass(error, (KeyboardInterrupt, SIGTERMException))
        # "finished" comes from Lightning's SLURM requeue alone: the job goes on in its next turn.
        names = {"success": "FINISHED", "finished": "SCHEDULED"}
        with self._survive("the status"):
            self.experiment.set_terminated(self._run_id, "KILLED" if killed else names.get(status, "FAILED"))

    # -- the suite's additions -------------------------------------------------------------------------------

    @rank_zero_only
    def log_image(self, key: str, image: torch.Tensor | np.ndarray | Image.Image, step: int) -> None:
        """Log an image or a grid under `key`: (B,3,H,W) or (3,H,W) in [-1, 1], uint8 array (H,W,3), or PIL."""
        if isinstance(image, torch.Tensor):
            image = image[None] if image.ndim == 3 else image
            image = grid(image, columns=math.ceil(math.sqrt(len(image))))
        run_id = self.run_id
        with self._survive(f"image {key}"):
            self.experiment.log_image(run_id, image, key=key, step=step)

    @rank_zero_only
    def log_text(self, text: str, artifact_file: str) -> None:
        """Log text as an artifact; secrets are masked."""
        run_id = self.run_id
        with self._survive(artifact_file):
            self.experiment.log_text(run_id, mask_secrets(text), artifact_file)

    @rank_zero_only
    def log_dataset(
        self, name: str, source: str, license: str, digest: str = "", context: str = "training", card: str = ""
    ) -> None:
        """Log the data of a run: their origin, license and card, and a digest of their contents."""
        about = {"uri": mask_secrets(source), "license": license, "card": card}
        digest = digest or hashlib.sha256(f"{name} {source}".encode()).hexdigest()  # MLflow wants one
        tags = [InputTag("mlflow.data.context", context)]
        tags += [InputTag(k, v[:500]) for k, v in (("license", license), ("card", card)) if v]
        run_id = self.run_id
        with self._survive(f"dataset {name}"):
            dataset = Dataset(name, digest[:36], "uri", json.dumps(about))
            self.experiment.log_inputs(run_id, [DatasetInput(dataset, tags)])

    # -- inner parts -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        client = self.experiment
        folder = Path(self.save_dir or ".")
        record = folder / RUN_FILE
        run = None
        if self._run_id is not None:
            run = client.get_run(self._run_id)
        elif self._trainer is not None and self._trainer.ckpt_path and record.exists():
            run_id = json.loads(record.read_text())["run_id"]
            try:
                run = client.get_run(run_id)
            except MlflowException:
                where = mask_secrets(self._tracking_uri)
                rank_zero_warn(f"MLflow run {run_id} of {record} is not in {where}: creating a new one.")
        if run is not None and run.info.lifecycle_stage == "deleted":
            rank_zero_warn(f"MLflow run {run.info.run_id} was deleted: creating a new one.")
            run = None

        if run is None:
            command = mask_secrets(shlex.join(sys.argv))
            tags = {**resolve_tags(), **git_tags(), "command": command, **self.tags}
            name = self._run_name or folder.resolve().name
            run = client.create_run(self._experiment_id, tags=tags, run_name=name)
        elif self._is_fit():
            client.update_run(run.info.run_id, status="RUNNING")
            count = int(run.data.tags.get("resume.count", 0)) + 1
            tags = {"resume.count": str(count)} | {f"resume.{k}": v for k, v in git_tags().items()}
            client.log_batch(run.info.run_id, tags=[RunTag(k, v) for k, v in tags.items()])
        else:
            # an evaluation of a run that may still be training: add to it, leave its status alone
            self._sets_status = False
        self._run_id, self._experiment_id = run.info.run_id, run.info.experiment_id
        self._initialized = True
        folder.mkdir(parents=True, exist_ok=True)
        contents = {"run_id": self._run_id, "experiment_id": self._experiment_id}
        contents |= {"experiment_name": self._experiment_name, "tracking_uri": mask_secrets(self._tracking_uri)}
        record.write_text(json.dumps(contents, indent=2) + "\n")
        self._flush_params()

    def _is_fit(self) -> bool:
        return self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING

    def _flush_params(self) -> None:
        pending, self._pending = self._pending, {}
        if not pending:
            return
        with self._survive("parameters"):
            run = self.experiment.get_run(self._run_id)
            there = run.data.params
            new = [Param(k, v) for k, v in pending.items() if k not in there]
            for n in range(0, len(new), 100):  # MLflow's largest batch
                self.experiment.log_batch(self._run_id, params=new[n : n + 100])
            changed = [f"{k}: {there[k]} -> {v}" for k, v in pending.items() if there.get(k, v) != v]
            if changed:
                lines = [line for line in [run.data.tags.get("changed_params"), *changed] if line]
                self.experiment.set_tag(self._run_id, "changed_params", "\n".join(lines)[-8000:])

    @contextmanager
    def _survive(self, what: str) -> Iterator[None]:
        try:
            yield
        except (MlflowException, OSError) as error:
            rank_zero_warn(f"MLflow did not accept {what}: {error}")

    def _database(self) -> Path | None:
        """Path of the sqlite file, if the store is one."""
        match = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", self._tracking_uri)
        return Path(match[1]).absolute() if match else None

    def _artifacts(self) -> str | None:
        database = self._database()
        if self._artifact_location or database is None:
            return self._artifact_location
        return (database.parent / "mlartifacts" / re.sub(r"[^\w.-]+", "_", self._experiment_name)).as_uri()

    def _store_lock(self) -> AbstractContextManager:
        logging.getLogger("alembic").setLevel(logging.WARNING)  # a line for each table of a fresh store
        database = self._database()
        if database is None:
            return nullcontext()
        database.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{database}.lock")


def git_tags() -> dict[str, str]:
    """Commit of this source tree and whether it has local changes, as MLflow tags; {} outside a checkout."""
    found = git_state()
    return {} if found is None else {"mlflow.source.git.commit": found[0], "git.dirty": str(found[1]).lower()}
