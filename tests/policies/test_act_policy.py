import math

import numpy as np
import pytest
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError, SpecError


def test_kl_and_l1_are_their_closed_forms(make):
    """q = N(μ, σ²) a dimension: KL = (μ² + σ² − 1 − log σ²) / 2; a decoder of 0 misses by |a|."""
    policy = make.policy("act", kl_weight=2.5)
    with torch.no_grad():
        policy.posterior_outlet.weight.zero_()
        policy.posterior_outlet.bias[:4], policy.posterior_outlet.bias[4:] = 0.3, -0.8
        policy.outlet.weight.zero_()
        policy.outlet.bias.zero_()
    batch = make.batch(5)
    batch["action_is_pad"][:, 3:] = np.arange(5)[:, None] > 1
    loss, metrics = policy.loss(batch)
    kl = 4 * (0.3**2 + math.exp(-0.8) - 1 + 0.8) / 2
    l1 = np.abs(batch["action"])[~batch["action_is_pad"]].mean()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["l1"] == pytest.approx(l1, rel=1e-5)
    assert loss.item() == pytest.approx(l1 + 2.5 * kl, rel=1e-5)


def test_padded_actions_have_no_influence(make):
    policy = make.awaken(make.policy("act"))
    batch = make.batch(7)
    pad = batch["action_is_pad"] = np.arange(6) >= np.array([6, 5, 4, 3, 2, 1, 0])[:, None]

    def loss_of(batch):
        policy.seed_training(3)
        return policy.loss(batch)[0]

    plain = loss_of(batch)
    for value in (123.0, np.nan):
        other = {**batch, "action": np.where(pad[..., None], value, batch["action"])}
        assert loss_of(other) == plain
    shorter = {**batch, "action_is_pad": pad | (np.arange(6) >= 5)}
    assert loss_of(shorter) != plain


def test_it_acts_with_the_mean_style_and_samples_with_drawn_ones(make):
    policy = make.awaken(make.policy("act"))
    obs, seed = make.obs(3), np.arange(3)
    _, chunk = policy.act(None, obs, seed=seed)
    np.testing.assert_array_equal(policy.act(None, obs, seed=seed + 9)[1], chunk)
    assert len({row.tobytes() for row in policy.sample(obs, 4, seed=0)[0].numpy()}) == 4
    with torch.no_grad():
        policy.style.weight.zero_()
    expected = torch.from_numpy(chunk)[:, None].expand(3, 4, 6, 2)
    torch.testing.assert_close(policy.sample(obs, 4, seed=0), expected)


def test_a_prefix_heads_the_chunk_and_must_fit(make):
    policy, seed = make.awaken(make.policy("act")), np.array([0, 1])
    prefix = np.full((2, 2, 2), 0.25, np.float32)
    _, free = policy.act(None, make.obs(2), seed=seed)
    _, chunk = policy.act(None, make.obs(2), prefix=prefix, seed=seed)
    np.testing.assert_array_equal(chunk[:, :2], prefix)
    np.testing.assert_array_equal(chunk[:, 2:], free[:, 2:])
    for wrong in (prefix[:1], prefix[:, :0], prefix[..., :1], prefix.repeat(99, axis=1)):
        with pytest.raises(SpecError, match="prefix has shape"):
            policy.act(None, make.obs(2), prefix=wrong, seed=seed)
    with pytest.raises(SpecError, match="seed"):
        policy.act(None, make.obs(2), seed=np.zeros(3))


def test_the_style_explains_what_the_observation_does_not(make):
    """Chunks of −.5 or +.5 at random: with the style told, L1 falls below its .5 without."""
    policy = make.policy("act", kl_weight=0.01)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    metrics = {}
    for _ in range(60):
        batch = make.batch(32)
        batch["action"][:] = rng.choice([-0.5, 0.5], 32)[:, None, None]
        loss, metrics = policy.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["l1"] < 0.15 and metrics["kl"] > math.log(2) / 2
    signs = (policy.sample(make.obs(8), 16, seed=0) > 0).float().mean()
    assert 0.2 < signs < 0.8


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="multiple of heads"):
        component("policies", {"name": "act", "width": 30, "heads": 4}, "policy")
