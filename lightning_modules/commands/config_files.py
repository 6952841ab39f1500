"""Config files on the command line: `-c` options, the base files that a config names, and the default run folder."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from emmdit.config_text import REFERENCE, key_lines, read_yaml
from emmdit.files import resolved

OPTIONS = ("-c", "--config")
BASE = re.compile(r"^base:[^\n]*\n?(?:(?:[ \t]+|-)[^\n]*\n?)*", re.MULTILINE)  # with the items of a block list


class ConfigParser(LightningArgumentParser):
    """A parser whose YAML files may name the files they are laid over: `base: ../shapes/emmdit.yaml`, or a list.

    A base is relative to the file that names it, may name bases itself, and is parsed as if it had been given with `-c`
    just before. The key is gone from the parsed configuration, so that a saved one is complete by itself.
    """

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        return super().parse_args(with_bases(sys.argv[1:] if args is None else args), *more, **kwargs)

    def parse_string(self, content: str, *more: Any, **kwargs: Any) -> Any:
        return super().parse_string(BASE.sub("", content), *more, **kwargs)


def config_files(arguments: Sequence[str]) -> list[str]:
    """The files given with -c or --config (the parsed configuration does not keep their names)."""
    split = [part for argument in arguments for part in _split(argument)]
    return [file for option, file in itertools.pairwise(split) if option in OPTIONS]


def _split(argument: str) -> list[str]:
    """-c=FILE, --config=FILE and -cFILE as -c FILE; everything else as it is."""
    option, equals, file = argument.partition("=")
    if equals and option in OPTIONS:
        return [option, file]
    return ["-c", argument[2:]] if re.match("-c.", argument) else [argument]


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The arguments with each config file preceded by its bases, except those that stand before it already.

    Raises:
        ValueError: a base does not exist, or a file is a base of itself.
    """
    seen: set[Path] = set()
    expanded: list[str] = []
    given = [part for argument in arguments for part in _split(argument)]
    for option, argument in zip(["", *given], given, strict=False):
        if option in OPTIONS:
            path = resolved(argument)
            bases = [part for base in _bases(path, (path,), seen) for part in (option, str(base))]
            expanded[-1:] = [*bases, option]
            seen.add(path)
        expanded.append(argument)
    return expanded


def _bases(file: Path, chain: tuple[Path, ...], seen: set[Path]) -> list[Path]:
    """The bases of `file`, the lowest first, without those in `seen`, to which they are added."""
    found = []
    for name in named_bases(file):
        base = resolved(file.parent / name)
        if base in chain:
            raise ValueError(f"{file} and its base {name} are each laid over the other: remove one `base`.")
        if not base.is_file():
            raise ValueError(f"{file} names the base {name}, but there is no {base}: correct its `base`.")
        if base not in seen:
            found += [*_bases(base, (*chain, base), seen), base]
            seen.add(base)
    return found


def named_bases(file: Path) -> list[str]:
    """The value of `base` in a YAML file.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or no mapping in YAML, with its name and the line.
    """
    found = read_yaml(file).get("base")
    found = [found] if isinstance(found, str) else found or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file}: `base` must be the path of a YAML file or a list of paths, not {found!r}.")
    return found


# -- configs that runs have saved ----------------------------------------------------------------------------------


def is_run_config(file: str | Path) -> bool:
    """Whether a file is the configuration that a run saved, in its own folder."""
    path = Path(file)
    named = re.fullmatch(r"config(-\d+)?\.yaml", path.name) and path.is_file()
    return bool(named) and {"ckpt_path", "model", "data", "trainer"} <= read_yaml(path).keys()


def as_clones(arguments: Sequence[str]) -> list[str]:
    """The arguments without what a run's own config says about its folder and checkpoint (of older versions it does).

    A later file or option may name them.
    """
    given = [part for argument in arguments for part in _split(argument)]
    expanded: list[str] = []
    for option, argument in zip(["", *given], given, strict=False):
        expanded.append(argument)
        if option in OPTIONS and is_run_config(argument):
            saved = read_yaml(argument)
            if saved["ckpt_path"] is not None:
                expanded.append("--ckpt_path=null")
            if saved["trainer"].get("default_root_dir") is not None:
                expanded.append("--trainer.default_root_dir=null")
    return expanded


def interpolations(files: Sequence[str], arguments: Sequence[str]) -> dict[str, str]:
    """Keys whose value is a reference to another key, `${trainer.max_steps}`, in the files and not overridden."""
    values: dict[str, Any] = {}
    for file in files:
        values |= dict(_leaves(read_yaml(file)))
    for argument in arguments:
        values.pop(argument.removeprefix("--").partition("=")[0], None)
    return {key: value for key, value in values.items() if isinstance(value, str) and REFERENCE.fullmatch(value)}


def place_of(told: str, files: Sequence[str], arguments: Sequence[str]) -> str:
    """`FILE, line N` of the key that a sentence on a wrong configuration is about; "" where no file names it.

    Of several files the last counts, since it is laid over the others.
    """
    words = {word.replace(".init_args", "").strip(".") for word in re.findall(r"[\w.]+", told)}
    about = told.partition(":")[0] if re.match(r"[\w.]+: ", told) else ""
    options = {_short(argument.removeprefix("--").partition("=")[0]) for argument in arguments}
    if options & (words | {about}):
        return ""
    weak = ""
    for file in reversed(files):
        for name, line in key_lines(Path(file).read_text(encoding="utf-8-sig")).items():
            last = name.rpartition(".")[2]
            if (
                name in words
                and "." in name
                or (name.startswith(f"{about}.") if about else True)
                and last in words - {*about.split("."), "class_path", "model", "data", "trainer"}
            ):
                return f"{file}, line {line}"
            if name == about and not weak:
                weak = f"{file}, line {line}"
    return weak


def reference_at_fault(told: str, files: Sequence[str]) -> str:
    """The place and value of the `${...}` that an error of OmegaConf is about, at best by what the error quotes."""
    found = [
        (file, name, value)
        for file in reversed(files)
        for name, value in _leaves(read_yaml(file))
        if isinstance(value, str) and "${" in value
    ]
    quoted = [entry for entry in found if (inner := entry[2].strip("${}")) and inner in told]
    for file, name, value in [*quoted, *found][:1]:
        line = key_lines(Path(file).read_text(encoding="utf-8-sig")).get(_short(name), 1)
        return f"{file}, line {line}: {name} is {value!r}, which stands for no value ({told.rstrip('.')})."
    return told


def check_sections(files: Sequence[str], names: Sequence[str]) -> None:
    """Raise a ValueError for a section that holds no keys: the parser would take it for none, or fail later."""
    for file in files:
        for name, value in read_yaml(file).items():
            if name in names and not isinstance(value, dict | str):
                raise ValueError(f"{file}: the section {name} must hold keys and values, not {value!r}.")


def _short(name: str) -> str:
    return name.replace(".init_args", "")


def _leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, content


def default_run_dir(config_files: Sequence[str]) -> str:
    """experiments/shapes/emmdit.yaml -> runs/shapes/emmdit (of the last file that is not a trainer's)."""
    files = [file for file in map(Path, config_files) if file.parent.name != "trainer"] or [Path("run")]
    parts = files[-1].with_suffix("").parts
    below = parts[::-1].index("experiments") if "experiments" in parts else 1
    return os.path.join("runs", *parts[-max(1, below) :])
