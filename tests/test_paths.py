"""Paths: conversions invert each other, and EpsilonDDPM is diffusers' DDPM."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emmdit.flow import EpsilonDDPM, MinSNR, RectifiedFlow, RelativeLoss, flow_loss, sample, schedule

PATHS = [RectifiedFlow(), EpsilonDDPM(), EpsilonDDPM(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")]


def triple(seed, t, dtype=torch.float64):
    x0, noise = torch.randn(2, len(t), 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x0, noise, torch.tensor(t, dtype=dtype)


@pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "scaled"])
@settings(max_examples=40, deadline=None)
@given(t=st.lists(st.floats(0, 1000), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_conversions_invert_each_other(path, t, seed):
    x0, noise, t = triple(seed, t)
    x_t = path.interpolate(x0, noise, t)
    target = path.target(x0, noise, t)
    torch.testing.assert_close(path.to_x0(x_t, target, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.to_noise(x_t, target, t), noise, rtol=1e-9, atol=1e-9)

    prediction = torch.randn_like(x0)  # any prediction splits x_t into its own x0 and noise
    x0, noise = path.to_x0(x_t, prediction, t), path.to_noise(x_t, prediction, t)
    torch.testing.assert_close(path.interpolate(x0, noise, t), x_t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.target(x0, noise, t), prediction, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "scaled"])
def test_scalar_and_batched_t_agree_and_float32_is_enough(path):
    x0, noise, _ = triple(0, [0.0] * 3, torch.float32)
    for t in (0.0, 1.0, 500.5, 999.0, 1000.0):
        x_t = path.interpolate(x0, noise, torch.tensor(t))
        assert torch.equal(x_t, path.interpolate(x0, noise, torch.full((3,), t)))
        back = path.to_x0(x_t, path.target(x0, noise, torch.tensor(t)), torch.tensor(t))
        assert back.isfinite().all()
        torch.testing.assert_close(back, x0, rtol=0, atol=2e-4)  # 1e-7 / alpha where alpha is smallest


@pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "scaled"])
def test_bfloat16_is_computed_in_float32(path):
    x0, noise, t = triple(0, [300.0, 700.0], torch.bfloat16)
    x_t = path.interpolate(x0, noise, t)
    assert x_t.dtype == path.target(x0, noise, t).dtype == torch.float32
    for time in (t, t[0]):
        assert path.to_x0(x_t.bfloat16(), noise, time).dtype == torch.float32
        assert path.to_noise(x_t.bfloat16(), noise, time).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(t=st.lists(st.floats(1, 1000), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_conversions_of_x0_prediction_invert_each_other_above_zero(t, seed):
    path = RectifiedFlow("x0")
    x0, noise, t = triple(seed, t)
    x_t, target = path.interpolate(x0, noise, t), path.target(x0, noise, t)
    torch.testing.assert_close(path.to_x0(x_t, target, t), x0)
    torch.testing.assert_close(path.to_noise(x_t, target, t), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_solver"])
def test_x0_and_velocity_prediction_of_one_network_sample_alike(sampler):
    """The best x0 for standard normal data is (1 - s) x_t / (s^2 + (1 - s)^2)."""
    noise = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def x0_of(x, t):
        s = t / 1000
        return (1 - s) * x / (s**2 + (1 - s) ** 2)

    velocity = sample(lambda x, t: (x - x0_of(x, t)) / (t / 1000), noise, RectifiedFlow(), schedule(8), sampler)
    data = sample(x0_of, noise, RectifiedFlow("x0"), schedule(8), sampler)
    torch.testing.assert_close(data, velocity, rtol=1e-5, atol=1e-5)


def test_rectified_flow_by_hand():
    path = RectifiedFlow()
    x0, noise, t = torch.tensor([[2.0], [2.0]]), torch.tensor([[-1.0], [-1.0]]), torch.tensor([250.0, 1000.0])
    torch.testing.assert_close(path.interpolate(x0, noise, t), torch.tensor([[1.25], [-1.0]]))
    torch.testing.assert_close(path.target(x0, noise, t), torch.tensor([[-3.0], [-3.0]]))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_ddpm_is_diffusers_ddpm_on_the_integers(schedule):
    from diffusers import DDPMScheduler

    path = EpsilonDDPM(beta_schedule=schedule)
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule=schedule)
    t = torch.arange(1000)
    alpha, sigma = path.alpha_sigma(t)
    torch.testing.assert_close(alpha, scheduler.alphas_cumprod.sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(sigma, (1 - scheduler.alphas_cumprod).sqrt(), rtol=5e-4, atol=0)
    x0, noise, t = triple(0, [0.0, 17.0, 999.0], torch.float32)
    torch.testing.assert_close(
        path.interpolate(x0, noise, t), scheduler.add_noise(x0, noise, t.long()), rtol=1e-4, atol=1e-5
    )


def test_ddpm_between_and_beyond_the_integers():
    path = EpsilonDDPM()
    alpha, sigma = path.alpha_sigma(torch.tensor([999.0, 1000.0, 10.0, 10.5, 11.0], dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    assert alpha[0] == alpha[1]
    torch.testing.assert_close(alpha[3], (alpha[2] * alpha[4]).sqrt())
    # 0.0001 is the first beta: sigma at t = 0 keeps its digits in float32
    assert path.alpha_sigma(torch.tensor(0.0))[1].item() == pytest.approx(0.01, rel=1e-6)


def test_ddpm_with_another_number_of_steps_keeps_the_scale():
    short = EpsilonDDPM(num_train_timesteps=100, beta_start=0.001, beta_end=0.2)
    by_hand = torch.cumprod(1 - torch.linspace(0.001, 0.2, 100, dtype=torch.float64), 0).sqrt()
    torch.testing.assert_close(short.alpha_sigma(torch.tensor([0.0, 500.0, 990.0]).double())[0], by_hand[[0, 50, 99]])


NONSENSE = [(EpsilonDDPM, "beta_start", value) for value in (0.0, 0.1)]
NONSENSE += [
    (EpsilonDDPM, *case) for case in (("beta_end", 1.0), ("beta_schedule", "cosine"), ("num_train_timesteps", 1))
]
NONSENSE += [(RectifiedFlow, "prediction", "noise"), (RelativeLoss, "bins", 0), (RelativeLoss, "decay", 1.0)]
NONSENSE += [(MinSNR, "gamma", value) for value in (0.0, -1.0, float("inf"), float("nan"))]


@pytest.mark.parametrize(("kind", "name", "value"), NONSENSE)
def test_arguments_are_checked(kind, name, value):
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})


def test_t_must_fit_the_batch():
    with pytest.raises(ValueError, match=r"\b3\b.*\(2,\)"):
        RectifiedFlow().interpolate(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2))


def test_flow_loss():
    prediction, target = (torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]]))
    torch.testing.assert_close(flow_loss(prediction, target), torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(flow_loss(prediction, target, torch.tensor([0.0, 3.0])), torch.tensor([0.0, 6.0]))
    assert flow_loss(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(2, 1, 2\).*\(1, 1, 2\)"):
        flow_loss(prediction, target[:1])


def test_min_snr_of_noise_prediction():
    path, t = EpsilonDDPM(), torch.tensor([0.0, 100.0, 300.0, 600.0, 999.0])
    alpha, sigma = path.coefficients(t.double())
    snr = alpha**2 / sigma**2
    assert snr[1] > 5 > snr[2]
    torch.testing.assert_close(MinSNR()(path, t, torch.ones(len(t))), torch.where(snr < 5, 1.0, 5 / snr).float())


def test_min_snr_weighs_the_same_error_of_x0_alike_whatever_is_predicted():
    """The weighted loss of an error d in x0 is min(SNR, gamma) d^2 for noise and for flow prediction."""
    x0, noise, error = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for path in (EpsilonDDPM(), RectifiedFlow()):
        t = torch.tensor([50.0, 200.0, 400.0, 600.0, 800.0, 950.0])
        alpha, sigma = (c.double()[:, None] for c in path.coefficients(t.double()))
        x_t = path.interpolate(x0, noise, t)
        wrong_noise = (x_t - alpha * (x0 + error)) / sigma
        prediction = path.target(x0 + error, wrong_noise, t)
        torch.testing.assert_close(path.to_x0(x_t, prediction, t), x0 + error, rtol=1e-4, atol=1e-4)
        loss = flow_loss(prediction, path.target(x0, noise, t), MinSNR(0.5)(path, t, torch.ones(len(t))))
        wanted = (alpha**2 / sigma**2).clamp(max=0.5)[:, 0] * error.square().mean(1)
        torch.testing.assert_close(loss, wanted.float(), rtol=1e-3, atol=0)


def test_relative_loss_makes_all_timesteps_count_alike():
    """Whatever the scale of the loss is at a timestep, also one that changes, its weighted mean tends to 1."""
    weight, g = RelativeLoss(bins=4, decay=0.9), torch.Generator().manual_seed(0)
    weighted = []
    for step in range(400):
        t = 1000 * torch.rand(32, generator=g)
        scale = torch.tensor([0.01, 0.1, 1.0, 10.0])[(t / 250).long()] * (3.0 if step > 200 else 1.0)
        loss = scale * (0.5 + torch.rand(32, generator=g))
        weighted.append((weight(RectifiedFlow(), t, loss) * loss, (t / 250).long()))
    each = torch.cat([values for values, _ in weighted[-100:]])
    bins = torch.cat([index for _, index in weighted[-100:]])
    for index in range(4):
        assert each[bins == index].mean().item() == pytest.approx(1, abs=0.05)
    assert weight.state_dict()["mean"].tolist() == pytest.approx([0.03, 0.3, 3.0, 30.0], rel=0.2)


def test_relative_loss_is_not_poisoned_and_takes_the_ends():
    weight = RelativeLoss(bins=2)
    t, loss = torch.tensor([0.0, 1000.0]), torch.tensor([2.0, 4.0])
    assert weight(RectifiedFlow(), t, loss).tolist() == [0.5, 0.25]
    assert not weight(RectifiedFlow(), t, torch.tensor([float("nan"), 4.0])).isnan().any()
    assert weight(RectifiedFlow(), t, loss).tolist() == [0.5, 0.25]
    assert weight(RectifiedFlow(), t[:1], torch.zeros(1)).isfinite().all()
