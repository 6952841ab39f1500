"""GenEval (arXiv 2310.11513): does a picture show what its prompt asks for?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emmdit.evaluation.geneval.judge import COLORS, Detection, Verdict, judge
from emmdit.evaluation.geneval.prompt_file import read_prompts
from emmdit.evaluation.geneval.prompts import (
    CLASSES,
    TASKS,
    generate_prompts,
    official_prompts,
    prompts_jsonl,
    prompts_txt,
    training_prompts,
)
from emmdit.evaluation.geneval.results import ResultRow, Summary, read_results, summary, write_results

if TYPE_CHECKING:
    from emmdit.evaluation.geneval.colors import CLIPColors
    from emmdit.evaluation.geneval.detectors import Detector
    from emmdit.evaluation.geneval.mask2former import Mask2Former
    from emmdit.evaluation.geneval.metric import GenEval

# Lazily: judging and prompts load neither torchmetrics nor transformers, which take seconds.
_LAZY = {
    "CLIPColors": ".colors",
    "Detector": ".detectors",
    "GenEval": ".metric",
    "Mask2Former": ".mask2former",
}

__all__ = [
    "CLASSES",
    "COLORS",
    "TASKS",
    "CLIPColors",
    "Detection",
    "Detector",
    "GenEval",
    "Mask2Former",
    "ResultRow",
    "Summary",
    "Verdict",
    "generate_prompts",
    "judge",
    "official_prompts",
    "prompts_jsonl",
    "prompts_txt",
    "read_prompts",
    "read_results",
    "summary",
    "training_prompts",
    "write_results",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
