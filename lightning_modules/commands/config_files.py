"""Config files on the command line: `-c` options, the base files that a config names, and the default run folder."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

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
    """-c=FILE as -c FILE; everything else as it is."""
    option, equals, file = argument.partition("=")
    return [option, file] if equals and option in OPTIONS else [argument]


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
            path = Path(argument).resolve()
            bases = [part for base in _bases(path, (path,), seen) for part in (option, str(base))]
            expanded[-1:] = [*bases, option]
            seen.add(path)
        expanded.append(argument)
    return expanded


def _bases(file: Path, chain: tuple[Path, ...], seen: set[Path]) -> list[Path]:
    """The bases of `file`, the lowest first, without those in `seen`, to which they are added."""
    found = []
    for name in named_bases(file):
        base = (file.parent / name).resolve()
        if base in chain:
            raise ValueError(f"{file} and its base {name} are each laid over the other: remove one `base`.")
        if not base.is_file():
            raise ValueError(f"{file} names the base {name}, but there is no {base}: correct its `base`.")
        if base not in seen:
            found += [*_bases(base, (*chain, base), seen), base]
            seen.add(base)
    return found


def named_bases(file: Path) -> list[str]:
    """The value of `base` in a YAML file; nothing for what the parser itself will refuse."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found = content.get("base") if isinstance(content, dict) else None
    found = [found] if isinstance(found, str) else found or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file}: `base` must be the path of a YAML file or a list of paths, not {found!r}.")
    return found


def default_run_dir(config_files: Sequence[str]) -> str:
    """experiments/shapes/emmdit.yaml -> runs/shapes/emmdit (of the last file that is not a trainer's)."""
    files = [file for file in map(Path, config_files) if file.parent.name != "trainer"] or [Path("run")]
    parts = files[-1].with_suffix("").parts
    below = parts[::-1].index("experiments") if "experiments" in parts else 1
    return os.path.join("runs", *parts[-max(1, below) :])
