import math

import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError
from embodied.core.protocols import Prediction
from policies.conversions import epsilon_of, score_of

MU, SIGMA = 0.2, 0.2
STEPS = 100


def cosine_alpha_bar(n=STEPS):
    """squaredcos_cap_v2, written down independently."""
    f = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return np.cumprod([1 - min(1 - f[i + 1] / f[i], 0.999) for i in range(n)])


ALPHA_BAR = cosine_alpha_bar()


def exact(parameterisation, sigma=SIGMA):
    """The ideal network for N(MU, sigma²); sees the noise level through its time argument."""
    table = torch.from_numpy(ALPHA_BAR)

    def network(x, time):
        a = table[(time * STEPS).round().long()]
        residual = (x - a.sqrt() * MU) / (a * sigma**2 + 1 - a)
        epsilon, sample = (1 - a).sqrt() * residual, MU + a.sqrt() * sigma**2 * residual
        v = a.sqrt() * epsilon - (1 - a).sqrt() * sample
        return {"epsilon": epsilon, "sample": sample, "v_prediction": v}[parameterisation]

    return network


def ddim_affine(timesteps, stride):
    """Mean and variance after DDIM with η = 0 from N(0, 1)."""
    mean, std = 0.0, 1.0
    for t in timesteps:
        a, b = ALPHA_BAR[t], (ALPHA_BAR[t - stride] if t >= stride else 1.0)
        k = math.sqrt(1 - a) / (a * SIGMA**2 + 1 - a)
        eps = (k, -k * math.sqrt(a) * MU)
        x0 = (
            (1 - math.sqrt(1 - a) * eps[0]) / math.sqrt(a),
            -math.sqrt(1 - a) * eps[1] / math.sqrt(a),
        )
        c, d = math.sqrt(b), math.sqrt(1 - b)
        mean, std = (
            (c * x0[0] + d * eps[0]) * mean + c * x0[1] + d * eps[1],
            (c * x0[0] + d * eps[0]) * std,
        )
    return mean, std**2


def sampled_affine(policy):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, 6, 2)
    out = policy.integrate(ends, torch.zeros(2, 10, dtype=torch.float64), None)[:, 0, 0]
    return out[0].item(), (out[1] - out[0]).item() ** 2


def test_schedule_is_the_published_one(make):
    policy = make.policy("diffusion")
    np.testing.assert_allclose(policy.alpha_bar_N.numpy(), ALPHA_BAR, rtol=2e-5)
    for t, value in (
        (0, 0.999369),
        (50, 0.47826),
        (80, 0.0851),
        (90, 0.01954),
        (95, 0.00388),
        (99, 2.43e-7),
    ):
        assert policy.alpha_bar_N[t].item() == pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddim_reproduces_its_closed_form(make, prediction_type):
    options = {"prediction_type": prediction_type, "clip_sample": False}
    leading = make.policy("diffusion", timestep_spacing="leading", **options)
    got = sampled_affine(make.analytic(leading, exact(prediction_type)))
    assert got == pytest.approx((0.19576, 0.022946), abs=2e-5)
    assert got == pytest.approx(ddim_affine(range(90, -1, -10), 10), abs=2e-6)
    trailing = make.policy("diffusion", **options)
    got = sampled_affine(make.analytic(trailing, exact(prediction_type)))
    assert got == pytest.approx(ddim_affine(range(99, 0, -10), 10), abs=2e-5)
    # Trailing starts where x is pure noise and is unbiased; leading is not.
    assert got[0] == pytest.approx(MU, abs=2e-4)


def test_ddpm_reproduces_its_closed_form(make):
    policy = make.policy("diffusion", scheduler="ddpm", clip_sample=False)
    assert len(policy.solver.log_snrs) == 100
    make.analytic(policy, exact("epsilon"))
    variance = 1.0
    for t in range(99, -1, -1):
        a, b = ALPHA_BAR[t], (ALPHA_BAR[t - 1] if t else 1.0)
        x0 = math.sqrt(a) * SIGMA**2 / (a * SIGMA**2 + 1 - a)
        slope = math.sqrt(b) * (1 - a / b) / (1 - a) * x0 + math.sqrt(a / b) * (1 - b) / (1 - a)
        variance = slope**2 * variance + (1 - b) / (1 - a) * (1 - a / b) * (t > 0)
    assert variance == pytest.approx(0.034361, abs=1e-6)
    chunks = policy.sample(make.obs(20), 1000, seed=0).double()
    n = chunks.numel()
    assert chunks.mean().item() == pytest.approx(MU, abs=4 * SIGMA / n**0.5 + 2e-4)
    assert chunks.var().item() == pytest.approx(variance, abs=5 * variance * (2 / n) ** 0.5)


def test_ddpm_noise_of_a_row_depends_on_its_seed_alone(make):
    policy = make.awaken(make.policy("diffusion", scheduler="ddpm", num_steps=20))
    obs, seeds = make.obs(5), np.array([4, 9, 1, 7, 2])
    _, together = policy.act(None, obs, seed=seeds)
    for row in (0, 3):
        _, alone = policy.act(None, {k: v[[row]] for k, v in obs.items()}, seed=seeds[[row]])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-4)


def test_dpmsolver_converges_to_the_gaussian(make):
    def variance(n):
        options = {"scheduler": "dpmsolver++", "clip_sample": False, "num_steps": n}
        policy = make.policy("diffusion", **options)
        mean, variance = sampled_affine(make.analytic(policy, exact("epsilon")))
        assert mean == pytest.approx(MU, abs=2e-3)
        return variance

    assert abs(variance(50) - SIGMA**2) < 0.2 * SIGMA**2
    assert abs(variance(20) - SIGMA**2) < abs(ddim_affine(range(95, -1, -5), 5)[1] - SIGMA**2)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
def test_clip_sample_keeps_the_estimate_within_the_bounds(make, scheduler):
    device = make.device(low=-10.0, high=10.0)
    for clip in (True, False):
        policy = make.policy(
            "diffusion",
            device=device,
            scheduler=scheduler,
            prediction_type="sample",
            clip_sample=clip,
        )
        make.analytic(policy, lambda x, time: torch.full_like(x, 3.0))
        chunk = policy.act(None, make.obs(1), seed=np.array([0]))[1]
        np.testing.assert_allclose(chunk, 10.0, atol=1e-3)  # 1 normalised, or 3 cut at the bound
        out = policy.integrate(torch.zeros(1, 6, 2).double(), torch.zeros(1, 10).double(), None)
        assert out.max().item() == pytest.approx(1.0 if clip else 3.0, abs=1e-3)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++"])
def test_sampling_is_reentrant(make, scheduler):
    """A call made in the middle of another one disturbs neither."""
    policy = make.awaken(make.policy("diffusion", scheduler=scheduler, num_steps=8))
    inner = policy.network
    before = policy.sample(make.obs(2), 1, seed=0)
    calls = []

    class Nested(torch.nn.Module):
        def forward(self, x, time, cond):
            calls.append(0)
            if len(calls) == 4:
                policy.sample(make.obs(3), 2, seed=1)
            return inner(x, time, cond)

    policy.network = Nested()
    torch.testing.assert_close(policy.sample(make.obs(2), 1, seed=0), before, rtol=0, atol=0)
    assert len(calls) == 16


def test_four_parameterisations_give_one_epsilon(make):
    t = torch.arange(0, 99, 7)
    log_snr = torch.logit(torch.from_numpy(ALPHA_BAR)[t])
    x = torch.randn(len(t), 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = torch.zeros(len(t), 10, dtype=torch.float64)

    def flow(x, u):
        return MU + (u * SIGMA**2 - (1 - u)) / (u**2 * SIGMA**2 + (1 - u) ** 2) * (x - u * MU)

    policies = [
        make.analytic(make.policy("diffusion", prediction_type=p), exact(p))
        for p in ("epsilon", "sample", "v_prediction")
    ]
    predictions = [p.denoise(x, log_snr, cond) for p in policies]
    predictions.append(make.analytic(make.policy("flow"), flow).denoise(x, log_snr, cond))
    assert [p.parameterisation for p in predictions] == ["epsilon", "sample", "v", "flow"]
    for prediction in predictions[1:]:
        expected = epsilon_of(predictions[0], x, log_snr)
        torch.testing.assert_close(epsilon_of(prediction, x, log_snr), expected, atol=1e-6, rtol=0)
    a = torch.sigmoid(log_snr)[:, None, None]
    torch.testing.assert_close(
        score_of(predictions[0], x, log_snr), -(x - a.sqrt() * MU) / (a * SIGMA**2 + 1 - a)
    )


def test_an_unknown_parameterisation_is_refused():
    with pytest.raises(ConfigError, match="parameterisation 'eps'"):
        epsilon_of(Prediction(torch.zeros(1, 1, 1), "eps"), torch.zeros(1, 1, 1), torch.zeros(1))  # type: ignore[arg-type]


def test_time_of_a_log_snr_interpolates_and_saturates(make):
    policy = make.policy("diffusion").double()
    log_snr = torch.logit(policy.alpha_bar_N)
    torch.testing.assert_close(
        policy.time_of(log_snr), torch.arange(100).double() / 100, atol=1e-6, rtol=0
    )
    middle = (log_snr[40] + log_snr[41]) / 2
    outside = policy.time_of(torch.stack([middle, middle * 0 + 99, middle * 0 - 99]))
    torch.testing.assert_close(
        outside, torch.tensor([0.405, 0.0, 0.99]).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_objective_is_minimal_at_the_ideal_network(make, prediction_type):
    rng = np.random.default_rng(0)
    actions = MU + SIGMA * rng.standard_normal((4096, 6, 2)).astype(np.float32)
    batch = {**make.batch(4096), "action": actions}
    ideal = exact(prediction_type)
    losses = []
    for shift in (0.0, 0.2, -0.2):
        policy = make.policy("diffusion", prediction_type=prediction_type)
        make.analytic(policy, lambda x, time, s=shift: ideal(x, time) + s)
        policy.seed_training(7)
        losses.append(policy.loss(batch)[0].item())
    variance = ALPHA_BAR * SIGMA**2 + 1 - ALPHA_BAR
    least = {
        "epsilon": ALPHA_BAR * SIGMA**2 / variance,
        "sample": (1 - ALPHA_BAR) * SIGMA**2 / variance,
        "v_prediction": SIGMA**2 / variance,
    }[prediction_type]
    assert losses[0] == pytest.approx(least.mean(), rel=0.04)
    assert np.mean(losses[1:]) - losses[0] == pytest.approx(0.04, abs=1e-4)


def test_contradicting_options_are_refused(make):
    with pytest.raises(ConfigError, match="clip_sample"):
        make.policy("diffusion", action_normalization="gaussian")
    with pytest.raises(ConfigError, match="num_train_steps=100"):
        make.policy("diffusion", num_steps=101)
