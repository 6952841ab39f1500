"""`CLIPScore` by hand, and against torchmetrics where that is right (it cuts long captions wrongly)."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

from emmdit.encoders import standin
from emmdit.evaluation.metrics.base import Sample
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.evaluation.metrics.clip_score import CLIPScore

CAPTIONS = ["a red circle", "two squares", "a star left of a cross", "a photo of a blue square"]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return CLIP("standin:clip_model")


def samples(captions: list[str]) -> list[Sample]:
    return [Sample(i, 0, {"prompt": caption}, 0) for i, caption in enumerate(captions)]


def random_images(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


class FixedVectors:
    """A CLIP whose vectors are given."""

    name = "fixed"

    def __init__(self, images: list[list[float]], texts: list[list[float]]) -> None:
        self._images, self._texts = torch.tensor(images), torch.tensor(texts)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        return self._images

    def texts(self, texts: list[str]) -> torch.Tensor:
        return self._texts


def test_by_hand() -> None:
    metric = CLIPScore(FixedVectors([[1.0, 0.0], [0.6, 0.8]], [[0.8, 0.6], [-1.0, 0.0]]))
    metric.update(random_images(2), samples(CAPTIONS[:2]))
    assert metric.compute()[""] == pytest.approx(100 * (0.8 - 0.6) / 2)  # the clip at 0 is not on each image
    opposite = CLIPScore(FixedVectors([[1.0, 0.0]], [[-1.0, 0.0]]))
    opposite.update(random_images(1), samples(CAPTIONS[:1]))
    assert opposite.compute()[""] == 0.0


def test_batches_and_copies_of_the_state_add_up(clip: CLIP) -> None:
    whole, parts, other = CLIPScore(clip), CLIPScore(clip), CLIPScore(clip)
    whole.update(random_images(4), samples(CAPTIONS))
    parts.update(random_images(4)[:1], samples(CAPTIONS)[:1])
    other.update(random_images(4)[1:], samples(CAPTIONS)[1:])
    parts.total, parts.count = parts.total + other.total, parts.count + other.count  # what a sync of ranks does
    assert parts.compute()[""] == pytest.approx(whole.compute()[""], abs=1e-5)
    assert parts.total.dtype == torch.float64


class AsBefore5(nn.Module):
    """transformers 5 gives output objects, torchmetrics 1.9 wants tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *args) -> torch.Tensor:
        return self.model.get_image_features(*args).pooler_output

    def get_text_features(self, *args) -> torch.Tensor:
        return self.model.get_text_features(*args).pooler_output


def test_is_torchmetrics_value_for_short_captions(clip: CLIP) -> None:
    from torchmetrics.multimodal.clip_score import CLIPScore as Theirs
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = standin("clip_model")
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    theirs = Theirs(lambda: (AsBefore5(CLIPModel.from_pretrained(folder).eval()), processor))
    theirs.update(random_images(4), CAPTIONS)
    metric = CLIPScore(clip)
    metric.update(random_images(4), samples(CAPTIONS))
    assert metric.compute()[""] == pytest.approx(float(theirs.compute()), abs=1e-3)


def test_name_state_and_settings(clip: CLIP) -> None:
    metric = CLIPScore(clip)
    assert (metric.kind, metric.name, metric.counted) == ("clip_score", "clip_score_standin_model", False)
    assert metric.label(5000) == metric.name
    metric.prepare("cpu")
    metric.update(random_images(4), samples(CAPTIONS))
    assert not metric.state_dict()
    assert not list(metric.parameters())
    assert not list(metric.modules())[1:]
    assert json.loads(json.dumps(metric.settings()))["sha256"] == clip.settings()["sha256"]
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


def test_refusals(clip: CLIP) -> None:
    metric = CLIPScore(clip)
    with pytest.raises(ValueError, match=r"clip_score_standin_model(?!.*\d)"):
        metric.compute()
    with pytest.raises(ValueError, match="uint8.*float32"):
        metric.update(torch.rand(1, 3, 32, 32), samples(CAPTIONS[:1]))
    with pytest.raises(ValueError, match=r"clip_score_standin_model.*\b2\b.*\b1\b"):
        metric.update(random_images(2), samples(CAPTIONS[:1]))
    assert int(metric.count) == 0
