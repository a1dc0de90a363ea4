"""What every registered policy promises, with every registered network."""

import copy

import numpy as np
import pytest
import torch

from embodied.core.protocols import Denoiser, Prediction
from embodied.core.registry import names, resolve
from policies.base import GenerativePolicy
from policies.checkpoint import policy_from_state, policy_state
from policies.configs import ChunkConfig
from policies.conversions import epsilon_of


def networks(policy):
    """Those that a policy can have, its members' in case of a composition."""
    config = resolve("policies", policy).Config
    alone = issubclass(config, ChunkConfig) and "network" not in config.__struct_fields__
    return ("",) if alone else names("networks")


APART = {"lerobot", "vae"}
"""One needs an export (test_lerobot_policy.py), one commands nothing (test_autoencoder.py)."""

CASES = [
    pytest.param((policy, network), marks=[pytest.mark.slow] if policy == "lora" else [])
    for policy in names("policies")
    if policy not in APART
    for network in networks(policy)
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(filter(None, case)))
def policy(request, make):
    name, network = request.param
    if network not in ("mlp", "unet1d", "dit", ""):
        network = {"name": network}
    return make.awaken(make.policy(name, network=network))


def test_names_itself_as_it_is_registered(policy):
    assert resolve("policies", policy.name) is type(policy)
    assert isinstance(policy, Denoiser) == isinstance(policy, GenerativePolicy)


def test_act(policy, make):
    obs, seeds = make.obs(3), np.arange(3)
    carry = policy.init(3)
    carry, chunk = policy.act(carry, obs, seed=seeds)
    assert chunk.shape == (3, 6, 2) and chunk.dtype == np.float32
    assert np.isfinite(chunk).all() and np.abs(chunk).max() <= 1
    _, again = policy.act(carry, obs, seed=seeds)
    np.testing.assert_array_equal(again, chunk)
    _, alone = policy.act(carry, {k: v[1:2] for k, v in obs.items()}, seed=seeds[1:2])
    np.testing.assert_allclose(alone[0], chunk[1], atol=1e-4)
    moved = {k: v + (np.arange(3) == 0)[:, None, None].astype(np.float32) for k, v in obs.items()}
    _, other = policy.act(carry, moved, seed=seeds)
    assert (other[0] != chunk[0]).any()
    np.testing.assert_allclose(other[1:], chunk[1:], atol=1e-6)


def test_sample(policy, make):
    chunks = policy.sample(make.obs(2), 4, seed=0)
    assert chunks.shape == (2, 4, 6, 2) and not chunks.requires_grad
    assert torch.equal(chunks, policy.sample(make.obs(2), 4, seed=0))
    assert not torch.equal(chunks, policy.sample(make.obs(2), 4, seed=1))


def test_denoise(policy, make):
    if not isinstance(policy, Denoiser):
        pytest.skip("composes samples, has no score")
    log_snr = torch.tensor([-3.0, 0.0, 3.0])
    x = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    prediction = policy.denoise(x, log_snr, policy.encode(make.obs(3)))
    assert isinstance(prediction, Prediction) and prediction.value.shape == x.shape
    assert epsilon_of(prediction, x, log_snr).isfinite().all()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_loss_teaches_every_parameter_but_a_critics(policy, make, bfloat16):
    batch = make.batch(16)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        policy.seed_training(step % 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, metrics = policy.loss(batch)
        assert loss.dtype == torch.float32 and metrics["loss"] == loss.item()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for key, parameter in policy.named_parameters():
                if key.startswith("critic.") or not parameter.requires_grad:
                    assert parameter.grad is None, key
                    continue
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_survives_the_way_through_state_and_copy(policy, make):
    obs, seeds = make.obs(3), np.arange(3)
    expected = policy.act(None, obs, seed=seeds)[1]
    twin = policy_from_state(*policy_state(policy))
    assert type(twin) is type(policy) and twin.spec == policy.spec and twin.config == policy.config
    for other in (twin, copy.deepcopy(policy)):
        np.testing.assert_array_equal(other.act(None, obs, seed=seeds)[1], expected)
