"""The CLIP of the shapes world: its recipe, and the weights in `assets/shapes_clip`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from assets.recipes import train_shapes_clip as script
from assets.recipes.shapes_truth import Captions, patch_targets
from emmdit.encoders import CLIPVision
from emmdit.evaluation.geneval import TASKS, Detection, judge
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.shapes import ShapesWorld, render_scene
from emmdit.shapes.text import shapes_tokenizer

ASSET = Path(__file__).parents[1] / "assets" / "shapes_clip"
WORLD = ShapesWorld(split="all")


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return CLIP(str(ASSET))


def renders(scenes: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([render_scene(scene) for scene in scenes])).permute(0, 3, 1, 2)


# -- ground truth ------------------------------------------------------------------------------------


def test_truth_agrees_with_the_judge() -> None:
    """GenEval's judge, given the true objects, agrees with every caption marked true or false."""
    captions, seen = Captions(WORLD), set()
    assert len(captions.texts) == len(set(captions.texts)) == 460
    for i in range(120):
        scene = WORLD.sample(7, i)
        detections = [Detection(o.shape, 1.0, o.box) for o in scene.objects]
        color = {id(d): o.color for d, o in zip(detections, scene.objects, strict=True)}
        truth = captions.truth(scene)
        assert truth[captions.index[scene.spec.caption]] == 1
        for spec, value in zip(captions.specs, truth.tolist(), strict=True):
            if value == value:
                verdict = judge(spec.metadata, detections, lambda found, _: [color[id(d)] for d in found])  # noqa: B023
                assert verdict.correct == (value == 1), (scene, spec.caption, verdict.reason)
                seen.add((spec.task, value))
    assert seen == {(task, value) for task in TASKS for value in (0.0, 1.0)}


def test_contrast_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0], [1.0, 0.0, 0.0, 0.0]])
    truth = torch.tensor([[1.0, 1.0, 0.0, torch.nan], [0.0, 0.0, 0.0, 0.0]])  # the last row has no true one
    expected = np.mean([np.log1p(np.exp(0.0 - 2.0)), np.log1p(np.exp(0.0 - 1.0))])
    assert script.contrast(logits, truth).item() == pytest.approx(expected, rel=1e-5)


def test_the_tokenizer_ends_every_caption() -> None:
    tokenizer = shapes_tokenizer(script.MAX_LENGTH, eos=True)
    texts = [caption for spec in Captions(WORLD).specs for caption in spec.captions]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    assert ids.shape[1] <= script.MAX_LENGTH
    assert (ids == tokenizer.eos_token_id).sum(1).eq(1).all()
    assert tokenizer.eos_token_id != 2  # with id 2 CLIP pools at the highest id of all
    assert tokenizer.unk_token_id not in ids
    assert len({tuple(row) for row in ids.tolist()}) == len(texts)


# -- the script --------------------------------------------------------------------------------------


def test_script_writes_a_clip_that_loads(tmp_path: Path) -> None:
    script.main(["--out", str(tmp_path / "my_clip"), "--steps", "4", "--scenes", "8"])
    made = CLIP(str(tmp_path / "my_clip"))
    assert made.name == "my"
    assert made.images(renders([WORLD.sample(0, 0)])).shape == (1, script.DIM)
    assert "| color_attr |" in (tmp_path / "my_clip" / "README.md").read_text()


def test_training_is_deterministic() -> None:
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in script.train(WORLD, 2, 8, 3e-3, seed)[0].parameters()])

    first = run(0)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))


# -- the weights -------------------------------------------------------------------------------------


def test_asset_is_small_and_complete(clip: CLIP) -> None:
    assert sum(file.stat().st_size for file in ASSET.iterdir()) <= 3_000_000
    names = {file.name for file in ASSET.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"} <= names
    clip.prepare("cpu")
    assert (clip.name, clip.dim, clip.max_length) == ("shapes", script.DIM, script.MAX_LENGTH)
    assert all(p.isfinite().all() for p in clip.model.parameters())


def test_the_card_holds_on_other_scenes(clip: CLIP) -> None:
    card = (ASSET / "README.md").read_text()
    claimed = {(t, k): float(a) for t, k, a in re.findall(r"^\| (\w+) \| ([\w ]+) \| ([\d.]+) \|", card, re.M)}
    found = {(r["task"], r["against"]): r for r in script.scores(clip, WORLD, 60, seed=5)}
    assert claimed.keys() == found.keys()
    for key, row in found.items():
        deviation = (claimed[key] * (1 - claimed[key]) / row["choices"]) ** 0.5
        assert abs(row["accuracy"] - claimed[key]) < 4 * deviation + 0.02, (key, row, claimed[key])
    for kind, least in {"color": 0.95, "shape": 0.95, "count": 0.95, "colors swapped": 0.9}.items():
        assert min(row["accuracy"] for (_, k), row in found.items() if k == kind) >= least
    assert min(row["accuracy"] for (_, k), row in found.items() if k in ("opposite relation", "other axis")) > 0.9


def test_words_it_does_not_know_are_refused(clip: CLIP) -> None:
    with pytest.raises(ValueError, match="a photo of a dog"):
        clip.texts(["a photo of a red circle", "a photo of a dog"])


def test_patch_features_show_what_lies_where() -> None:
    """A linear probe on the 8 x 8 patch tokens names held-out patches' shape and color; one on the pixels does not."""
    encoder = CLIPVision(str(ASSET), image_size=32, feature_dim=script.VISION["hidden_size"], patch_size=4)
    scenes = [WORLD.sample(11, i) for i in range(300)]
    images = renders(scenes).float() / 127.5 - 1
    features = encoder(images)
    assert encoder.grid(32, 32) == (8, 8)
    assert features.shape == (300, 64, script.VISION["hidden_size"])
    classes = torch.from_numpy(np.stack([patch_targets(scene, 4)[0] for scene in scenes]))
    wanted = torch.nn.functional.one_hot(classes).float()

    def right(x: torch.Tensor) -> float:
        """Of 25 kinds, among patches that show an object."""
        x = torch.cat([x, torch.ones(300, 64, 1)], -1)
        probe = torch.linalg.lstsq(x[:200].flatten(0, 1), wanted[:200].flatten(0, 1)).solution
        hits, objects = (x[200:] @ probe).argmax(-1) == classes[200:], classes[200:] > 0
        return hits[objects].float().mean().item()

    pixels = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    assert right(features) > 0.75 > 2 * right(pixels)
