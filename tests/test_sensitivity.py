"""Every metric moves the right way when images or captions are spoilt, the more the further; on true renders of the
shapes world and its own CLIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from emmdit.evaluation.geneval.metric import GenEval
from emmdit.evaluation.metrics.base import ImageMetric, Sample
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.evaluation.metrics.clip_score import CLIPScore
from emmdit.evaluation.metrics.cmmd import CMMD
from emmdit.evaluation.metrics.features import CLIPFeatures
from emmdit.evaluation.metrics.fid import FID
from emmdit.evaluation.metrics.kid import KID
from emmdit.evaluation.metrics.reference import write_reference
from emmdit.shapes import ShapesDetector, ShapesWorld, render_scene

ASSET = Path(__file__).parents[1] / "assets" / "shapes_clip"
N = 210
DISTANCES = ("fid", "kid", "cmmd")
STRENGTHS = {
    "blur": (0.0, 0.8, 1.4, 2.5),  # standard deviation in pixels
    "noise": (0.0, 40.0, 55.0, 80.0),  # standard deviation in levels of 255
    "collapse": (0.0, 0.8, 0.95, 0.99),  # share of the images that repeat others, with their captions
    "shuffle": (0.0, 0.25, 0.5, 1.0),  # share of the captions that belong to other images
}
Set = tuple[np.ndarray, list[dict]]  # uint8 (N, H, W, 3) and their prompts' lines


def truth(seed: int) -> Set:
    scenes = [ShapesWorld().sample(seed, i) for i in range(N)]
    return np.stack([render_scene(scene) for scene in scenes]), [scene.metadata for scene in scenes]


def spoilt(kind: str, strength: float, given: Set) -> Set:
    images, lines = given
    if kind == "blur":
        images = ndimage.gaussian_filter(images.astype(float), (0, strength, strength, 0)).round().astype(np.uint8)
    elif kind == "noise":
        noise = np.random.default_rng(0).normal(0, strength, images.shape)
        images = (images + noise).round().clip(0, 255).astype(np.uint8)
    elif kind == "collapse":
        kept = np.arange(N) % max(round(N * (1 - strength)), 1)
        images, lines = images[kept], [lines[i] for i in kept]
    else:
        n = round(N * strength)
        lines = [lines[(i + 1) % n] for i in range(n)] + lines[n:]
    return images, lines


class RememberedFeatures(CLIPFeatures):
    """Three metrics ask for the same features, so they are made once."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__(clip)
        self.memory: dict[bytes, torch.Tensor] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.numpy().tobytes()
        if pixels not in self.memory:
            self.memory[pixels] = super().__call__(images)
        return self.memory[pixels]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageMetric]:
    clip = CLIP(str(ASSET))
    features = RememberedFeatures(clip)
    vectors = features(torch.from_numpy(truth(101)[0]).permute(0, 3, 1, 2)).double().numpy()
    folder = tmp_path_factory.mktemp("reference")
    moments, kid = folder / "shapes.npz", folder / "shapes_kid.npz"
    write_reference(moments, {"mu": vectors.mean(0), "sigma": np.cov(vectors, rowvar=False)}, {})
    write_reference(kid, {"feats": vectors}, {})
    found = {
        "fid": FID(features, str(moments)),
        "kid": KID(features, str(kid)),
        "cmmd": CMMD(features, str(kid)),
        "clip_score": CLIPScore(clip),
        "geneval": GenEval(ShapesDetector()),
    }
    for metric in found.values():
        metric.prepare("cpu")
    return found


def measure(metrics: dict[str, ImageMetric], given: Set) -> dict[str, float]:
    images, lines = torch.from_numpy(given[0]).permute(0, 3, 1, 2).contiguous(), given[1]
    samples = [Sample(i, 0, line, i) for i, line in enumerate(lines)]
    values = {}
    for name, metric in metrics.items():
        metric.reset()
        if isinstance(metric, GenEval):
            metric.begin(samples)
        for start in range(0, N, 70):  # in batches, as images come from a model
            metric.update(images[start : start + 70], samples[start : start + 70])
        values[name] = metric.compute()[""]
    return values


@pytest.fixture(scope="module")
def curves(metrics: dict[str, ImageMetric]) -> dict[str, dict[str, list[float]]]:
    """kind -> metric -> its value at each strength, the first being the true renders'."""
    given = truth(102)
    clean = measure(metrics, given)
    curves = {}
    for kind, strengths in STRENGTHS.items():
        rows = [clean] + [measure(metrics, spoilt(kind, strength, given)) for strength in strengths[1:]]
        curves[kind] = {name: [row[name] for row in rows] for name in metrics}
    return curves


def test_true_renders_score_well(curves: dict[str, dict[str, list[float]]]) -> None:
    clean = {name: values[0] for name, values in curves["blur"].items()}
    assert clean["geneval"] > 0.97
    assert clean["clip_score"] > 50
    assert abs(clean["kid"]) < 0.05 * curves["blur"]["kid"][-1]


@pytest.mark.parametrize("kind", ["blur", "noise", "collapse"])
@pytest.mark.parametrize("metric", DISTANCES)
def test_distances_grow(curves: dict[str, dict[str, list[float]]], kind: str, metric: str) -> None:
    values = curves[kind][metric]
    assert values == sorted(set(values)), values
    assert values[-1] > 2 * abs(values[0]), values


@pytest.mark.parametrize("kind", ["blur", "noise", "shuffle"])
@pytest.mark.parametrize("metric", ["clip_score", "geneval"])
def test_fits_of_images_and_captions_fall(curves: dict[str, dict[str, list[float]]], kind: str, metric: str) -> None:
    values = curves[kind][metric]
    assert values == sorted(set(values), reverse=True), values
    assert values[-1] < 0.75 * values[0], values


def test_collapse_leaves_each_image_with_its_caption(curves: dict[str, dict[str, list[float]]]) -> None:
    """Fewer different images are seen by the distances alone."""
    for value in curves["collapse"]["clip_score"][:3]:
        assert value == pytest.approx(curves["collapse"]["clip_score"][0], rel=0.1)
    for value in curves["collapse"]["geneval"]:
        assert value > 0.9
