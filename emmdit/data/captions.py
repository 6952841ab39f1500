"""Choice among several captions of one image, by position in the training stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from emmdit.seeding import digest


def texts(found: Any) -> list[str | None]:
    """A text, a list of texts, or None for a missing one, as a list. ValueError for anything else, and for half a
    surrogate pair (JSON may have one), which no file takes and no tokenizer."""
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    for text in found:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"a text was expected, not {text!r:.40}")
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text {text!r:.40} is not valid Unicode") from None
    return found


def candidates(texts: Sequence[str | None], weights: Sequence[float] | None = None) -> list[tuple[str, float]]:
    """The texts that are not empty with their weights; None: equal ones. Texts beyond the weights get none."""
    weights = [1.0] * len(texts) if weights is None else weights
    return [
        (text, weight) for text, weight in zip(texts, weights, strict=False) if text and text.strip() and weight > 0
    ]


def choose(captions: Sequence[tuple[str, float]], seed: int, position: int) -> str:
    """One of the (text, weight) pairs, as a function of (seed, position): a resume on any number of ranks chooses the
    same, and the next epoch chooses anew."""
    left = digest(seed, "caption", position) / 2**64 * sum(weight for _, weight in captions)
    for text, weight in captions:
        left -= weight
        if left < 0:
            return text
    return captions[-1][0]


def check_weights(weights: Sequence[float] | None) -> None:
    """ValueError unless there is at least one, none negative, and not all zero."""
    if weights is not None and not (weights and min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise ValueError(f"caption_weights {list(weights)} must be numbers from 0 up, and one of them above 0.")
