import numpy as np
import pytest
import torch

from policies.conversions import epsilon_of, flow_log_snr, flow_time, sample_of, signal_noise

MU, SIGMA = 0.2, 0.3


def slope(u, sigma=SIGMA):
    return (u * sigma**2 - (1 - u)) / (u**2 * sigma**2 + (1 - u) ** 2)


def velocity(x, u):
    """E[x₁ − n | x_u] for x₁ ~ N(MU, SIGMA²)."""
    return MU + slope(u) * (x - u * MU)


def integrate_affine(policy):
    """Mean and standard deviation of the sampler's output, which is affine in the noise."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, 6, 2)
    out = policy.integrate(ends, torch.zeros(2, 10, dtype=torch.float64), None)
    assert (out == out[:, :1, :1]).all()
    return out[0, 0, 0].item(), (out[1, 0, 0] - out[0, 0, 0]).item()


@pytest.mark.parametrize("n", [1, 4, 10])
def test_euler_follows_its_recursion_exactly(make, n):
    mean, std = 0.0, 1.0
    for k in range(n):
        a = slope(k / n)
        mean, std = mean + (MU + a * (mean - k / n * MU)) / n, std * (1 + a / n)
    got = integrate_affine(make.analytic(make.policy(num_steps=n), velocity))
    assert got == pytest.approx((mean, std), abs=1e-12)


@pytest.mark.parametrize("n", [1, 4, 10])
def test_heun_follows_its_recursion_exactly(make, n):
    std = 1.0
    for k in range(n):
        a, b = slope(k / n), slope((k + 1) / n)
        std *= 1 + (a + b * (1 + a / n)) / (2 * n)
    got = integrate_affine(make.analytic(make.policy(num_steps=n, solver="heun"), velocity))
    assert got == pytest.approx((MU, std), abs=1e-12)


def test_solvers_converge_to_the_gaussian_at_their_orders(make):
    def error(solver, n):
        policy = make.analytic(make.policy(num_steps=n, solver=solver), velocity)
        return abs(integrate_affine(policy)[1] - SIGMA)

    assert error("euler", 400) / error("euler", 800) == pytest.approx(2, rel=0.05)
    assert error("heun", 100) / error("heun", 200) == pytest.approx(4, rel=0.1)
    assert error("euler", 800) < 3e-3 and error("heun", 100) < 1e-3


def test_samples_have_the_density(make):
    policy = make.analytic(make.policy(num_steps=200), velocity)
    chunks = policy.sample(make.obs(4), 500, seed=3)
    assert chunks.shape == (4, 500, 6, 2)
    n = chunks.numel()
    assert chunks.mean().item() == pytest.approx(MU, abs=4 * SIGMA / n**0.5)
    # .7 % of the mass lies beyond the bound of 1.
    assert chunks.std().item() == pytest.approx(SIGMA, abs=0.01)


def test_snr_matching_inverts_and_agrees_with_the_definition():
    log_snr = torch.linspace(-12, 12, 25, dtype=torch.float64)
    u = flow_time(log_snr)
    signal, noise = (x.flatten() for x in signal_noise(log_snr))
    torch.testing.assert_close(u, signal / (signal + noise))
    torch.testing.assert_close(2 * torch.log(u / (1 - u)), log_snr)
    assert [flow_log_snr(x) for x in u.tolist()] == pytest.approx(log_snr.tolist(), abs=1e-9)


def test_denoise_is_the_velocity_at_the_matched_time_and_scale(make):
    policy = make.analytic(make.policy(), velocity)
    log_snr = torch.linspace(-6, 6, 13, dtype=torch.float64)
    alpha_bar = torch.sigmoid(log_snr)[:, None, None]
    x = torch.randn(13, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction = policy.denoise(x, log_snr, torch.zeros(13, 10, dtype=torch.float64))
    variance = alpha_bar * SIGMA**2 + 1 - alpha_bar
    residual = x - alpha_bar.sqrt() * MU
    assert prediction.parameterisation == "flow"
    torch.testing.assert_close(
        epsilon_of(prediction, x, log_snr),
        (1 - alpha_bar).sqrt() / variance * residual,
        atol=1e-9,
        rtol=0,
    )
    torch.testing.assert_close(
        sample_of(prediction, x, log_snr),
        MU + alpha_bar.sqrt() * SIGMA**2 / variance * residual,
        atol=1e-9,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("density", "mean", "below"),
    [("uniform", 0.5, 0.1), ("logit_normal", 0.5, 0.014), ("beta", 0.3996, 0.146)],
)
def test_training_times_have_the_density(make, density, mean, below):
    u = make.policy(time_sampling=density)._draw_times(200_000, torch.Generator().manual_seed(0))
    assert u.min() >= 0 and u.max() <= 1
    assert u.mean().item() == pytest.approx(mean, abs=0.003)
    # Beta: P(u < .1) = 1 − (1 − .1/.999)^1.5; logit-normal: Φ(log(1/9)).
    assert (u < 0.1).float().mean().item() == pytest.approx(below, abs=0.003)


def test_the_objective_is_minimal_at_the_true_velocity(make):
    """The least squared error is E Var(x₁ − n | x_u); a shifted velocity adds its square."""
    actions = MU + SIGMA * np.random.default_rng(0).standard_normal((4096, 6, 2)).astype(np.float32)
    batch = {**make.batch(4096), "action": actions}
    losses = []
    for shift in (0.0, 0.2, -0.2):
        policy = make.policy()
        make.analytic(policy, lambda x, u, s=shift: velocity(x, u) + s)
        policy.seed_training(7)
        losses.append(policy.loss(batch)[0].item())
    u = np.linspace(0, 1, 20_001)
    least = np.mean(SIGMA**2 / (u**2 * SIGMA**2 + (1 - u) ** 2))
    assert losses[0] == pytest.approx(least, rel=0.03)
    assert np.mean(losses[1:]) - losses[0] == pytest.approx(0.04, abs=1e-4)
