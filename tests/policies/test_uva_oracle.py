"""Unified video and action, trained where the answers are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embodied.core.specs import ArraySpec, DeviceSpec
from policies.build import build_policy

STATE = "observation.state"
SMALL = {"width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "time_dim": 32}
A, B, K, S2, W = 0.9, 0.5, -0.4, 0.09, 0.01
"""a ~ N(K o, S2), o′ = A o + B a + N(0, W), o ~ N(0, 1)."""


def scalar(horizon=1, **options):
    """A policy of one number seen and done, whose normalisers are identities."""
    device = DeviceSpec({STATE: ArraySpec((1,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)
    stats = {STATE: SimpleNamespace(mean=[0.0], std=[1.0], min=[-1.0], max=[1.0])}
    config = {
        "n_obs_steps": 1,
        "horizon": horizon,
        "n_action_steps": 1,
        "frames": 1,
        "form": "flow",
    }
    sizes = {"head_width": 64, "head_depth": 2, **SMALL}
    return build_policy("uva", config | sizes | options, device, [STATE], stats, seed=0)


def train(policy, batches, steps, rate=4e-3):
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        loss, _ = policy.loss(batches(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


def system(rows, seed):
    rng = np.random.default_rng(seed)
    o = rng.standard_normal(rows)
    a = K * o + math.sqrt(S2) * rng.standard_normal(rows)
    later = A * o + B * a + math.sqrt(W) * rng.standard_normal(rows)
    columns = {STATE: o, "action": a, "future." + STATE: later}
    batch = {key: x.astype(np.float32)[:, None, None] for key, x in columns.items()}
    nothing = np.zeros((rows, 1), bool)
    return batch | {"action_is_pad": nothing, "future_is_pad": nothing}


def signs(rows, seed):
    """Chunks all of +1 or all of −1, by a coin, whatever is seen."""
    coin = np.random.default_rng(seed).choice([-1.0, 1.0], (rows, 1, 1)).astype(np.float32)
    seen = np.zeros((rows, 1, 1), np.float32)
    return {
        STATE: seen,
        "action": np.repeat(coin, 16, axis=1),
        "action_is_pad": np.zeros((rows, 16), bool),
        "future." + STATE: seen,
        "future_is_pad": np.zeros((rows, 1), bool),
    }


@pytest.mark.slow
@pytest.mark.parametrize("head", ["steps", "joint"])
def test_given_z_the_published_head_knows_nothing_of_other_actions(head):
    """Its signs are independent, so that all agree in one chunk of 2¹⁵; the joint head's agree."""
    policy = scalar(16, modes=["policy"], action_head=head)
    train(policy, lambda step: signs(64, step), 250)
    chunks_BHD = policy.sample({STATE: np.zeros((1, 1, 1), np.float32)}, 400, seed=0)[0]
    assert (chunks_BHD.abs() > 0.5).float().mean() > 0.9
    positive_B = (chunks_BHD > 0).float().mean(dim=(1, 2))
    assert positive_B.mean().item() == pytest.approx(0.5, abs=0.15)
    agree = ((positive_B == 0) | (positive_B == 1)).float().mean().item()
    assert agree < 0.02 if head == "steps" else agree > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_the_inverse_mode_knows_what_it_is_told(told):
    """E[a | o′] = (K (A + B K) + B S2) / ((A + B K)² + B² S2 + W) o′, as published, or
    E[a | o, o′] if it is told what was observed; the policy's mean is K o."""
    policy = scalar(
        modes=["policy", "inverse"],
        drawn="row",
        inverse_history=told,
        clip_sample=False,
    )
    train(policy, lambda step: system(256, step), 400)
    rows = 1000
    obs = {STATE: np.ones((rows, 1, 1), np.float32)}
    later = {STATE: np.full((rows, 1, 1), 0.8, np.float32)}
    seed, total = np.arange(rows), A + B * K
    acted = policy.act(None, obs, seed=seed)[1].mean()
    found = policy.infer(obs, next_obs=later, want={"actions"}, seed=seed)["actions"].mean()
    assert acted == pytest.approx(K, abs=0.06)
    if told:
        wanted = K + B * S2 / (B * B * S2 + W) * (0.8 - total)
    else:
        wanted = 0.8 * (K * total + B * S2) / (total**2 + B * B * S2 + W)
    assert found.item() == pytest.approx(wanted, abs=0.06)
