"""The shapes world's text encoder: interface, determinism, and linear probes of what its features hold."""

from __future__ import annotations

import pytest
import torch

from assets.recipes.train_shapes_text import initial_model, questions, train
from emmdit.encoders.base import TextConditioner
from emmdit.evaluation.geneval import TASKS
from emmdit.shapes import ShapesText, ShapesWorld
from emmdit.shapes.text import shapes_tokenizer

WORLD = ShapesWorld(split="all")
PROMPTS = [spec.captions[i % 16] for task in TASKS for i, spec in enumerate(WORLD.specs(task)[::30])]


@pytest.fixture(scope="module")
def text() -> ShapesText:
    return ShapesText(with_mask=True)


def test_interface(text):
    condition = text(PROMPTS)
    hidden, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"]
    assert isinstance(text, TextConditioner)
    assert hidden.shape == (len(PROMPTS), text.max_length, text.caption_channels) == (len(PROMPTS), 16, 64)
    assert hidden.dtype == torch.float32 and not hidden.requires_grad
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [len(p.split()) + 1 for p in PROMPTS]  # <bos> too
    assert not (~mask[:, :-1] & mask[:, 1:]).any()  # padding is at the right
    assert set(ShapesText()(["a photo of a star"])) == {"encoder_hidden_states"}
    assert text.components()["text_encoder"] is text.model


def test_tokenizer_is_one_token_a_word_and_pads_right():
    tokenizer = shapes_tokenizer()
    assert tokenizer.padding_side == "right" and tokenizer.pad_token_id != tokenizer.bos_token_id
    ids = tokenizer("A photo of a RED circle")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "a", "photo", "of", "a", "red", "circle"]
    captions = [caption for task in TASKS for spec in WORLD.specs(task) for caption in spec.captions]
    ids = tokenizer(captions)["input_ids"]
    assert max(map(len, ids)) == 12 and not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_null_is_the_empty_prompt(text):
    null = text.null(3)
    assert null["encoder_hidden_states"].shape == (3, 16, 64)
    assert torch.equal(null["encoder_hidden_states"][2], text([""])["encoder_hidden_states"][0])
    assert null["encoder_attention_mask"].sum(1).tolist() == [1, 1, 1]
    assert torch.isfinite(null["encoder_hidden_states"]).all()


def test_weights_are_the_same_each_time_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = ShapesText().model
    assert torch.equal(torch.get_rng_state(), before)
    assert not a.training and not any(p.requires_grad for p in a.parameters())
    first, again, other = initial_model(1), initial_model(1), initial_model(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_features_do_not_depend_on_batch_or_cache():
    prompts = PROMPTS
    together = ShapesText()(prompts)["encoder_hidden_states"]
    small = ShapesText(cache_size=2)
    alone = torch.cat([small([p])["encoder_hidden_states"] for p in reversed(prompts)]).flip(0)
    assert torch.equal(together, alone)
    assert len(small._cache) == 2
    assert torch.equal(small(prompts[:1])["encoder_hidden_states"][0], together[0])
    assert torch.equal(ShapesText(cache_size=0)(prompts)["encoder_hidden_states"], together)


def test_the_caller_cannot_change_cached_features():
    text = ShapesText()
    first = text(["a photo of a star"])["encoder_hidden_states"]
    kept = first.clone()
    first.zero_()
    assert torch.equal(text(["a photo of a star"])["encoder_hidden_states"], kept)


def test_unknown_words_are_named_with_the_vocabulary(text):
    with pytest.raises(ValueError, match="'pink', 'dog'.*'a photo of a pink dog'.*circle, picture") as e:
        text(["a photo of a star", "a photo of a pink dog"])
    assert all(word in str(e.value) for word in WORLD.vocabulary()) and "<pad>" not in str(e.value)
    with pytest.raises(ValueError, match="<unk>"):
        text(["<unk>"])


def test_long_captions_and_bare_strings_are_refused(text):
    with pytest.raises(ValueError, match=r"a red circle.*\b26\b.*\b16\b"):
        text(["a photo of " + "a red circle and " * 5 + "a star"])
    with pytest.raises(ValueError, match=r"\bcaptions\b"):
        text("a photo of a star")


def test_to_clears_the_cache():
    text = ShapesText()
    text(["a photo of a star"])
    assert text.to(dtype="bfloat16")(["a photo of a star"])["encoder_hidden_states"].dtype == torch.bfloat16
    assert text.dtype == torch.bfloat16 and text.null(1)["encoder_hidden_states"].dtype == torch.bfloat16


# What the features hold. The probes are ridge regressions on one-hot targets, scored on captions left out.


def probe(features: torch.Tensor, labels: torch.Tensor, train: torch.Tensor, test: torch.Tensor) -> float:
    mean, std = features[train].mean(0), features[train].std(0) + 1e-3
    x = torch.nn.functional.pad((features - mean) / std, (0, 1), value=1.0).double()
    y = torch.nn.functional.one_hot(labels).double()
    gram = x[train].T @ x[train] + 0.1 * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x[train].T @ y[train])
    return (((x[test] @ weights).argmax(1)) == labels[test]).double().mean().item()


def split(n: int, share: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[: int(share * n)], order[int(share * n) :]


def side_accuracy(text: ShapesText, place: str) -> float:
    """Of linear probes that tell on which side a shape stands: order and relation bound together."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    specs = WORLD.specs("position")
    hidden = text([s.caption for s in specs])["encoder_hidden_states"]
    last = torch.tensor([len(s.caption.split()) for s in specs])
    features = hidden[torch.arange(len(specs)), last] if place == "last word" else hidden[:, -1]
    scores = []
    for shape in WORLD.shapes:
        sides = [
            "none" if shape not in (s.objects[0][0], s.objects[1][0])
            else s.relation if s.objects[0][0] == shape else opposite[s.relation]
            for s in specs
        ]  # fmt: skip
        labels = torch.tensor([["none", *opposite].index(side) for side in sides])
        scores.append(probe(features, labels, *split(len(specs))))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("place", ["last word", "padding"])
def test_who_stands_where_can_be_read_of_the_pretrained_model_alone(text, place):
    """No sum of what noun, order and relation say by themselves tells the side."""
    random = ShapesText(model=initial_model(), tokenizer=shapes_tokenizer())
    assert side_accuracy(text, place) >= 0.95
    assert side_accuracy(random, place) <= 0.8


@pytest.mark.parametrize("place", ["last word", "padding"])
def test_probes_of_seen_captions_read_unseen_compositions(text, place):
    """What holds of "a red circle" and "a green star" must hold of "a green circle", which no denoiser is shown."""
    worlds = [ShapesWorld(), ShapesWorld(split="unseen")]
    seen, unseen = ([(s, s.captions[i]) for t in TASKS for s in world.specs(t) for i in (0, 13)] for world in worlds)
    hidden = text([caption for _, caption in seen + unseen])["encoder_hidden_states"]
    last = torch.tensor([len(caption.split()) for _, caption in seen + unseen])
    features = hidden[torch.arange(len(last)), last] if place == "last word" else hidden[:, -1]
    rows = torch.arange(len(last))
    answers = [questions(spec, WORLD) for spec, _ in seen + unseen]
    for question in answers[0]:
        labels = torch.tensor([of_spec[question][0] for of_spec in answers])
        right = probe(features, labels, rows[: len(seen)], rows[len(seen) :])
        assert right >= 0.97, question


def test_the_recipe_learns_what_captions_ask_for():
    _, scores = train(steps=60, per_task=8, report=0)  # after one step they are 0
    assert scores["seen"]["single_object at the last padding"] > 0.6


def test_features_have_about_unit_scale(text):
    captions = [caption for task in TASKS for s in WORLD.specs(task) for caption in s.captions][::5]
    tokens = text.tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
    hidden = text.model(**tokens).last_hidden_state
    assert torch.allclose(hidden.square().mean(dim=(0, 1)), torch.ones(64), atol=0.05)
    std = hidden.std(dim=(0, 1))
    assert std.median() > 0.7 and std.max() < 1.1 and hidden.abs().max() < 8


def test_captions_differ_also_at_the_padding(text):
    a, b = text(["a photo of a red circle", "a photo of a blue circle"])["encoder_hidden_states"]
    assert torch.allclose(a[:5], b[:5], atol=1e-5)  # causal: the same words before
    assert ((a[5:] - b[5:]).abs().amax(1) > 0.05).all()
