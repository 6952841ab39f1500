"""MLflow store: its address, a connection that fails soon, the run in it, and delivery of journal entries to it."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from filelock import FileLock  # a requirement of torch
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from emmdit.config_text import mask_secrets
from emmdit.data.images import open_image
from emmdit.files import atomic_path, parse_json
from emmdit.provenance import git_state

RUN_FILE = "mlflow_run.json"
DEFAULT_STORE = "sqlite:///mlflow.db"  # also the default of `mlflow ui`
UID_TAG = "emmdit.uid"  # how a run is found whose creation was not acknowledged
REQUESTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # unless the user sets them
LOCKED_SECONDS = 10.0  # how long a locked sqlite file may take until it counts as unreachable
LOG_LEVELS = {
    "alembic": logging.WARNING,  # a line for each table of a fresh store
    "mlflow.store.db.utils": logging.CRITICAL,  # a traceback for each error that is raised as well
    "urllib3.connectionpool": logging.ERROR,
}


def store_address(tracking_uri: str | None = None) -> str:
    """The user's store: the address given, `MLFLOW_TRACKING_URI`, or sqlite in the working folder.

    What a run folder says about its store never comes in here: it may be a stranger's.
    """
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def database_file(tracking_uri: str) -> Path | None:
    """Path of the sqlite file, if the store is one."""
    match = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", tracking_uri)
    return Path(match[1]).absolute() if match else None


def connect(tracking_uri: str) -> MlflowClient:
    """A client of a store; of a database its tables exist.

    Processes that set up a fresh sqlite store at once break it, so this is done under a file lock. MLflow would try a
    damaged or locked file for minutes, so it is looked at first.

    Raises:
        OSError, sqlite3.Error, MlflowException, and what sqlalchemy, alembic and requests raise.
    """
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    database = database_file(tracking_uri)
    if database is None:
        return MlflowClient(tracking_uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock", timeout=3 * LOCKED_SECONDS):
        if database.exists() and database.stat().st_size:
            address = f"file:{quote(str(database))}?mode=rw"
            connection = sqlite3.connect(address, uri=True, timeout=LOCKED_SECONDS, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            finally:
                connection.close()
        return MlflowClient(tracking_uri)


@contextmanager
def short_requests() -> Iterator[None]:
    """MLflow gives a request up soon and does not repeat it: whoever calls does. The user's own settings stand."""
    ours = {key: value for key, value in REQUESTS.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)


def describe(error: BaseException) -> str:
    """What went wrong, on one short line without secrets: what the system or sqlite said, if they are behind it."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    chain = [one for one in reversed(chain) if isinstance(one, OSError | sqlite3.Error) and str(one)] + [error]
    text = " ".join(mask_secrets(str(chain[0])).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


# -- the record in the run folder ---------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any] | None:
    """`mlflow_run.json` of a run folder; None if there is none.

    Raises:
        ValueError: it is damaged or something else, in one sentence.
    """
    path = folder / RUN_FILE
    try:
        text = path.read_bytes()[: 1 << 16]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): remove it, then a new MLflow run is made."
        ) from None
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    ids = [found.get(key) for key in ("run_id", "uid")] if isinstance(found, dict) else [None]
    if not any(ids) or not all(one is None or _plain_id(one) for one in ids):
        raise ValueError(f"{path} names no MLflow run (it is empty, cut short or something else): remove it.")
    return found


def write_record(folder: Path, run: Mapping[str, Any], tracking_uri: str, info: Any = None) -> None:
    """Write `mlflow_run.json`: the run of this folder, `info` once it is known to the store."""
    contents = {"run_id": info.run_id if info else run.get("run_id"), "uid": run["uid"]}
    contents |= {"experiment_id": info.experiment_id if info else None, "experiment_name": run["experiment"]}
    with atomic_path(folder / RUN_FILE) as part:
        part.write_text(json.dumps(contents | {"tracking_uri": mask_secrets(tracking_uri)}, indent=2) + "\n")


def _plain_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value) is not None


# -- the run ------------------------------------------------------------------------------------------------------


def find_or_create(
    client: MlflowClient, run: Mapping[str, Any], tracking_uri: str, artifact_location: str | None, create: bool = True
) -> tuple[Run, str]:
    """The run that a journal's header describes, and a remark if it is not the one expected.

    Looked for in turn: `run_id`, a run with the tag `uid`, and the same of another run, `of`, to which the entries
    are rather added. If none is there, it is created, with name, tags, start and parameters as in the header.

    Raises:
        LookupError: it is not there and is not to be created.
    """
    name = _text(run.get("experiment"), 200) or "emmdit"
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else None
    remark = ""
    for wanted in (run.get("of"), run):
        if not isinstance(wanted, Mapping):
            continue
        if _plain_id(run_id := wanted.get("run_id")):
            found = _get(client, run_id)
            if found is not None and found.info.lifecycle_stage != "deleted":
                return found, ""
            remark = f"MLflow run {run_id} {'was deleted from' if found else 'is not in'} {mask_secrets(tracking_uri)}"
            other = _text(wanted.get("tracking_uri"), 200)
            if found is None and other and other != mask_secrets(tracking_uri):
                remark += f" (it was made in {other!r}: to report there, set MLFLOW_TRACKING_URI to it)"
        if experiment_id is not None and _plain_id(uid := wanted.get("uid")):
            known = client.search_runs([experiment_id], f"tags.`{UID_TAG}` = '{uid}'", max_results=1)
            if known:
                return known[0], remark and f"{remark}: run {known[0].info.run_id} goes on."
    if not create:
        raise LookupError(f"{mask_secrets(tracking_uri)} does not have the run yet")
    if experiment_id is None:
        try:
            experiment_id = client.create_experiment(name, artifact_location or _artifacts(tracking_uri, name))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process was faster
            if experiment is None:
                raise
            experiment_id = experiment.experiment_id
    tags = {**_texts(run.get("tags"), 5000), UID_TAG: run["uid"]}
    start = run.get("start_time") if _whole(run.get("start_time")) else None
    made = client.create_run(experiment_id, start_time=start, tags=tags, run_name=_text(run.get("name"), 200))
    if params := _texts(run.get("params"), 500):
        client.log_batch(made.info.run_id, params=[Param(key, value) for key, value in params.items()])
    if run.get("status") == "FINISHED":
        client.set_terminated(made.info.run_id)
    return made, remark and f"{remark}: run {made.info.run_id} is new."


def _get(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _artifacts(tracking_uri: str, experiment: str) -> str | None:
    """Where the artifacts of a new experiment go: with sqlite beside the database, else the server's choice."""
    database = database_file(tracking_uri)
    name = re.sub(r"[^\w.-]+|^\.+", "_", experiment)
    return None if database is None else (database.parent / "mlartifacts" / name).as_uri()


def git_tags() -> dict[str, str]:
    """Commit of this source tree and whether it has local changes, as MLflow tags; {} outside a checkout."""
    found = git_state()
    return {} if found is None else {"mlflow.source.git.commit": found[0], "git.dirty": str(found[1]).lower()}


# -- delivery -----------------------------------------------------------------------------------------------------


def deliver(client: MlflowClient, run_id: str, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Send journal entries, in order; metrics in batches. Doing it twice does no harm.

    Returns:
        What the store refuses for good, a sentence each: it is left out.

    Raises:
        Exception: the store cannot be reached or does not work; all of the entries are to be sent again.
    """
    refused: list[str] = []
    metrics: list[Metric] = []

    def attempt(what: str, call: Any, *args: Any, **kwargs: Any) -> bool:
        try:
            call(*args, **kwargs)
        except MlflowException as error:
            # sqlalchemy's errors, too, bear BAD_REQUEST; and a deleted run is no fault of the entry
            if error.error_code != "INVALID_PARAMETER_VALUE" or client.get_run(run_id).info.lifecycle_stage != "active":
                raise
            refused.append(f"MLflow did not accept {what}: {describe(error)}")
            return False
        return True

    def send_metrics() -> None:
        for n in range(0, len(metrics), 1000):  # MLflow's largest batch
            batch = metrics[n : n + 1000]
            before = len(refused)
            if not attempt("metrics", client.log_batch, run_id, metrics=batch):
                del refused[before:]
                for metric in batch:
                    attempt(f"metric {metric.key}", client.log_batch, run_id, metrics=[metric])
        metrics.clear()

    for entry in entries:
        kind = next(iter(entry), None)
        if kind == "metrics":
            metrics += _metrics(entry)
        elif kind in _SENDERS:
            send_metrics()
            attempt(kind, _SENDERS[kind], client, run_id, entry)
        else:
            refused.append(f"The journal has an entry of an unknown kind, {str(kind)[:40]!r}.")
    send_metrics()
    return refused


def _metrics(entry: Mapping[str, Any]) -> list[Metric]:
    step, when = entry.get("step"), entry.get("time")
    if not isinstance(entry["metrics"], Mapping) or not _whole(step) or not _whole(when):
        return []
    numbers = entry["metrics"].items()
    return [Metric(key[:250], float(v), when, step) for key, v in numbers if type(v) is float or _whole(v)]


def _send_params(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    """Set what is not set yet; parameters cannot change, so a difference goes into the tag `changed_params`."""
    params = _texts(entry["params"], 6000)
    run = client.get_run(run_id)
    there = run.data.params
    new = [Param(key, value) for key, value in params.items() if key not in there]
    for n in range(0, len(new), 100):  # MLflow's largest batch
        client.log_batch(run_id, params=new[n : n + 100])
    changed = [f"{key}: {there[key]} -> {value}" for key, value in params.items() if there.get(key, value) != value]
    known = run.data.tags.get("changed_params", "")
    changed = [line for line in changed if line not in known.splitlines()]
    if changed:
        client.set_tag(run_id, "changed_params", "\n".join([line for line in [known, *changed] if line])[-8000:])


def _send_tags(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    tags = [RunTag(key, value) for key, value in _texts(entry["tags"], 5000).items()]
    for n in range(0, len(tags), 100):
        client.log_batch(run_id, tags=tags[n : n + 100])


def _send_resumed(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    """A resume of the run, counted once."""
    known = client.get_run(run_id).data.tags
    resume = _text(entry["resumed"], 64)
    if known.get("resume.id") == resume:
        return
    client.update_run(run_id, status="RUNNING")
    count = known.get("resume.count", "")
    count = int(count) + 1 if count.isdecimal() else 1
    tags = {f"resume.{key}": value for key, value in _texts(entry.get("tags"), 5000).items()}
    _send_tags(client, run_id, {"tags": tags | {"resume.count": str(count), "resume.id": resume}})


def _send_status(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    status = entry["status"]
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    elif status in ("FINISHED", "FAILED", "KILLED", "SCHEDULED"):
        client.set_terminated(run_id, status, entry.get("time") if _whole(entry.get("time")) else None)


def _send_dataset(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    about = _texts(entry["dataset"], 5000)
    tags = [InputTag("mlflow.data.context", about.get("context", "training"))]
    tags += [InputTag(key, about[key][:500]) for key in ("license", "card") if about.get(key)]
    source = json.dumps({key: about.get(key, "") for key in ("uri", "license", "card")})
    dataset = Dataset(about.get("name", "")[:500], about.get("digest", "")[:36], "uri", source)
    client.log_inputs(run_id, [DatasetInput(dataset, tags)])


def _send_text(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    file = PurePosixPath(_text(entry["text"], 200))
    if file.is_absolute() or ".." in file.parts or re.search(r"[^\w./ -]", str(file)) or not file.name:
        raise MlflowException.invalid_parameter_value(f"{str(file)!r} is no name of an artifact")
    client.log_text(run_id, _bytes(entry).decode(errors="replace"), str(file))


def _send_image(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
    """As `MlflowClient.log_image` does, but under a name that is the same each time it is sent."""
    key, number = _text(entry["image"], 200), _text(entry.get("id"), 64)
    step, when = entry.get("step"), entry.get("time")
    if not re.fullmatch(r"[\w\-./ ]+", key, re.ASCII) or not _plain_id(number) or not _whole(step) or not _whole(when):
        raise MlflowException.invalid_parameter_value(f"{key!r} is no name of an image")
    name = f"{key.replace('/', '~')}+step+{step}+timestamp+{when}+{number}"
    data = _bytes(entry)
    with tempfile.TemporaryDirectory() as folder:
        try:
            preview = open_image(data)
            preview.thumbnail((256, 256))
            preview.save(Path(folder, f"{name}+compressed.webp"))
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(f"image {key} cannot be read: {error}") from error
        Path(folder, f"{name}.png").write_bytes(data)
        client.log_artifacts(run_id, folder, "images")
    client.set_tag(run_id, "mlflow.loggedImages", "True")


_SENDERS = {
    "params": _send_params,
    "tags": _send_tags,
    "resumed": _send_resumed,
    "status": _send_status,
    "dataset": _send_dataset,
    "text": _send_text,
    "image": _send_image,
}


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 53


def _text(value: Any, length: int) -> str:
    return value.replace("\0", "")[:length] if isinstance(value, str) else ""


def _texts(values: Any, length: int) -> dict[str, str]:
    """The pairs of strings in a mapping that may be anything."""
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {key[:250]: _text(value, length) for key, value in pairs if isinstance(value, str) and key}


def _bytes(entry: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(entry.get("data", ""), validate=True)
    except (ValueError, TypeError) as error:
        raise MlflowException.invalid_parameter_value("its data is damaged") from error
