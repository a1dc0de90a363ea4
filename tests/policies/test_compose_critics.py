"""Critics in compositions: guidance, weights and choice among proposals."""

import numpy as np
import pytest
import torch
from gaussians import PAIRS, SOLVER, affine, ends, moments, one

from embodied.core import registry
from embodied.core.errors import SpecError
from policies.compose.build import compose
from policies.conversions import epsilon_of, signal_noise


@pytest.fixture
def quadratic(monkeypatch):
    """A critic Q = −Σ (a − c)² / 2τ², registered for the test."""
    monkeypatch.setitem(registry.BUILTIN["critics"], "quadratic", "quadratic_critic:Quadratic")
    for cached in (registry.names, registry._rows, registry.resolve, registry.config_type):
        cached.cache_clear()
    import sys
    import types

    import msgspec

    class Config(msgspec.Struct, frozen=True):
        centre: float
        spread: float

    class Quadratic:
        def __init__(self, config):
            self.config = config

        def q(self, obs, actions):
            c = self.config
            return -(actions - c.centre).square().sum((2, 3)) / (2 * c.spread**2)

    Quadratic.Config = Config
    module = types.ModuleType("quadratic_critic")
    module.Quadratic = Quadratic
    monkeypatch.setitem(sys.modules, "quadratic_critic", module)
    yield {"name": "quadratic", "centre": 0.4, "spread": 0.5}
    monkeypatch.undo()
    for cached in (registry.names, registry._rows, registry.resolve, registry.config_type):
        cached.cache_clear()


@pytest.mark.parametrize("jacobian", ["network", "unit"])
@pytest.mark.parametrize("kinds", [("epsilon", "v"), ("flow", "sample")])
def test_critic_guidance_follows_its_recursion(gaussian, integrate, quadratic, jacobian, kinds):
    """ε̂ = A x − B gives x̂₀ = ((1 − nA)x + nB)/s; Q's slope there is affine in x again."""
    means, sigmas, weights = PAIRS["equal"]
    policies = {f"p{i}": gaussian(kinds[i], means[i], sigmas[i]) for i in range(2)}
    guidance = {"critic": quadratic, "scale": 0.7, "jacobian": jacobian}
    composed = compose(
        policies, {"name": "mix", "weights": weights}, solver=SOLVER, guidance=guidance
    )

    def terms(log_snr):
        s, n = signal_noise(log_snr)
        a, b = sum(weights[i] * one(log_snr, means[i], sigmas[i]) for i in range(2))
        slope, constant = (1 - n * a) / s, n * b / s
        chain = slope if jacobian == "network" else s
        pull = 0.7 * n * chain / 0.25  # ε̂ −= scale·n·chain·(c − x̂₀)/τ²
        return np.array([a + pull * slope, b + pull * (0.4 - constant)])

    expected = affine(terms, composed.solver.log_snrs)
    with torch.no_grad():
        got = moments(integrate(composed, ends()))
    assert got == pytest.approx(expected, abs=2e-6)


def test_critic_weights_are_a_softmax_of_the_members_values(gaussian, make, quadratic):
    means, sigmas, _ = PAIRS["unequal"]
    policies = {f"p{i}": gaussian("v", means[i], sigmas[i]) for i in range(2)}
    operator = {"name": "critic", "critic": quadratic, "temperature": 3.0}
    composed = compose(policies, operator, solver=SOLVER).double()
    x = torch.randn(4, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = epsilon_of(composed.denoise(x, 0.3, composed.encode(make.obs(4))), x, 0.3)
    s, n = signal_noise(0.3)
    epsilons, q = [], []
    for mean, sigma in zip(means, sigmas, strict=True):
        a, b = one(0.3, mean, sigma)
        epsilons.append(a * x - b)
        clean = (x - n * epsilons[-1]) / s
        q.append(-(clean - 0.4).square().sum((1, 2)) / 0.5 / 3.0)
    w = torch.softmax(torch.stack(q, 1), 1)
    expected = w[:, :1, None] * epsilons[0] + w[:, 1:, None] * epsilons[1]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_pooled_takes_the_best_of_all_members(make, quadratic):
    policies = {
        "a": make.awaken(make.policy("flow")),
        "b": make.awaken(make.policy("diffusion"), 6),
    }
    pooled = compose(policies, {"name": "pooled", "proposals": 5, "critic": quadratic})
    obs = make.obs(3)
    best = pooled.sample(obs, 2, seed=0)
    assert best.shape == (3, 2, 6, 2)
    for label, policy in policies.items():
        drawn = policy.sample(obs, 200, seed=1)
        q = -(drawn - 0.4).square().sum((2, 3))
        own = -(best - 0.4).square().sum((2, 3))
        assert (own.mean(1) > q.median(1).values).all(), label
    chunk = pooled.act(None, obs, seed=np.arange(3))[1]
    one_row = {k: v[1:2] for k, v in obs.items()}
    np.testing.assert_allclose(
        pooled.act(None, one_row, seed=np.array([1]))[1][0], chunk[1], atol=1e-5
    )
    prefix = np.full((3, 2, 2), 0.25, np.float32)
    np.testing.assert_array_equal(
        pooled.act(None, obs, prefix=prefix, seed=np.arange(3))[1][:, :2], prefix
    )
    with pytest.raises(SpecError, match="4 actions are committed"):
        pooled.act(None, obs, prefix=prefix.repeat(2, axis=1), seed=np.arange(3))


def test_pooled_softmax_draws_in_proportion(make, quadratic):
    """Exponential tilt: a flat temperature is uniform over proposals, a low one is the best."""
    policies = {
        "a": make.awaken(make.policy("flow")),
        "b": make.awaken(make.policy("diffusion"), 6),
    }

    def mean_q(temperature):
        options = {"name": "pooled", "critic": quadratic, "temperature": temperature}
        chosen = compose(policies, options).sample(make.obs(2), 100, seed=0)
        return -(chosen - 0.4).square().sum((2, 3)).mean().item()

    best = compose(policies, {"name": "pooled", "critic": quadratic}).sample(
        make.obs(2), 100, seed=0
    )
    greedy = -(best - 0.4).square().sum((2, 3)).mean().item()
    assert mean_q(1e4) < mean_q(3.0) < mean_q(1e-3) == pytest.approx(greedy, abs=1e-6)
