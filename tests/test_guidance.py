"""Guidance: the formula, the number and size of the calls, and what is refused."""

import pytest
import torch

from emmdit.flow import classifier_free_guidance


class Denoiser:
    """A function of x, t and the condition that remembers its calls."""

    def __init__(self, dtype=torch.float32):
        self.calls = []
        self.dtype = dtype

    def __call__(self, x, t, condition):
        self.calls.append((x, t, condition))
        text = condition["encoder_hidden_states"].mean((1, 2))
        pooled = condition["pooled_projections"].mean(1)
        return (x * t[:, None] / 1000 + (text * pooled)[:, None]).to(self.dtype)


def condition(batch, value):
    return {
        "encoder_hidden_states": torch.full((batch, 5, 2), value),
        "pooled_projections": torch.full((batch, 3), value),
        "encoder_attention_mask": torch.ones(batch, 5, dtype=torch.bool),
    }


X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
T = torch.tensor(500.0)


def test_formula_and_one_call_of_two_b():
    denoise = Denoiser()
    prediction = classifier_free_guidance(denoise, condition(3, 3.0), condition(3, 2.0), scale=4.5)(X, T)
    torch.testing.assert_close(prediction, X / 2 + 4.0 + 4.5 * (9.0 - 4.0))
    [(x, t, both)] = denoise.calls
    assert torch.equal(x, torch.cat([X, X])) and t.tolist() == [500.0] * 6
    assert both["encoder_hidden_states"][:, 0, 0].tolist() == [2.0] * 3 + [3.0] * 3  # unconditional first
    assert both["encoder_attention_mask"].dtype == torch.bool and both.keys() == condition(3, 0.0).keys()


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_one_call_of_b(scale):
    denoise, given = Denoiser(), condition(3, 3.0)
    prediction = classifier_free_guidance(denoise, given, None, scale)(X, T)
    torch.testing.assert_close(prediction, X / 2 + 9.0)
    [(x, t, seen)] = denoise.calls
    assert x is X and t.shape == (3,) and seen is given


def test_guidance_acts_within_the_interval_and_by_default_everywhere():
    denoise, given = Denoiser(), (condition(3, 3.0), condition(3, 2.0))
    predict = classifier_free_guidance(denoise, *given, scale=2.0, interval=(200.0, 800.0))
    for t in (800.1, 800.0, 500.0, 200.0, 199.9):  # ends included
        predict(X, torch.tensor(t))
    assert [len(x) for x, _, _ in denoise.calls] == [3, 6, 6, 6, 3]
    torch.testing.assert_close(predict(X, torch.tensor(100.0)), X / 10 + 9.0)
    denoise.calls.clear()
    for t in (1000.0, 1.0, 0.0):
        classifier_free_guidance(denoise, *given, scale=2.0)(X, torch.tensor(t))
    assert [len(x) for x, _, _ in denoise.calls] == [6, 6, 6]


def test_null_of_one_row_serves_all():
    wide, narrow = (
        classifier_free_guidance(Denoiser(), condition(3, 3.0), condition(rows, 2.0), scale=2.0)(X, T)
        for rows in (3, 1)
    )
    assert torch.equal(narrow, wide)


def test_bfloat16_halves_are_combined_in_float32():
    predict = classifier_free_guidance(Denoiser(torch.bfloat16), condition(3, 3.0), condition(3, 2.0), scale=2.0)
    assert predict(X, T).dtype == torch.float32


def test_mismatches_are_refused():
    given = condition(3, 3.0)
    for null, match in (
        (None, r"\bscale\b.*\b1\b"),
        ({k: v for k, v in given.items() if k != "pooled_projections"}, "pooled_projections"),
        (given | {"encoder_hidden_states": torch.zeros(3, 6, 2)}, r"encoder_hidden_states.*\(3, 6, 2\)"),
        (given | {"encoder_hidden_states": torch.zeros(2, 5, 2)}, r"encoder_hidden_states.*\(2, 5, 2\)"),
    ):
        with pytest.raises(ValueError, match=match):
            classifier_free_guidance(Denoiser(), given, null, scale=2.0)
    for interval in ((800.0, 200.0), (-1.0, 500.0), (0.0, 1001.0)):
        with pytest.raises(ValueError, match="interval"):
            classifier_free_guidance(Denoiser(), given, given, 2.0, interval)
