"""GenEval's detectors: the shapes reader, Mask2Former with mmdet's formulas, CLIP's colors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from emmdit.encoders.loading import MissingModelError
from emmdit.evaluation.geneval import CLASSES, COLORS, TASKS, CLIPColors, Detection, Mask2Former, judge
from emmdit.evaluation.geneval.mask2former import probe_image, same_outputs
from emmdit.shapes import PALETTE, SHAPES, Scene, ShapesDetector, ShapesWorld, render_scene

# -------------------------------------------------------------------------------- the shapes world

SCENES = 600


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """As many of each task."""
    worlds = [ShapesWorld(task_weights=tuple(float(t == task) for t in TASKS)) for task in TASKS]
    return [world.sample(11, i) for world in worlds for i in range(SCENES // len(worlds))]


def correct(metadata: dict, image: np.ndarray) -> bool:
    detector = ShapesDetector()
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    (detections,) = detector(pixels[None])
    return judge(metadata, detections, lambda found, name: detector.colors(pixels, found, name)).correct


def test_ground_truth_is_judged_right(scenes: list[Scene]):
    right = [correct(scene.metadata, render_scene(scene)) for scene in scenes]
    assert np.mean(right) >= 0.99


def rendered_otherwise(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene's image with one thing changed, so that its prompt is not met."""
    objects, which = list(scene.objects), int(rng.integers(len(scene.objects)))
    if scene.task == "counting":
        del objects[which]
    elif scene.task == "position":
        image = render_scene(scene)
        return image[:, ::-1].copy() if scene.spec.relation in ("left of", "right of") else image[::-1].copy()
    elif scene.task in ("colors", "color_attr"):
        color = rng.choice([c for c in PALETTE if c != objects[which].color])
        objects[which] = replace(objects[which], color=str(color))
    else:
        shape = rng.choice([s for s in SHAPES if s not in {o.shape for o in objects}])
        objects[which] = replace(objects[which], shape=str(shape))
    return render_scene(replace(scene, objects=tuple(objects)))


def test_near_misses_are_judged_wrong(scenes: list[Scene]):
    rng = np.random.default_rng(0)
    wrong = [correct(scene.metadata, rendered_otherwise(scene, rng)) for scene in scenes]
    for task in TASKS:  # wrong color, count and side each by itself
        assert np.mean([w for w, scene in zip(wrong, scenes, strict=True) if scene.task == task]) <= 0.01, task


def test_images_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="uint8.*float32"):
        ShapesDetector()(torch.rand(1, 3, 32, 32))


# -------------------------------------------------------------------------------- Mask2Former


class NoColors:
    color_names = COLORS

    def prepare(self, device) -> None:
        pass

    def settings(self) -> dict:
        return {}


def tiny_mask2former(folder: Path, num_labels: int = 80) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], out_features=stages)
    widths = "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"
    counts = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=20, num_labels=num_labels)
    config = Mask2FormerConfig(backbone_config=swin, **dict.fromkeys(widths, 32), **counts)
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight *= 30  # classes and queries that differ
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mask2former(tmp_path_factory.mktemp("mask2former"))


def small(folder: Path, **more) -> Mask2Former:
    return Mask2Former(str(folder), NoColors(), **{"img_scale": (133, 80), "score_threshold": -1.0} | more)


def bilinear(n: int, m: int) -> np.ndarray:
    """(m, n) weights that resize n samples to m, half-pixel centers, edges repeated."""
    weights = np.zeros((m, n))
    for i in range(m):
        x = np.clip((i + 0.5) * n / m - 0.5, 0, n - 1)
        low = int(x)
        weights[i, low] += 1 - (x - low)
        weights[i, min(low + 1, n - 1)] += x - low
    return weights


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., h, w)"""
    return bilinear(image.shape[-2], height) @ image @ bilinear(image.shape[-1], width).T


def sizes_by_hand(h: int, w: int) -> tuple[int, int, int, int]:
    """Height and width in (133, 80), and padded."""
    factor = min(133 / max(h, w), 80 / min(h, w))
    new_h, new_w = int(h * factor + 0.5), int(w * factor + 0.5)
    return new_h, new_w, -(-new_h // 32) * 32, -(-new_w // 32) * 32


def pixels_by_hand(image: np.ndarray) -> np.ndarray:
    """mmdet's preprocessing of one uint8 (3, H, W)."""
    new_h, new_w, pad_h, pad_w = sizes_by_hand(*image.shape[1:])
    canvas = np.zeros((3, pad_h, pad_w))
    for c, (mean, std) in enumerate(zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), strict=True)):
        canvas[c, :new_h, :new_w] = (np.rint(resize(image[c].astype(float), new_h, new_w)) - mean) / std
    return canvas


def found_by_hand(out, h: int, w: int, crop: bool = True) -> list[tuple[str, float, list[int], np.ndarray]]:
    """mmdet's post-processing of the network's outputs for an image (h, w), an instance at a time."""
    new_h, new_w, pad_h, pad_w = sizes_by_hand(h, w)
    mask_logits = resize(out.masks_queries_logits[0].double().numpy(), pad_h, pad_w)
    mask_logits = resize(mask_logits[:, :new_h, :new_w] if crop else mask_logits, h, w)
    pairs = []
    for query, logits in enumerate(out.class_queries_logits[0].double().numpy()):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        pairs += [(p[k], k, query) for k in range(len(p) - 1)]
    found = []
    for probability, label, query in sorted(pairs, reverse=True)[:100]:
        mask = mask_logits[query] > 0
        inside = mask_logits[query][mask]
        score = probability * (1 / (1 + np.exp(-inside))).sum() / (mask.sum() + 1e-6)
        rows, columns = np.where(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if mask.any() else [0, 0, 0, 0]
        found.append((CLASSES[label], float(score), [int(v) for v in box], mask))
    return found


@pytest.mark.parametrize("size", [(40, 100), (90, 50), (64, 64)])
def test_detections_are_mmdets(folder: Path, size: tuple[int, int]):
    detector = small(folder)
    image = probe_image()[:, 60 : 60 + size[0], 30 : 30 + size[1]].contiguous()
    pixels, unpadded = detector.preprocess(image[None])
    assert (*unpadded, *pixels.shape[-2:]) == sizes_by_hand(*size)
    difference = np.abs(pixels[0].numpy() - pixels_by_hand(image.numpy()))
    assert difference.max() < 1.01 / 57.12 and (difference < 1e-5).mean() > 0.95  # halves may round to either side

    (found,) = detector(image[None])
    with torch.no_grad():
        out = detector.model(pixel_values=pixels)
    expected = found_by_hand(out, *size)
    assert len(found) == len(expected) == 100
    assert [d.class_name for d in found] == [name for name, *_ in expected]
    np.testing.assert_allclose([d.score for d in found], [score for _, score, *_ in expected], rtol=1e-3)
    boxes, boxes_by_hand = np.array([d.box for d in found]), np.array([box for _, _, box, _ in expected])
    assert np.abs(boxes - boxes_by_hand).max() <= 1  # a logit of nearly 0 may have either sign
    assert (boxes == boxes_by_hand).all(1).mean() > 0.9
    assert all(d.mask.shape == size for d in found)
    assert np.mean([(d.mask.numpy() == mask).mean() for d, (*_, mask) in zip(found, expected, strict=True)]) > 0.999
    # The comparison would see a shift by the padding, and the model finds more than one box and score.
    assert len({d.box for d in found}) > 1 and np.ptp([d.score for d in found]) > 0.01
    if size[0] != size[1]:
        shifted = np.array([box for _, _, box, _ in found_by_hand(out, *size, crop=False)])
        assert (shifted == boxes).all(1).mean() < 0.9


def test_batches_and_threshold(folder: Path):
    images = torch.stack([probe_image()[:, :48, :64], probe_image()[:, 100:148, 100:164], probe_image()[:, -48:, -64:]])
    alone, together = small(folder, batch_size=1)(images), small(folder, batch_size=2)(images)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose([d.score for d in one], [d.score for d in other], rtol=1e-3)
    threshold = sorted(d.score for d in alone[0])[50]
    kept = small(folder, batch_size=1, score_threshold=threshold)(images)[0]
    assert [d.score for d in kept] == [d.score for d in alone[0] if d.score > threshold] and len(kept) == 49


def test_settings_name_the_weights(folder: Path):
    settings = small(folder).settings()
    assert len(settings["sha256"]["model.safetensors"]) == 64
    assert settings["img_scale"] == [133, 80] and settings["postprocessing"] == "mmdet"


def test_unusable_weights_are_refused(tmp_path: Path):
    with pytest.raises(MissingModelError, match="/none"):
        small(tmp_path / "none").prepare("cpu")
    with pytest.raises(MissingModelError, match="HF_HUB_OFFLINE"):
        Mask2Former(color_classifier=NoColors()).prepare("cpu")
    with pytest.raises(ValueError, match=r"Mask2Former.*\b3\b.*\b80\b"):
        small(tiny_mask2former(tmp_path / "three", 3)).prepare("cpu")


def test_a_device_that_computes_garbage_is_found_out(folder: Path):
    detector = small(folder)
    detector.prepare("cpu")
    outputs = detector._self_check_outputs()
    device = torch.device("cuda")
    same_outputs([x * (1 + 0.01 * torch.randn_like(x)) for x in outputs], outputs, device)
    wrong = ([torch.zeros_like(x) for x in outputs], [x.flip(-1) for x in outputs], [x * torch.nan for x in outputs])
    for garbage in wrong:
        with pytest.raises(RuntimeError, match=r"\bcuda\b.*%"):
            same_outputs(garbage, outputs, device)


@pytest.mark.gpu
def test_on_a_gpu(folder: Path):
    detector, image = small(folder), probe_image()[None, :, :48, :64]
    expected = detector(image)[0]
    detector.prepare("cuda")
    np.testing.assert_allclose([d.score for d in detector(image)[0]], [d.score for d in expected], rtol=0.05)


# -------------------------------------------------------------------------------- colors

RGB = dict(
    red=(200, 20, 20), orange=(240, 130, 0), yellow=(240, 230, 0), green=(0, 150, 0), blue=(20, 20, 200),
    purple=(130, 0, 130), pink=(250, 150, 190), brown=(110, 60, 20), black=(0, 0, 0), white=(255, 255, 255),
)  # fmt: skip


class SeesColors:
    """In place of CLIP: a text is its color word, an image the color of most of its pixels (gray #999 aside)."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.crops: list[Tensor] = []

    def texts(self, texts: list[str]) -> Tensor:
        self.asked.append(texts)
        return torch.tensor([[float(c in t.replace("-", " ").split()) for c in COLORS] for t in texts])

    def images(self, images: Tensor) -> Tensor:
        self.crops.append(images)
        pixels = images[0].flatten(1).T.float()
        pixels = pixels[(pixels != 0x99).any(1)]
        distances = torch.cdist(pixels, torch.tensor(list(RGB.values())).float())
        counts = torch.bincount(distances.argmin(1), minlength=len(COLORS)).float()
        return torch.nn.functional.normalize(counts, dim=0)[None]


def test_each_color_is_seen_through_its_mask():
    for color, ground in itertools.permutations(RGB, 2):
        image = torch.tensor(RGB[ground], dtype=torch.uint8).view(3, 1, 1).repeat(1, 20, 30)
        mask = torch.zeros(20, 30, dtype=torch.bool)
        mask[5:15, 8] = mask[9, 8:20] = True  # two lines: most of the box is ground
        image[:, mask] = torch.tensor(RGB[color], dtype=torch.uint8)[:, None]
        image[:, 0, 0] = 7
        clip = SeesColors()
        objects = [Detection("cup", 0.9, (8, 5, 20, 15), mask), Detection("cup", 0.8, (8, 5, 20, 15), mask.numpy())]
        assert CLIPColors(clip)(image, objects, "cup") == [color, color]
        assert CLIPColors(clip)(image, [Detection("cup", 0.9, (8, 5, 20, 15))], "cup") == [ground]
        crop = clip.crops[0][0]
        assert crop.shape == (3, 10, 12) and (crop[:, ~mask[5:15, 8:20]] == 0x99).all()


def test_boxes_beyond_the_image_are_cut_to_it():
    clip, image = SeesColors(), torch.zeros(3, 20, 30, dtype=torch.uint8)
    boxes = [(-3.0, -2.0, 50.0, 60.0), (29.7, 19.6, 40.0, 40.0), (4.2, 4.2, 4.4, 4.4)]
    assert CLIPColors(clip)(image, [Detection("cup", 1.0, box) for box in boxes], "cup") == ["black"] * 3
    assert [tuple(crop.shape[-2:]) for crop in clip.crops] == [(20, 30), (1, 1), (1, 1)]


def test_texts_are_asked_once_a_class():
    clip, image = SeesColors(), torch.zeros(3, 8, 8, dtype=torch.uint8)
    colors, cup = CLIPColors(clip), Detection("wine glass", 1.0, (0, 0, 8, 8))
    for name in ("wine glass", "wine glass", "cup"):
        colors(image, [cup], name)
    assert len(clip.asked) == 2
    assert sorted(t for t in clip.asked[0] if "pink" in t) == [
        "a photo of a pink object",
        "a photo of a pink wine glass",
        "a photo of a pink-colored wine glass",
    ]


def test_the_text_of_a_color_is_the_normalized_mean_of_its_templates():
    generator = np.random.default_rng(0)
    vectors: dict[str, np.ndarray] = {}

    class Random(SeesColors):
        def texts(self, texts: list[str]) -> Tensor:
            for text in texts:
                vector = generator.normal(size=6)
                vectors[text] = vector / np.linalg.norm(vector)
            return torch.from_numpy(np.stack([vectors[text] for text in texts])).float()

    found = CLIPColors(Random())._classifier("cup")
    for row, color in zip(found.numpy(), COLORS, strict=True):
        mean = sum(v for text, v in vectors.items() if color in text.replace("-", " ").split()) / 3
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
