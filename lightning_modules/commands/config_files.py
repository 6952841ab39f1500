"""Config files on the command line: `-c` options, the base files that a config names, and the default run folder."""

from __future__ import annotations

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
    files = []
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option in OPTIONS:
            files.append(value)
        elif option.startswith(tuple(f"{name}=" for name in OPTIONS)):
            files.append(option.partition("=")[2])
    return files


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The arguments with each config file preceded by its bases, except those that stand before it already.

    Raises:
        ValueError: a base does not exist, or a file is a base of itself.
    """
    seen: set[Path] = set()
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, file = argument.partition("=")
        if option in OPTIONS and (file := file if equals else next(rest, None)) is not None:
            path = Path(file).resolve()
            expanded += [part for base in _bases(path, (path,), seen) for part in (option, str(base))]
            expanded += [option, file]
            seen.add(path)
        else:
            expanded.append(argument)
    return expanded


def _bases(file: Path, chain: tuple[Path, ...], seen: set[Path]) -> list[Path]:
    """The bases of `file`, the lowest first, without those in `seen`, to which they are added."""
    found = []
    for name in named_bases(file):
        base = (file.parent / name).resolve()
        if base in chain:
            raise ValueError(
                f"{file} names {name} as its base, which is laid over {file.name} itself: remove one `base`."
            )
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
    files = [Path(file) for file in config_files]
    files = [file for file in files if file.parent.name != "trainer"] or [Path("run")]
    parts = files[-1].with_suffix("").parts
    if "experiments" in parts:
        parts = parts[len(parts) - parts[::-1].index("experiments") :]
    else:
        parts = parts[-1:]
    return os.path.join("runs", *parts)
