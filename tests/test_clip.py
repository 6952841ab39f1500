"""`CLIP` and `CLIPVision` against transformers itself, on a tiny random CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emmdit.encoders import CLIPVision, MissingModelError, standin
from emmdit.encoders.loading import locate
from emmdit.evaluation.metrics.clip import CLIP, PUBLISHED, check_published, short_name
from emmdit.files import sha256_of

STANDIN = "standin:clip_model"


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return CLIP(STANDIN)


def random_images(n: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("openai/clip-vit-large-patch14", "vitl14"),
        ("openai/clip-vit-large-patch14-336", "vitl14_336"),
        ("openai/clip-vit-base-patch32", "vitb32"),
        ("models/clip-vit-base-patch16/", "vitb16"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "vit_h_14_laion2b_s32b_b79k"),
        ("assets/shapes_clip", "shapes"),
    ],
)
def test_names(source: str, name: str) -> None:
    assert short_name(source) == name
    assert CLIP(source).name == name  # nothing is loaded
    assert CLIP(source, name="mine").name == "mine"


def test_vectors_are_those_of_transformers(clip: CLIP) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(standin("clip_model")).eval()
    tokens = AutoTokenizer.from_pretrained(standin("clip_model"))(["a red circle"], return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=(random_images().float() / 255 - mean) / std).pooler_output
        said = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(clip.images(random_images()), F.normalize(seen, dim=-1))
    torch.testing.assert_close(clip.texts(["a red circle"]), F.normalize(said, dim=-1))
    assert clip.dim == clip.images(random_images()).shape[1] == 32


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (100, 41), (20, 24)])
def test_preprocessing_is_that_of_pillow(clip: CLIP, size: tuple[int, int]) -> None:
    """To the bit what transformers' Pillow processor makes; its torchvision one is off by a level of 255."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(standin("clip_model"))
    images = random_images(2, *size)
    expected = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt").pixel_values
    torch.testing.assert_close(clip.preprocess(images), expected, atol=2e-6, rtol=0)


def test_batches_do_not_change_the_vectors(clip: CLIP) -> None:
    images, texts = random_images(4, 50, 60), ["a star", "a photo of a red circle and a blue square", ""]
    torch.testing.assert_close(clip.images(images), torch.cat([clip.images(x[None]) for x in images]))
    torch.testing.assert_close(clip.texts(texts), torch.cat([clip.texts([x]) for x in texts]))


def test_long_texts_stay_distinct(clip: CLIP) -> None:
    long = [f"{word} and then " * 40 for word in ("circle", "square")]
    one, two = clip.texts(long)
    assert one @ two < 0.999
    # What is beyond the 77 tokens does not matter, what is within does.
    cut = clip.texts([long[0], long[0] + "never read"])
    torch.testing.assert_close(cut[0], cut[1])


def test_refusals(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8.*float32"):
        clip.images(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"uint8.*\(3, 32, 32\)"):
        clip.images(random_images()[0])
    with pytest.raises(ValueError, match=r"\btexts\b"):
        clip.texts("a circle")
    with pytest.raises(MissingModelError, match="hf download openai/clip-vit-large-patch14"):
        CLIP().prepare()
    with pytest.raises(MissingModelError, match="nowhere"):
        CLIP(str(tmp_path / "nowhere")).prepare()
    with pytest.raises(MissingModelError, match=r"dinov2.*\bclip\b"):
        CLIP("standin:dinov2").prepare()


def test_settings_pin_the_weights(clip: CLIP) -> None:
    settings = json.loads(json.dumps(clip.settings()))
    assert len(settings["sha256"]["model.safetensors"]) == 64
    other = CLIP(f"{STANDIN}?seed=1").settings()
    assert other["sha256"] != settings["sha256"]
    assert settings["preprocessing"]["resample"] == "bicubic"
    assert settings["preprocessing"]["size"] == 32
    assert settings["max_length"] == 77


# -- patch features ----------------------------------------------------------------------------------


def vision(source: str = STANDIN, **changes) -> CLIPVision:
    return CLIPVision(source, **dict(image_size=32, feature_dim=16, patch_size=8) | changes)


def test_known_weights_of_the_hub_are_checked_before_they_are_opened(
    clip: CLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(locate(clip.source)[0], "model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(file))
    opened: list[str] = []
    monkeypatch.setattr(CLIP, "_load", lambda self, *args: opened.append(self.source))
    with pytest.raises(MissingModelError, match=f"{file}.*openai/clip-vit-large-patch14"):
        CLIP("openai/clip-vit-large-patch14").prepare()
    assert not opened
    monkeypatch.setitem(PUBLISHED, "openai/clip-vit-large-patch14", sha256_of([file]))
    check_published("openai/clip-vit-large-patch14", None)
    check_published("owner/of-another", None)


def test_patch_features_are_those_of_transformers() -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(standin("clip_model")).eval()
    images = random_images(2).float() / 127.5 - 1
    pixels = CLIP(STANDIN).preprocess(random_images(2))
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    features = vision()(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_the_image_tower_alone_serves_too(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    CLIPModel.from_pretrained(standin("clip_model")).vision_model.save_pretrained(tmp_path)
    CLIPImageProcessor.from_pretrained(standin("clip_model")).save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(vision(str(tmp_path))(images), vision()(images))


def test_grids_follow_the_aspect_ratio() -> None:
    encoder = vision(image_size=64)
    assert encoder.grid(64, 128) == (8, 16)
    assert not encoder.loaded
    assert encoder(torch.zeros(1, 3, 64, 128)).shape == (1, 128, 16)


def test_patch_feature_errors() -> None:
    with pytest.raises(ValueError, match=r"image_size.*\b30\b.*\b8"):
        vision(image_size=30)
    with pytest.raises(ValueError, match=r"feature_dim.*\b8\b.*\b16\b"):
        vision(feature_dim=8).load()
    with pytest.raises(ValueError, match=r"patch_size.*\b4\b.*\b8\b"):
        vision(patch_size=4).load()
    with pytest.raises(MissingModelError, match="openai/clip-vit-large-patch14"):
        CLIPVision().load()
    with pytest.raises(ValueError, match=r"CLIPVision.*\(3, 32, 32\)"):
        vision()(torch.zeros(3, 32, 32))
