"""Asked color: 1 for true renders, 0 where every image shows another color."""

from __future__ import annotations

import pytest
import torch

from emmdit.evaluation.metrics.base import Sample
from emmdit.shapes import AskedColor, ShapesPrompts
from emmdit.shapes.metrics import renders
from emmdit.shapes.reader import main_color


def samples() -> list[Sample]:
    lines = ShapesPrompts(per_task=24, images=1).load()
    return [Sample(i, 0, line, i) for i, line in enumerate(lines)]


def test_renders_show_what_was_asked_and_swapped_images_do_not() -> None:
    metric, chosen = AskedColor(), samples()
    metric.begin(chosen)
    generated = renders()([s.line["prompt"] for s in chosen], [s.seed for s in chosen])
    images = ((generated + 1) * 127.5).round().to(torch.uint8)
    metric.update(images, chosen)
    assert metric.compute() == {"": 1.0}

    colors = [main_color(image.permute(1, 2, 0).numpy()) for image in images]
    wrong = AskedColor()
    for i, sample in enumerate(chosen):
        if sample.line["tag"] == "colors":
            other = next(j for j, color in enumerate(colors) if color and color != sample.line["include"][0]["color"])
            wrong.update(images[other : other + 1], chosen[i : i + 1])
    assert wrong.compute() == {"": 0.0}


def test_prompts_without_a_color_are_refused() -> None:
    with pytest.raises(ValueError, match=r"asked_color.*\bcolors\b"):
        AskedColor().begin([s for s in samples() if s.line["tag"] == "counting"])
    with pytest.raises(ValueError, match=r"asked_color(?!.*\bcolors\b)"):
        AskedColor().compute()
