"""The Gaussian under a tanh: densities, gradients, and what cloning converges to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from embodied.core.config import component
from embodied.core.errors import ConfigError, SpecError
from policies.gaussian import EDGE, LOG_STD, log_density

LOW, HIGH = -3.0, 5.0
SCALE = (HIGH - LOW) / 2


def generator(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def set_outlet(policy, mean, log_std):
    """The same μ and log σ everywhere, whatever is observed."""
    low, high = LOG_STD
    raw = math.atanh(2 * (log_std - low) / (high - low) - 1)
    size = policy.spec.horizon * policy.spec.action.size
    with torch.no_grad():
        policy.outlet.weight.zero_()
        policy.outlet.bias[:size], policy.outlet.bias[size:] = mean, raw
    return policy


@settings(deadline=None)
@given(st.floats(-4, 4), st.floats(-3, 3), st.floats(*LOG_STD))
def test_the_density_is_that_of_the_transformed_normal(u, mean, log_std):
    u, mean, log_std = (torch.tensor(x, dtype=torch.float64) for x in (u, mean, log_std))
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()])
    expected = squashed.log_prob(u.tanh())
    torch.testing.assert_close(log_density(u, mean, log_std), expected, rtol=1e-6, atol=1e-6)


def test_the_density_is_finite_where_the_tanh_is_saturated():
    u = torch.tensor([-80.0, 80.0], requires_grad=True)
    found = log_density(u, u.detach(), torch.zeros(2))
    expected = 2 * 80 - 2 * math.log(2) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(found.detach(), torch.full((2,), expected))
    found.sum().backward()
    torch.testing.assert_close(u.grad, torch.tensor([-2.0, 2.0]))


def test_a_density_integrates_to_one():
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1]
    mean, log_std = torch.full_like(x, 0.4), torch.full_like(x, -0.3)
    area = torch.trapezoid(log_density(x.atanh(), mean, log_std).exp(), x)
    assert float(area) == pytest.approx(1.0, abs=1e-4)


def test_what_is_drawn_has_the_density_it_comes_with(make):
    """Chunks in device units, densities of the normalised steps, one for each step."""
    policy = make.policy("gaussian", device=make.device(low=LOW, high=HIGH))
    obs = make.obs(5)
    chunk, log_prob = policy.rsample(obs, generator())
    assert chunk.shape == (5, 6, 2) and log_prob.shape == (5, 6)
    mean, log_std = policy._distribution(policy.encode(obs))
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()])
    expected = squashed.log_prob((chunk - (LOW + HIGH) / 2) / SCALE).sum(dim=2)
    torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=1e-3)


def test_chunks_have_the_slopes_of_the_reparameterisation(make):
    """a = c + s tanh(μ + σ ε): ∂a/∂μ = s (1 − tanh²), and ∂a/∂log σ = σ ε times that."""
    policy = make.policy("gaussian", device=make.device(low=LOW, high=HIGH))
    obs = make.obs(1)
    mean, raw = policy.outlet(policy.trunk(policy.encode(obs)))[0].detach().chunk(2)
    chunk, _ = policy.rsample(obs, generator())
    chunk.sum().backward()
    found = policy.outlet.bias.grad
    x = ((chunk - (LOW + HIGH) / 2) / SCALE).detach().flatten()
    slope = SCALE * (1 - x.square())
    push = (x.atanh() - mean) * (LOG_STD[1] - LOG_STD[0]) / 2
    torch.testing.assert_close(found[:12], slope, rtol=1e-3, atol=1e-4)
    expected = slope * push * (1 - raw.tanh().square())
    torch.testing.assert_close(found[12:], expected, rtol=1e-3, atol=1e-4)


def test_log_densities_have_the_slopes_of_finite_differences(make):
    policy = make.awaken(make.policy("gaussian")).double()
    obs = make.obs(2)

    def total():
        return policy.rsample(obs, generator())[1].sum()

    total().backward()
    for parameter in (policy.outlet.bias, policy.trunk[0].weight, policy.trunk[1].weight):
        flat, step = parameter.data.view(-1), 1e-5
        for index in range(0, len(flat), max(1, len(flat) // 5)):
            kept = flat[index].item()
            ends = []
            for end in (kept - step, kept + step):
                flat[index] = end
                ends.append(total().item())
            flat[index] = kept
            expected = (ends[1] - ends[0]) / (2 * step)
            assert parameter.grad.view(-1)[index].item() == pytest.approx(
                expected, rel=1e-4, abs=1e-6
            )


def test_the_standard_deviation_stays_within_its_bounds(make):
    policy = make.policy("gaussian")
    low, high = (math.exp(bound) for bound in LOG_STD)
    for raw in (-1e4, 0.0, 1e4):
        with torch.no_grad():
            policy.outlet.bias[12:] = raw
        std = policy._distribution(policy.encode(make.obs(2)))[1].exp()
        assert (std > 0.999 * low).all() and (std < 1.001 * high).all()


def test_cloning_ends_at_the_entropy_of_gaussian_data(make):
    """Of x = tanh(m + s ε): H = ½ log 2πe s² + E log(1 − x²), which Gauss-Hermite integrates."""
    mean, std = 0.3, 0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    slopes = np.log1p(-(np.tanh(mean + std * nodes) ** 2)) @ weights / math.sqrt(2 * math.pi)
    optimum = 0.5 * math.log(2 * math.pi * math.e * std**2) + slopes
    policy = make.policy("gaussian")
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    obs = {key: np.zeros_like(value) for key, value in make.obs(512).items()}
    losses = []
    for _ in range(400):
        action = np.tanh(mean + std * rng.standard_normal((512, 6, 2))).astype(np.float32)
        batch = {**obs, "action": action, "action_is_pad": np.zeros((512, 6), bool)}
        loss, _ = policy.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > optimum + 0.2
    assert np.mean(losses[-50:]) == pytest.approx(optimum, abs=0.01)
    found_mean, found_log_std = policy._distribution(policy.encode(obs))
    assert float(found_mean.mean()) == pytest.approx(mean, abs=0.03)
    assert float(found_log_std.exp().mean()) == pytest.approx(std, abs=0.03)


def test_labels_on_the_bounds_count_as_just_inside_and_padded_ones_not_at_all(make):
    policy = set_outlet(make.policy("gaussian"), 0.2, -0.5)
    batch = make.batch(4)
    batch["action"] = np.ones_like(batch["action"])
    pad = batch["action_is_pad"] = np.arange(6) >= np.array([6, 5, 3, 0])[:, None]
    loss, metrics = policy.loss(batch)
    u, mean, log_std = (torch.tensor(x) for x in (math.atanh(1 - EDGE), 0.2, -0.5))
    expected = -log_density(u, mean, log_std).item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics == {"loss": loss.item(), "std": pytest.approx(math.exp(-0.5), rel=1e-5)}
    batch["action"] = np.where(pad[..., None], np.nan, batch["action"])
    assert policy.loss(batch)[0] == loss


def test_rows_are_drawn_by_their_seeds_with_the_moments_of_the_distribution(make):
    policy = set_outlet(make.policy("gaussian", device=make.device(low=LOW, high=HIGH)), 0.1, -2.5)
    seeds = np.arange(2000)
    obs = {key: np.zeros_like(value) for key, value in make.obs(2000).items()}
    _, chunks = policy.act(None, obs, seed=seeds)
    u = np.arctanh((chunks - (LOW + HIGH) / 2) / SCALE)
    assert u.mean() == pytest.approx(0.1, abs=0.003)
    assert u.std() == pytest.approx(math.exp(-2.5), abs=0.002)
    _, alone = policy.act(None, {k: v[7:8] for k, v in obs.items()}, seed=seeds[7:8])
    np.testing.assert_allclose(alone[0], chunks[7], atol=1e-5)
    assert (policy.act(None, obs, seed=seeds + 1)[1][:-1] == chunks[1:]).all()


def test_a_prefix_heads_the_chunk_and_must_fit(make):
    policy, seed = make.awaken(make.policy("gaussian")), np.array([0, 1])
    prefix = np.full((2, 2, 2), 0.25, np.float32)
    _, free = policy.act(None, make.obs(2), seed=seed)
    _, chunk = policy.act(None, make.obs(2), prefix=prefix, seed=seed)
    np.testing.assert_array_equal(chunk[:, :2], prefix)
    np.testing.assert_array_equal(chunk[:, 2:], free[:, 2:])
    with pytest.raises(SpecError, match="committed"):
        policy.act(None, make.obs(2), prefix=np.zeros((2, 4, 2), np.float32), seed=seed)


@pytest.mark.parametrize("normalisation", ["limits", "gaussian"])
def test_it_needs_actions_that_are_normalised_by_their_bounds(make, normalisation):
    options = {"name": "gaussian", "action_normalization": normalisation}
    with pytest.raises(ConfigError, match="set action_normalization: spec"):
        component("policies", options, "policy")
    with pytest.raises(ConfigError, match="no finite bounds"):
        make.policy("gaussian", device=make.device(high=math.inf))
