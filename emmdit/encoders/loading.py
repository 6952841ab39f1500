"""Loading of pretrained models from a local folder or a hub id, with a one-sentence error for every failure.

Safetensors only, weights only, never `trust_remote_code`. The many exceptions of huggingface_hub, transformers and
diffusers (a gated repository alone raises four different ones) become a `MissingModelError` that says what to do next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from emmdit.bounded import Unfit, bounded_folder
from emmdit.files import read_json

STANDIN_SCHEME = "standin:"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class MissingModelError(OSError):
    """A pretrained model is missing, or of another kind than asked for; the message names the way out."""


def locate(source: str, subfolder: str | None = None) -> tuple[str, str | None]:
    """(source, subfolder) as `from_pretrained` takes them: an existing local folder, or a hub id as it is.

    `standin:NAME` is made on demand. `~` is expanded. Where `source` is the folder of the module itself instead of the
    pipeline around it, `subfolder` is dropped. Raises MissingModelError for a local folder that does not exist.
    """
    if source.startswith(STANDIN_SCHEME):
        from emmdit.encoders.standins import standin

        source = str(standin(source.removeprefix(STANDIN_SCHEME)))
    path = Path(source).expanduser()
    if path.is_dir():
        if subfolder and not (path / subfolder).is_dir():
            if not any((path / name).is_file() for name in ("config.json", "tokenizer_config.json")):
                raise MissingModelError(
                    f"'{source}' has no folder '{subfolder}': name a folder made by save_pretrained."
                )
            subfolder = None
        return str(path), subfolder
    if path.is_file():
        raise MissingModelError(f"'{source}' is a file: name its folder, made by save_pretrained.")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.is_absolute():
        raise MissingModelError(
            f"The folder '{source}' does not exist: name a folder made by save_pretrained, or a hub id."
        )
    return source, subfolder


def read_config(source: str, subfolder: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The raw `config.json` of a model; a gated repository fails here first."""
    import huggingface_hub

    source, subfolder = locate(source, subfolder)
    with one_sentence(source):
        if Path(source).is_dir():
            file = str(Path(source, subfolder or "", "config.json"))
            if not Path(file).is_file():
                raise MissingModelError(f"There is no '{file}': name a folder made by save_pretrained.")
        else:
            file = huggingface_hub.hf_hub_download(source, "config.json", subfolder=subfolder, revision=revision)
        config = read_json(file, "download it again")
        if not isinstance(config, dict):
            raise MissingModelError(f"'{file}' is not the configuration of a model: download it again.")
        return config


def load_model(
    cls: type,
    source: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    kinds: Collection[str] = (),
) -> Any:
    """`cls.from_pretrained(...)` of a diffusers or transformers class, in eval mode.

    `kinds`: the allowed `_class_name` (diffusers) or `model_type` (transformers) of the config. Without this check both
    libraries fill a model of the wrong kind with random weights and only log a warning; weights missing from the files
    are an error here for the same reason. Raises MissingModelError.
    """
    config = read_config(source, subfolder, revision)
    # `load_config` is of diffusers' ConfigMixin; the networks of this package have it, too
    library = "diffusers" if hasattr(cls, "load_config") else "transformers"
    kind = config.get("_class_name" if library == "diffusers" else "model_type")
    if kind is None:
        raise MissingModelError(f"'{source}' does not hold a model of {library}: name another source.")
    if kinds and kind not in kinds:
        raise MissingModelError(
            f"'{source}' holds a model of kind '{kind}', not {' or '.join(kinds)}: name another source."
        )
    place, subfolder = locate(source, subfolder)
    options: dict[str, Any] = dict(use_safetensors=True, output_loading_info=True)
    if library == "diffusers":  # it never runs remote code and, with use_safetensors, never unpickles
        options |= dict(torch_dtype=dtype, subfolder=subfolder, revision=revision)
    else:
        options |= dict(dtype=dtype, subfolder=subfolder or "", revision=revision or "main")
        options |= dict(trust_remote_code=False, weights_only=True)
    # transformers would ask a hub service to convert a repository that has only pickled weights
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with loading(place):
        model, info = cls.from_pretrained(place, **options)
    if missing := sorted(info["missing_keys"]):
        raise MissingModelError(
            f"'{source}' lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}, ...): download "
            f"its files again, or name another source."
        )
    return model.eval()


def load_processor(
    cls: type, source: str, subfolder: str | None = None, revision: str | None = None, **options: Any
) -> Any:
    """`cls.from_pretrained(...)` of a tokenizer or an image processor. Raises MissingModelError."""
    source, subfolder = locate(source, subfolder)
    with loading(source):
        return cls.from_pretrained(source, subfolder=subfolder or "", revision=revision or "main", **options)


def load_tokenizer(source: str, subfolder: str | None = None, revision: str | None = None) -> Any:
    """`AutoTokenizer.from_pretrained(...)`. Raises MissingModelError."""
    from transformers import AutoTokenizer

    return load_processor(AutoTokenizer, source, subfolder, revision, trust_remote_code=False)


@contextmanager
def loading(source: str) -> Iterator[None]:
    """`one_sentence` for all that a damaged or hostile folder can raise, with memory bounded by its weights."""
    with one_sentence(source), ExitStack() as stack:
        if Path(source).is_dir():
            stack.enter_context(bounded_folder(source))
            _check_configs(Path(source))
        try:
            yield
        except Unfit as error:
            raise Unfit(f"'{source}': {error}") from error
        except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"a configuration in it does not fit ({str(error).splitlines()[0]})") from error


def _check_configs(folder: Path) -> None:
    """A configuration that is a text would be one for diffusers, too: the id of a hub's, to be downloaded."""
    for file in (*folder.glob("*config.json"), *folder.glob("*/*config.json")):
        if not isinstance(read_json(file, "download it again"), dict):
            raise MissingModelError(f"'{file}' is not the configuration of a model: download it again.")


@contextmanager
def one_sentence(source: str) -> Iterator[None]:
    """Turn the exceptions of the libraries while loading `source` into a MissingModelError of one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (MissingModelError, Unfit, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, (OSError, ValueError, ImportError, RuntimeError, SafetensorError)) or _of_http(error):
            raise MissingModelError(_explain(error, source)) from error
        raise


def _explain(error: BaseException, source: str) -> str:
    from huggingface_hub import constants, errors
    from safetensors import SafetensorError

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:  # diffusers raises without `from`: the cause is then the context
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(e) for e in chain).lower()
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    reason = reason if len(reason) <= 300 else f"{reason[:300]} ..."

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    local = Path(source).is_dir()
    denied = not local and any(getattr(getattr(e, "response", None), "status_code", None) in (401, 403) for e in chain)
    unknown = raised(errors.RepositoryNotFoundError, errors.HFValidationError)  # the hub also answers 401 for these
    if raised(errors.GatedRepoError) or "gated repo" in text or (denied and not unknown):
        return (
            f"'{source}' is gated: accept its license at https://huggingface.co/{source} and run `hf auth "
            f"login`, or set source to a local folder or an ungated mirror."
        )
    if unknown:
        return (
            f"'{source}' is neither a local folder nor a repository of the Hugging Face hub: check the spelling, or "
            f"run `hf auth login` if it is private."
        )
    if raised(errors.RevisionNotFoundError):
        return f"'{source}' has no such revision: choose one of https://huggingface.co/{source}/commits."
    not_there = raised(errors.RemoteEntryNotFoundError)
    unreachable = raised(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(map(_of_http, chain))
    if unreachable and not local and not not_there:
        way_out = "the hub cannot be reached: check the network"
        if constants.is_offline_mode():
            way_out = f"HF_HUB_OFFLINE forbids a download: run `hf download {source}` with HF_HUB_OFFLINE unset"
        return f"'{source}' is not in the local cache and {way_out}, or set source to a local folder."
    if not_there and "config.json" in text:
        return f"'{source}' has no config.json there: check subfolder or source."
    if "backend tokenizer" in text:
        return f"'{source}' has no readable tokenizer: check tokenizer_subfolder or source."
    if "trust_remote_code" in text:
        return f"'{source}' needs remote code, which is never executed here: name another source."
    if raised(SafetensorError, json.JSONDecodeError, UnicodeDecodeError):
        what = "The weights" if raised(SafetensorError) else "A JSON file"
        return f"{what} in '{source}' cannot be read, download again what is damaged ({reason})."
    if ".safetensors" in text or "no file named" in text:
        pickled = local and any(any(Path(source).rglob(pattern)) for pattern in _PICKLES)
        only = ", only pickled ones, which are not loaded" if pickled else ""
        return f"'{source}' has no safetensors weights{only}: save the model again, or name another source."
    return f"'{source}' could not be loaded: {reason}."


def _of_http(error: BaseException) -> bool:
    """Whether an HTTP library raised it; which one depends on the version of huggingface_hub."""
    library = type(error).__module__.partition(".")[0]
    return library in ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")
