"""Run folders: the configuration of a training, and the module that it describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule

from emmdit.weights import run_folder


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run that a run folder or a checkpoint belongs to."""
    # LEAD: return emmdit.legacy.modernize(...) of it
    return yaml.safe_load(latest_config(run_folder(path)).read_text())


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


def build_module(config: dict[str, Any]) -> LightningModule:
    """The LightningModule that a run's config describes, without its network."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    try:
        parsed = parser.parse_object({"model": config["model"]})
    except Exception as error:
        raise ValueError(f"The run's configuration does not fit this version of the suite: {error}") from error
    return instantiate(parser, parsed).model


def instantiate(parser: ArgumentParser, parsed: Namespace) -> Namespace:
    """Build the classes that a parsed configuration names; jsonargparse 4.49 renamed the call."""
    return parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
