"""MLflow tracking: one run per training, through every resume of it."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import shlex
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from PIL import Image

from emmdit.config_text import flatten_config, mask_secrets
from emmdit.files import grid, resolved
from lightning_modules.mlflow_runs import curves
from lightning_modules.mlflow_sender import Sender
from lightning_modules.mlflow_store import connect, describe, git_tags, read_record, store_address, write_record

SHOWN_REMARKS = 5  # of a process; a store that refuses one metric refuses it at every step


class MLflowLogger(MLFlowLogger):
    """Lightning's MLFlowLogger with a real folder, runs that live through a resume, and a store that may fail.

    - Nothing waits for the store: what is logged goes to a journal in the run folder, and from there to MLflow in the
      background (`Sender`). While the store does not work, it waits in the journal: one warning says so. It is sent
      when the store is back, by this process, by the next resume or by `emmdit runs sync`.
    - The MLflow run begins when training does. If training resumes from a checkpoint and the run folder holds
      `mlflow_run.json`, that run is continued, else a new one is created and recorded there. Parameters may be
      logged before; log anything else from `on_train_start` on.
    - It ends as FINISHED, FAILED (an error) or KILLED (SIGTERM, Ctrl-C). A process killed without warning
      leaves RUNNING.
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
        self._run_name = run_name
        self._tracking_uri = store_address(tracking_uri)
        self._artifact_location = artifact_location
        self.tags = dict(tags or {})
        self._run_id = run_id
        self._prefix = prefix
        self._log_model = False
        self._checkpoint_callback = None
        self._trainer: Trainer | None = None
        self._pending: dict[str, str] = {}  # parameters logged before the run began
        self._run: dict[str, Any] | None = None  # once it has begun; see `find_or_create`
        self._sender: Sender | None = None  # while something is logged
        self._sets_status = True
        self._timestamp = 0
        self._warned = False
        self._remarks = 0

    # -- Lightning's interface ---------------------------------------------------------------------------------

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The MLflow client (a silent dummy on other ranks, or if the store does not work); it connects when used.

        Unlike the logger's own methods its calls wait for the store and raise its errors. Using it does not begin a
        run, `run_id` does.
        """
        return _LazyClient(self)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, begun or continued on first use; waits for the store.

        None on other ranks than zero, and while the store does not work.
        """
        if rank_zero_only.rank != 0:
            return None
        if self._sender is None and self._run is not None and self._run["run_id"]:
            return self._run["run_id"]
        return self._open().wait_for_run()

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
        if self._run is not None and self._is_fit():  # a second fit with this logger
            self._sets_status = True
            self._write({"status": "RUNNING"})

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
        if self._run is not None:
            self._write_params()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._prefix:
            metrics = {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{k}": v for k, v in metrics.items()}
        numbers = {re.sub(r"[^a-zA-Z0-9_/. -]+", "", k): float(v) for k, v in metrics.items() if not isinstance(v, str)}
        self._write({"metrics": numbers, "step": int(step or 0), "time": self._now()})

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path = getattr(checkpoint_callback, "last_model_path", "") or checkpoint_callback.best_model_path
        if path:
            self._write({"tags": {"checkpoint": str(Path(path).absolute())}})

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        if self._run is None and (status != "success" or self._trainer is None):
            return
        self._open()  # begins a run too short to log anything
        if self._sets_status:
            # Lightning says "failed" for a signal too; this is called while it handles the exception.
            error = sys.exc_info()[0]
            killed = error is not None and issubclass(error, (KeyboardInterrupt, SIGTERMException))
            # "finished" comes from Lightning's SLURM requeue alone: the job goes on in its next turn.
            names = {"success": "FINISHED", "finished": "SCHEDULED"}
            name = "KILLED" if killed else names.get(status, "FAILED")
            self._write({"status": name, "time": int(time.time() * 1000)}, always=True)
        sender, self._sender = self._sender, None
        sender.close()
        self._warn(sender)

    # -- the suite's additions -------------------------------------------------------------------------------

    @rank_zero_only
    def log_image(self, key: str, image: torch.Tensor | np.ndarray | Image.Image, step: int) -> None:
        """Log an image or a grid under `key`: (B,3,H,W) or (3,H,W) in [-1, 1], uint8 array (H,W,3), or PIL."""
        if isinstance(image, torch.Tensor):
            image = image[None] if image.ndim == 3 else image
            image = grid(image, columns=math.ceil(math.sqrt(len(image))))
        elif isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        data = io.BytesIO()
        image.save(data, "PNG", compress_level=1)
        entry = {"image": key, "step": int(step), "time": self._now(), "id": uuid.uuid4().hex}
        self._write(entry | {"data": base64.b64encode(data.getvalue()).decode()})

    @rank_zero_only
    def log_text(self, text: str, artifact_file: str) -> None:
        """Log text as an artifact; secrets are masked."""
        self._write({"text": artifact_file, "data": base64.b64encode(mask_secrets(text).encode()).decode()})

    @rank_zero_only
    def log_dataset(
        self, name: str, source: str, license: str, digest: str = "", context: str = "training", card: str = ""
    ) -> None:
        """Log the data of a run: their origin, license and card, and a digest of their contents."""
        digest = digest or hashlib.sha256(f"{name} {source}".encode()).hexdigest()  # MLflow wants one
        about = {"name": name, "digest": digest, "context": context}
        self._write({"dataset": about | {"uri": mask_secrets(source), "license": license, "card": card}})

    def history(self, names: Iterable[str]) -> dict[str, dict[int, float]]:
        """{step: value} of metrics of this run, as far as the store answers; and what waits for it."""
        sender = self._open()
        sender.flush()
        return curves(self.experiment if sender.run_id and not sender.failing else None, sender, names)

    @property
    def waiting(self) -> Path | None:
        """The journal, if there is something in it that has not been sent."""
        return None if self._sender is None or self._sender.all_sent else self._sender.journal

    # -- inner parts -----------------------------------------------------------------------------------------

    @property
    def run(self) -> dict[str, Any] | None:
        """What the run is found by, for other processes that log to it; begun on first use, None on other ranks."""
        if rank_zero_only.rank == 0:
            self._open()
        return self._run

    def _write(self, entry: Mapping[str, Any], always: bool = False) -> None:
        sender = self._open()
        sender.append(entry, always)
        self._warn(sender)

    def _open(self) -> Sender:
        if self._sender is None:
            resumed = self._begin() if self._run is None else False
            where = self._tracking_uri, self._run, self._folder, self._artifact_location
            self._sender = Sender(*where, on_run=self._found)
            if resumed and self._is_fit():
                self._sender.append({"resumed": uuid.uuid4().hex, "tags": git_tags()}, always=True)
            self._write_params()
        return self._sender

    def _begin(self) -> bool:
        """Determine the run; whether it is one that exists."""
        record = None
        if self._run_id is None and self._trainer is not None and self._trainer.ckpt_path:
            try:
                record = read_record(self._folder)
            except ValueError as error:
                rank_zero_warn(f"{error} This training logs to a new MLflow run.")
        found = {"run_id": self._run_id} if self._run_id else record or {}
        command = mask_secrets(shlex.join(sys.argv))
        tags = {key: mask_secrets(value) for key, value in resolve_tags().items()}
        self._run = {
            "uid": found.get("uid") or uuid.uuid4().hex,
            "run_id": found.get("run_id"),
            "tracking_uri": found.get("tracking_uri"),
            "experiment": self._experiment_name,
            "name": self._run_name or resolved(self._folder).name,
            "tags": {**tags, **git_tags(), "command": command, **self.tags},
            "start_time": int(time.time() * 1000),
        }
        # an evaluation of a run that may still be training: add to it, leave its status alone
        self._sets_status = not found or self._is_fit()
        self._record()
        return bool(found)

    def _found(self, run: Any) -> None:
        self._run["run_id"] = run.info.run_id
        self._record(run.info)

    def _record(self, info: Any = None) -> None:
        try:
            write_record(self._folder, self._run, self._tracking_uri, info)
        except OSError as error:
            rank_zero_warn(f"mlflow_run.json cannot be written ({error}): a resume will log to a new MLflow run.")

    @property
    def _folder(self) -> Path:
        return Path(self.save_dir or ".")

    def _now(self) -> int:
        # strictly rising: some stores take no second value of a key at the same step and millisecond
        self._timestamp = max(int(time.time() * 1000), self._timestamp + 1)
        return self._timestamp

    def _is_fit(self) -> bool:
        return self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING

    def _write_params(self) -> None:
        pending, self._pending = self._pending, {}
        if pending:
            self._write({"params": pending}, always=True)

    def _warn(self, sender: Sender) -> None:
        """Say once that the store does not work; in the training's thread, between two lines of its progress."""
        remarks, sender.remarks = sender.remarks, []
        for remark in remarks[: SHOWN_REMARKS - self._remarks]:
            rank_zero_warn(remark)
        self._remarks = min(self._remarks + len(remarks), SHOWN_REMARKS)
        closed_with_rest = self._sender is None and sender.left
        if (sender.trouble or closed_with_rest) and not self._warned:
            self._warned = True
            rank_zero_warn(sender.message(self._folder))


class _LazyClient:
    """An MLflow client that connects on first use; without a store its methods do nothing."""

    def __init__(self, logger: MLflowLogger) -> None:
        self._logger = logger
        self._client: MlflowClient | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            client = self._client = self._client or connect(self._logger.tracking_uri)
        except Exception as error:  # of any library below MLflow
            rank_zero_warn(f"MLflow's {name} was left out: {describe(error)}")
            return lambda *args, **kwargs: None
        return getattr(client, name)
