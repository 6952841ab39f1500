"""The `emmdit` command: dispatch and usage.

A subcommand `like-this` is the function `like_this` in `like_this.py` beside this file, imported when it is called.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from lightning_modules.commands.config_errors import USER_ERRORS, one_line, sentence
from lightning_modules.commands.ranks import end_with_rank_zero

LIGHTNING = ("fit", "validate")  # subcommands of LightningCLI, see fit.py
COMMANDS = {
    "sample": 'images:  emmdit sample --ckpt assets/shapes_emmdit --prompt "a photo of a red circle" --out out',
    "export": "a checkpoint as a diffusers folder that TextToImagePipeline.from_pretrained loads",
    "import-nitro-e": "a released Nitro-E .safetensors file as such a folder",
    "evaluate": "FID, CLIP score, GenEval:  emmdit evaluate --ckpt RUN -c experiments/evaluation/shapes.yaml",
    "reference-stats": "statistics of real images, which FID, KID and CMMD compare with",
    "precompute": "images to latents on disk:  emmdit precompute -c experiments/data/pd12m.yaml \\\n"
    + " " * 19
    + "-c experiments/precompute/dcae_512.yaml -c experiments/trainer/ddp_8gpu.yaml --out latents/pd12m",
    "generate-dataset": "a dataset of images for a list of prompts, by any text-to-image pipeline",
    "runs": "what waits in a run's journal to MLflow, after it was out of reach:  emmdit runs sync [RUN ...]",
    "inspect-data": "sizes, caption lengths, buckets, rejected rows and a contact sheet of a source or latents folder",
}
USAGE = """usage: emmdit COMMAND [options]

commands:
  fit              train:  emmdit fit -c experiments/quickstart.yaml
  validate         validation loss of a checkpoint
{commands}

`emmdit COMMAND --help` lists the options of a command. Several -c files are merged, the later ones win.
""".format(commands="\n".join(f"  {name:<16} {text}" for name, text in COMMANDS.items()))


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command; a user's errors end in one sentence and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    quiet()
    end_with_rank_zero()
    threading.excepthook = _thread_failed
    command, arguments = argv[0], normalized(argv[1:])
    try:
        if command in COMMANDS:
            name = command.replace("-", "_")
            with ends_on_sigterm():
                getattr(import_module(f"lightning_modules.commands.{name}"), name)(arguments)
        elif command in LIGHTNING:
            from lightning_modules.commands.fit import SuiteCLI

            SuiteCLI(args=[command, *arguments], exit_on_error=False)
        else:
            raise ValueError(f"There is no command {command!r}: emmdit --help lists them.")
    except KeyboardInterrupt:
        print(f"\nemmdit {command}: interrupted.", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        sys.exit(_status(end))
    except Exception as error:
        if os.environ.get("EMMDIT_TRACEBACK") or not isinstance(error, _user_errors()):
            raise
        print(f"emmdit {command}: {sentence(error)}\n(EMMDIT_TRACEBACK=1 shows where.)", file=sys.stderr)
        sys.exit(2)


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as an error does, so that what is half written is removed; exit status 143."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def normalized(arguments: list[str]) -> list[str]:
    """`--like-this` as `--like_this`, up to the first dot of a dotted key. Values, and all behind `--`, are kept."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_normalized(argument) for argument in arguments[:end]] + arguments[end:]


def _normalized(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument[2:].partition("=")
    name, dot, key = option.partition(".")
    return f"--{name.replace('-', '_')}{dot}{key}{equals}{value}"


def _status(end: SystemExit) -> int | str | None:
    """Exit status, not zero where Lightning left its loop because of a signal."""
    if isinstance(end.__context__, KeyboardInterrupt):
        return 130
    return 143 if type(end).__name__ == "SIGTERMException" and end.code is None else end.code


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A line in place of the traceback: what runs in a thread here (system metrics, sending to a tracker) can fail."""
    if os.environ.get("EMMDIT_TRACEBACK"):
        threading.__excepthook__(failure)
    elif failure.exc_value is not None:
        name = failure.thread.name if failure.thread else "?"
        print(f"The thread {name} failed: {one_line(failure.exc_value)}", file=sys.stderr)


def _user_errors() -> tuple[type[BaseException], ...]:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # takes seconds, so only on an error
    from torch.distributed import DistNetworkError

    return *USER_ERRORS, MisconfigurationException, DistNetworkError


def quiet() -> None:
    """Silence what the libraries log at every start and no user can act on."""
    for message in (
        ".*does not have many workers.*",
        ".*args parameter is intended to run from within Python.*",
        ".*You are using `torch.load` with.*",
        ".*exists and is not empty.*",  # a used run folder is refused, or resumed
        ".*module\\(s\\) in eval mode at the start of training.*",  # the EMA copy, on purpose
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("mlflow.store", "mlflow.system_metrics", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
