"""`emmdit runs`: the MLflow side of runs. `emmdit runs sync` sends what waited while the store did not work."""

from __future__ import annotations

from pathlib import Path

from emmdit.config_text import mask_secrets
from lightning_modules.commands.options import command_parser
from lightning_modules.mlflow_journal import Journal, JournalInUse, find_journals
from lightning_modules.mlflow_sender import limits_of
from lightning_modules.mlflow_store import (
    connect,
    deliver,
    describe,
    find_or_create,
    read_record,
    short_requests,
    store_address,
    write_record,
)

FOLDERS = ("runs", "evaluations")  # where the suite's commands put what they make


def runs(argv: list[str]) -> None:
    """Send to MLflow what waits in the journals of runs and evaluations."""
    parser = command_parser(runs)
    parser.add_argument("action", choices=["sync"], help="sync: send the journals, and remove what was sent")
    help_ = "run folders, or folders above them; runs/ and evaluations/ by default"
    parser.add_argument("folders", nargs="*", help=help_)
    help_ = "address of the store; MLFLOW_TRACKING_URI, or sqlite in the working folder, by default"
    parser.add_argument("--tracking_uri", help=help_)
    args = parser.parse_args(argv)
    folders = [Path(name) for name in args.folders or FOLDERS]
    for folder in folders:
        if args.folders and not folder.exists():
            raise FileNotFoundError(f"There is no run folder {folder}: name the folder that the training wrote.")
    journals = [path for folder in folders for path in find_journals(folder)]
    if not journals:
        print(f"Nothing waits for MLflow in {', '.join(map(str, folders))}.")
    problems: list[str] = []
    for path in journals:
        try:
            with short_requests():
                print(sync(path, store_address(args.tracking_uri)), flush=True)
        except JournalInUse as error:
            print(f"{error}: a running process sends it itself.", flush=True)
        except StoreError:
            raise  # the next one would fail as well
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


class StoreError(OSError):
    """The store does not take a journal; in one sentence."""


def sync(path: Path, tracking_uri: str) -> str:
    """Send a journal and remove it; what was done, in a sentence.

    Raises:
        JournalInUse: a running training or evaluation sends it itself.
        OSError, ValueError: it cannot be read, or is no journal.
        StoreError: the store does not take it; what was not sent stays.
    """
    where = mask_secrets(tracking_uri)
    journal = Journal(path, **limits_of(path))
    sent, refused, done = 0, [], False
    try:
        run = journal.header["run"]
        try:
            client = connect(tracking_uri)
            found, remark = find_or_create(client, run, tracking_uri, None)
            _record(path.parent, run, tracking_uri, found.info)
            while True:
                entries, mark = journal.pending()
                if entries:
                    refused += deliver(client, found.info.run_id, entries)
                journal.sent(mark)
                sent += len(entries)
                done = not entries
                if done:
                    break
        except Exception as error:  # of any library below MLflow
            raise StoreError(f"MLflow at {where} does not take {path} ({describe(error)}): it waits there.") from error
    finally:
        journal.close(keep=not done)
    said = f"{path}: {sent} entries sent to run {found.info.run_id} in {where}."
    said += f" {remark}" if remark else ""
    said += f" {journal.skipped} damaged lines were left out." if journal.skipped else ""
    return " ".join([said, *refused[:3], *([f"{len(refused) - 3} more were refused."] if len(refused) > 3 else [])])


def _record(folder: Path, run: dict, tracking_uri: str, info: object) -> None:
    """Write the id of a run that began without the store into its folder, so that a resume goes on in it."""
    try:
        known = read_record(folder)
    except ValueError:
        return  # damaged: the next resume says so
    if known is not None and known.get("uid") == run["uid"] and known.get("run_id") != info.run_id:
        known = {"uid": run["uid"], "experiment": str(known.get("experiment_name"))}
        write_record(folder, known, tracking_uri, info)
