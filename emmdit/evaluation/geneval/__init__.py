"""GenEval (arXiv 2310.11513): does a picture show what its prompt asks for?"""

from .judge import COLORS, Detection, Verdict, judge

__all__ = ["COLORS", "Detection", "Verdict", "judge"]
