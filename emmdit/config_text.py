"""Bounded reading of YAML, flattened configurations, and text with secrets masked."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_BYTES, MAX_YAML_NODES, MAX_YAML_DEPTH = 10 * 2**20, 100_000, 100
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Takes time and memory for `MAX_YAML_NODES` nodes at most, aliases expanded.

    Raises:
        FileNotFoundError, ValueError: with one sentence that names the file, and the line where there is one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"{path} is larger than {MAX_YAML_BYTES // 2**20} MiB: it is not a configuration.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    content = parse_yaml(text, path)
    if content is None:
        raise ValueError(f"{path} is empty: give a YAML file with keys and values.")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not keys and values (`key: value`).")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{path}: the key {odd[0]!r} is not a name: write it in quotes if it is one.")
    return content


def parse_yaml(text: str, source: str | Path) -> Any:
    """What YAML text holds: plain types only, as `yaml.safe_load`, with the bounds of `read_yaml`.

    Args:
        source: where the text is from, for messages.

    Raises:
        ValueError: with one sentence that names source and line.
    """
    loader = None
    try:
        _check_events(text)  # before anything is composed: that recurses, in C
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)  # before anything is constructed: merge keys (<<) copy what their aliases stand for
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        start = error.context_mark
        context = f" ({error.context} from line {start.line + 1}, column {start.column + 1})" if start else ""
        raise ValueError(f"{source}{where}: {error.problem}{context}.") from None
    except yaml.YAMLError as error:  # a control character
        raise ValueError(f"{source}: {' '.join(str(error).split())}.") from None
    except Exception as error:  # of a value's constructor: `!!bool 3`, the 99th of January
        raise ValueError(f"{source} is not plain YAML ({type(error).__name__}: {error}).") from None
    finally:
        if loader is not None:
            loader.dispose()


def key_lines(text: str) -> dict[str, int]:
    """Line of each key of a YAML text that `parse_yaml` takes: {"model.denoiser.dim": 7}, without `init_args`."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node, name: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                child = name if key.value == "init_args" else f"{name}.{key.value}" if name else str(key.value)
                lines.setdefault(child, key.start_mark.line + 1)
                walk(value, child)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                walk(value, name)

    walk(yaml.compose(text, Loader=_Loader), "")
    return lines


def _check_events(text: str) -> None:
    """Raise a MarkedYAMLError where a document as it is written nests too deep or has too many values."""
    depth = count = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > MAX_YAML_DEPTH:
            raise _fault(event, f"more than {MAX_YAML_DEPTH} levels")
        if count > MAX_YAML_NODES:
            raise _fault(event, f"more than {MAX_YAML_NODES:,} values")


def _check_nodes(root: yaml.Node) -> None:
    """Raise a MarkedYAMLError where the document grows too large through its aliases, or repeats a key."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        """Values in `node`, each alias counted as what it stands for."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise _fault(node, "an alias stands inside of what it names")
            return sizes[id(node)]
        sizes[id(node)] = 0  # being counted
        children = node.value
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key in (key for key, _ in children if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in seen:
                    raise _fault(key, f"the key {key.value!r} is there twice")
                seen.add((key.tag, key.value))
            children = [child for pair in children for child in pair]
        total = 1
        for child in children:
            total += size(child)
            if total > MAX_YAML_NODES:
                raise _fault(node, f"more than {MAX_YAML_NODES:,} values, with its aliases expanded")
        sizes[id(node)] = total
        return total

    size(root)


def _fault(place: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")  # to another key; one with a resolver (`oc.env:`) is none


def resolve_references(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a saved configuration with each value `${a.b}` replaced by the value of `a.b`.

    Resolvers are not called: `${oc.env:NAME}` in the configuration of a stranger stays text.

    Raises:
        ValueError: a reference names no key, or goes in a circle.
    """

    def lookup(name: str, chain: tuple[str, ...]) -> Any:
        value: Any = config
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise ValueError(f"${{{name}}} names no key of the configuration.")
            value = value[key]
        return resolve(value, chain)

    count = itertools.count()

    def resolve(value: Any, chain: tuple[str, ...] = ()) -> Any:
        if next(count) > MAX_YAML_NODES:  # references to references double what they stand for, as aliases do
            raise ValueError(f"its references stand for more than {MAX_YAML_NODES:,} values.")
        if isinstance(value, Mapping):
            return {key: resolve(child, chain) for key, child in value.items()}
        if isinstance(value, list):
            return [resolve(child, chain) for child in value]
        found = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            return value
        if found[1] in chain:
            raise ValueError(f"{value} refers to itself.")
        return lookup(found[1], (*chain, found[1]))

    return resolve(config)


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
