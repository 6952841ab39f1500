"""Errors of configurations in one sentence: jsonargparse wraps each level of the config around the cause."""

from __future__ import annotations

import re
from argparse import ArgumentError

LONGEST = 600  # values and names in a message may come from a hostile file
USER_ERRORS = (ArgumentError, ValueError, OSError)
_WRAPPERS = ("Parser key ", "Does not validate", "Problem with given class_path", "Type typing.", "Type collections.")
_EXPECTED = ("Expected a ", "Expected <class ")
_BASE_CLASS = re.compile(r"class_path '(?:lightning|datamodules)[\w.]*\.(?:LightningModule|TextImageDataModule)'")
_NOTHING_NAMED = re.compile(r"the following arguments are required: (?:\w+\.)?(?:data|model)\b")
_KEY = re.compile(r'Parser key "([\w.]+)"')


def sentence(error: BaseException) -> str:
    """The message for the user, one line of at most `LONGEST` characters: the key path in the config, and what is wrong
    with it. Errors that jsonargparse did not wrap keep their words, those of a loader process lose its traceback."""
    line = " ".join(_sentence(error).split())
    half = (LONGEST - len(" [...] ")) // 2
    return line if len(line) <= LONGEST else f"{line[:half]} [...] {line[-half:]}"  # the way out stands at the end


def _sentence(error: BaseException) -> str:
    text = _message(error)
    if text.startswith("Caught ") and "Original Traceback" in text:  # raised in a data loader's process
        return text.rstrip().splitlines()[-1].partition(": ")[2]
    if "EADDRINUSE" in text:  # of torch's rendezvous
        port = re.search(r"port: (\d+)", text)
        return f"The port {port[1] if port else ''} of the ranks is in use: name a free one with MASTER_PORT."
    if type(error).__module__.startswith("omegaconf"):  # a ${...} that resolves to nothing
        return text.splitlines()[0] + "."
    if not (isinstance(error, ArgumentError) or text.startswith(_WRAPPERS)):
        return text
    if _BASE_CLASS.search(text) or _NOTHING_NAMED.match(text):
        return (
            "The files name no class for the model or the data, or only after one that changes it: give the "
            "experiment first, then the files merged into it (-c experiments/shapes/emmdit.yaml -c CHANGE.yaml)."
        )
    path: list[str] = []
    choices: list[str] = []
    types = ""
    link: BaseException = error
    while True:
        text = _message(link)
        key = _KEY.match(text)
        if key and key[1] != "config" and path[-1:] != [key[1]]:
            path.append(key[1])
            choices, types = [], ""
        if text.startswith("Does not validate"):
            choices, types = _choices(text), _types(text)
        following = link.__cause__ or link.__context__
        if following is None or not text.startswith(_WRAPPERS):
            break
        link = following
    if text.startswith(_EXPECTED):  # of the types of a union, the nearest says more
        text = choices[-1] if choices else types or text
    problem = _plain(text)
    return f"{'.'.join(path)}: {problem}" if path else problem


def one_line(error: BaseException) -> str:
    """Any error in one line: its sentence, behind its kind where that is no error of a user's."""
    told = sentence(error)
    return told if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {told}"


def _choices(text: str) -> list[str]:
    """What each type of a union said, without those that say only which type they are."""
    text = text.rpartition("Given value type:")[0].partition("Errors:\n")[2]
    parts = re.split(r"(?m)^\s*- ", text)
    lines = [part.strip().splitlines()[-1].strip() for part in parts if part.strip()]
    return [line for line in lines if not line.startswith(_EXPECTED)]


def _types(text: str) -> str:
    """Expected types and the value given, of a union of plain types."""
    kinds = re.findall(r"<class '(?:\w+\.)*(\w+)'>", text.partition("Subtypes: ")[2].partition("\n")[0])
    kinds = ["null" if kind == "NoneType" else kind for kind in kinds]
    return f"Expected {' or '.join(kinds)}, got {text.rpartition('Given value: ')[2].strip()}" if kinds else ""


def _message(error: BaseException) -> str:
    return (error.message if isinstance(error, ArgumentError) else str(error)) or type(error).__name__


def _plain(text: str) -> str:
    """jsonargparse's words without the Python in them."""
    while text.startswith('Parser key "'):
        text = text.partition("\n")[2].strip()
    text = re.sub(r"^- Expected a path but .*\n\s*- ", "", text.strip())  # a class may be in a file, too
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r"^Type .* expects a function or a callable class: (.*?)\.+ Got value: .*", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"^Expected a ", "Expected ", text).replace(". Got value: ", ", got ")
    option = r"(?:Subcommand '\w+' does not accept option|Option) '(\S+)'.*"
    text = re.sub(option, r"there is no option '\1'", text)
    text = re.sub(r"Import path (\S+) does not correspond to", r"\1 is not", text)
    return text.rstrip(".") + "."
