"""Flattened configurations, and text with secrets masked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any


def flatten_config(config: Any, name: str = "") -> dict[str, Any]:
    """A nested config on one level, under the names of the command line.

    `model.optimizer` is the class path, `model.optimizer.lr` one of its arguments. Classes in a list are named
    by their own names, `trainer.callbacks.EMA.decay`; other lists stay as they are. Secrets are masked.
    """
    if hasattr(config, "as_dict"):  # jsonargparse's Namespace
        config = config.as_dict()
    if isinstance(config, Mapping) and config:
        out: dict[str, Any] = {}
        for key, value in config.items():
            if key == "class_path":
                out[name or "class"] = value
            else:
                child = name if key == "init_args" else f"{name}.{key}" if name else str(key)
                if isinstance(value, Mapping) and not value and key in ("init_args", "dict_kwargs"):
                    continue
                out.update(flatten_config(value, child))
        return out
    entries = config if isinstance(config, (list, tuple)) else ()
    if entries and all(isinstance(entry, Mapping) and "class_path" in entry for entry in entries):
        names = [entry["class_path"].rsplit(".", 1)[-1] for entry in entries]
        twice = {n for n, count in Counter(names).items() if count > 1}
        out = {}
        for index, (child, entry) in enumerate(zip(names, entries, strict=True)):
            child = f"{child}_{index}" if child in twice else child
            out.update(flatten_config(entry, f"{name}.{child}"))
        return out
    if _SECRET_NAME.fullmatch(name) and config is not None:
        return {name: "***"}
    return {name: mask_secrets(config) if isinstance(config, str) else config}


# "token" alone or as the usual secrets: pad_token and the like are settings
_SECRET = (
    r"(?:[\w.+-]*\.)?(?:token|(?:\w+_)?"
    r"(?:(?:hf|hub|auth|access|api|bearer)_?token|passw(?:or)?d|secret|(?:api|access)_?key|credentials?))"
)
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_SECRET_LINE = re.compile(rf"^([\s-]*{_SECRET}\s*:[ \t]+)(?!null\s*$)\S.*$", re.IGNORECASE | re.MULTILINE)
_SECRET_OPTION = re.compile(rf"(--{_SECRET}(?:=|\s+))\S+", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


def mask_secrets(text: str) -> str:
    """*** for passwords in addresses, and for values named like a secret in YAML or on a command line."""
    for pattern in (_SECRET_LINE, _SECRET_OPTION):
        text = pattern.sub(r"\1***", text)
    return _CREDENTIALS.sub("***@", text)
