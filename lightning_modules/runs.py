"""Run folders: the configuration of a training, and the module that it describes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse._common import parsing_settings
from jsonargparse._util import import_object
from lightning.pytorch import LightningModule

from emmdit.bounded import Unfit
from emmdit.config_text import read_yaml, resolve_references
from emmdit.legacy import modernize_run
from emmdit.weights import run_folder
from lightning_modules.commands.config_errors import sentence

# Packages whose classes the configuration of a run folder may name: such a folder may come from anyone.
TRUSTED = ("emmdit", "lightning_modules", "datamodules", "torch", "lightning", "diffusers", "transformers")
LONGEST = 400  # characters of what a parser says


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run that a run folder or a checkpoint belongs to.

    Raises:
        FileNotFoundError, ValueError: with one sentence, where it is missing, broken, or not of a run.
    """
    file = latest_config(run_folder(path))
    try:
        config = resolve_references(read_yaml(file))
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    _check_config(config, file)
    return modernize_run(config)


def _check_config(config: dict[str, Any], file: Path) -> None:
    """Raise ValueError unless all that the commands read themselves has its type; jsonargparse checks the rest."""

    def section(parent: Any, key: str, needed: bool = True, where: str = "") -> dict[str, Any]:
        found = parent.get(key)
        if not (isinstance(found, dict) or (found is None and not needed)):
            told = "has no" if found is None else f"has {str(found)[:40]!r} as"
            raise ValueError(f"{file} {told} {where}{key}, not a section of keys: restore the run's own file.")
        return found or {}

    def described(parent: Any, key: str, where: str = "model.init_args.") -> dict[str, Any]:
        found = section(parent, key, where=where)
        if not isinstance(found.get("class_path"), str):
            raise ValueError(f"{file}: {where}{key} has no class_path: restore the run's own file.")
        found["init_args"] = section(found, "init_args", needed=False, where=f"{where}{key}.")
        return found["init_args"]

    arguments = described(config, "model", where="")
    for key in ("denoiser", "codec", "text"):
        described(arguments, key)
    components = arguments.get("components") or []
    if not isinstance(components, list):
        raise ValueError(f"{file}: model.init_args.components must be a list, not {str(components)[:40]!r}.")
    for number, component in enumerate(components):
        described({str(number): component}, str(number), "model.init_args.components.")
    for key in ("data", "trainer", "checkpoint"):
        section(config, key, needed=False)
    seed = config.get("seed_everything")
    if not isinstance(seed, int | None):
        raise ValueError(f"{file}: seed_everything must be a whole number, not {str(seed)[:40]!r}.")


def latest_config(folder: str | Path) -> Path:
    """The config a run folder was last trained with.

    Raises:
        FileNotFoundError: the folder has none.
    """
    existing = numbered_configs(Path(folder))
    if not existing:
        raise FileNotFoundError(f"{folder} has no config.yaml: name the folder of a run.")
    return existing[-1][1]


def numbered_configs(folder: Path) -> list[tuple[int, Path]]:
    """(n, path) of config.yaml (0) and config-<n>.yaml, by n."""
    found = ((re.fullmatch(r"config(?:-(\d+))?\.yaml", path.name), path) for path in folder.glob("config*.yaml"))
    return sorted((int(match[1] or 0), path) for match, path in found if match)


def build_module(config: dict[str, Any], source: str | Path = "", trust_code: bool = False) -> LightningModule:
    """The LightningModule that a run's config describes, without its network.

    Args:
        source: file that the config was read from, for messages.
        trust_code: the config may name any class; otherwise those of the packages in `TRUSTED`, and nothing else is
            imported.

    Raises:
        ValueError: with one sentence.
    """
    if not trust_code:
        for path in class_paths(config["model"]):
            if path.partition(".")[0] not in TRUSTED and "." in path:
                raise ValueError(_refusal(path, source))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    with nullcontext() if trust_code else trusted_imports():
        try:
            parsed = parser.parse_object({"model": config["model"]})
        except Exception as error:
            if denied := re.search(r"Importing '([\w.]+)' is not allowed", str(error)):
                raise ValueError(_refusal(denied[1], source)) from error
            raise ValueError(_misfit(error, source)) from error
        if not trust_code:
            _refuse_functions(parsed.model.as_dict(), source)
        try:
            return instantiate(parser, parsed).model
        except Unfit:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
            raise ValueError(_misfit(error, source)) from error


def class_paths(config: Any) -> Iterator[str]:
    """The values of all keys `class_path` in a configuration."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if str(key).rpartition(".")[2] == "class_path" and isinstance(value, str):
            yield value
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list | tuple) else ():
        yield from class_paths(value)


def _refuse_functions(parsed: Any, source: str | Path) -> None:
    """Raise a ValueError where the parsed config names a function in place of a class.

    jsonargparse takes functions where it looks for something to call, and calls them with the config's arguments: the
    packages in `TRUSTED` have functions that download and run code. `parsed` has what strings and files in the config
    stood for.
    """
    named = [*class_paths(parsed), *_functions(parsed)]
    for path in named:
        found = import_object(path) if isinstance(path, str) and "." in path else path
        if not isinstance(found, type | str):
            name = path if isinstance(path, str) else f"{path.__module__}.{getattr(path, '__qualname__', path)}"
            raise ValueError(
                f"{source or 'The configuration'} names {name}, which is no class: opening the run would call it; if "
                "you trust it, add --trust_code."
            )


def _functions(parsed: Any) -> Iterator[Any]:
    for value in parsed.values() if isinstance(parsed, dict) else parsed if isinstance(parsed, list | tuple) else ():
        if inspect.isroutine(value):
            yield value
        yield from _functions(value)


@contextmanager
def trusted_imports() -> Iterator[None]:
    """jsonargparse imports from the packages in `TRUSTED` alone, also where a bare string stands for a class.

    It looks at where an object was defined, too, so `emmdit.files.os.system` is none of emmdit. Its own call,
    `set_parsing_settings`, cannot be undone, and would hold for the user's own files.
    """
    before = parsing_settings.copy()
    parsing_settings.update(
        import_path_verdicts={"*": False, **dict.fromkeys(TRUSTED, True)},
        import_paths_enforced=True,
        instantiate_subclass_spec_in_any=False,  # a class of torch where an argument has no type to check it by
    )
    try:
        yield
    finally:
        parsing_settings.update(before)


def _misfit(error: Exception, source: str | Path) -> str:
    told = " ".join(sentence(error).split())
    told = told if len(told) <= LONGEST else f"{told[:LONGEST]} ..."
    return f"{source or 'The configuration'} does not fit this version of the suite ({told.rstrip('.')}): correct it."


def _refusal(path: str, source: str | Path) -> str:
    return (
        f"{source or 'The configuration'} names {path}, which belongs to none of {', '.join(TRUSTED)}: opening the run "
        "would run that code; if you trust it, add --trust_code."
    )


def instantiate(parser: ArgumentParser, parsed: Namespace) -> Namespace:
    """Build the classes that a parsed configuration names; jsonargparse 4.49 renamed the call."""
    return parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
