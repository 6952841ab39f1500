"""Asked colour: all of the renders, none where every picture shows another colour."""

from __future__ import annotations

import pytest
import torch

from benchmarks.train_shapes_text import train
from emmdit.evaluation.metrics.base import Sample
from emmdit.shapes import AskedColor, ShapesPrompts
from emmdit.shapes.bounds import renders
from emmdit.shapes.reader import main_color


def samples() -> list[Sample]:
    lines = ShapesPrompts(per_task=24, images=1).load()
    return [Sample(i, 0, line, i) for i, line in enumerate(lines)]


def test_renders_show_what_was_asked_and_exchanged_pictures_do_not() -> None:
    metric, chosen = AskedColor(), samples()
    metric.begin(chosen)
    pictures = renders()([s.line["prompt"] for s in chosen], [s.seed for s in chosen])
    images = ((pictures + 1) * 127.5).round().to(torch.uint8)
    metric.update(images, chosen)
    assert metric.compute() == {"": 1.0}

    colors = [main_color(image.permute(1, 2, 0).numpy()) for image in images]
    wrong = AskedColor()
    for i, sample in enumerate(chosen):
        if sample.line["tag"] == "colors":
            other = next(j for j, color in enumerate(colors) if color and color != sample.line["include"][0]["color"])
            wrong.update(images[other : other + 1], chosen[i : i + 1])
    assert wrong.compute() == {"": 0.0}


def test_prompts_without_a_colour_are_refused() -> None:
    with pytest.raises(ValueError, match=r"asked_color.*\bcolors\b"):
        AskedColor().begin([s for s in samples() if s.line["tag"] == "counting"])
    with pytest.raises(ValueError, match=r"asked_color(?!.*\bcolors\b)"):
        AskedColor().compute()


def test_the_text_model_learns_what_captions_ask_for() -> None:
    (_, first), (_, later) = train(steps=1, report=0), train(steps=40, report=0)
    assert later["colour at the last word"] > first["colour at the last word"] + 0.1
