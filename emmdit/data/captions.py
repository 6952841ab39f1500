"""Choice among several captions of one image, by position in the training stream."""

from __future__ import annotations

from collections.abc import Sequence

from emmdit.seeding import digest


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
    if weights is not None and (not weights or min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(f"caption_weights {list(weights)} must be numbers from 0 up, and one of them above 0.")
