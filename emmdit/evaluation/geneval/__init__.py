"""GenEval (arXiv 2310.11513): checks whether an image shows what its prompt asks for."""

from __future__ import annotations

from emmdit.evaluation.geneval.judge import COLORS, Detection, Verdict, judge
from emmdit.evaluation.geneval.prompt_file import read_prompts
from emmdit.evaluation.geneval.prompts import (
    CLASSES,
    TASKS,
    generate_prompts,
    official_prompts,
    prompts_jsonl,
    training_prompts,
)
from emmdit.evaluation.geneval.results import summary, write_results
from emmdit.lazy import attach

# Judging and prompts load neither torchmetrics nor transformers, which take seconds to import.
__getattr__, _lazy = attach(
    __name__,
    {"colors": ("CLIPColors",), "detectors": ("Detector",), "mask2former": ("Mask2Former",), "metric": ("GenEval",)},
)

__all__ = [
    "CLASSES",
    "COLORS",
    "TASKS",
    "Detection",
    "Verdict",
    "generate_prompts",
    "judge",
    "official_prompts",
    "prompts_jsonl",
    "read_prompts",
    "summary",
    "training_prompts",
    "write_results",
    *_lazy,
]
