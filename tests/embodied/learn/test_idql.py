"""Implicit Q-learning: its expectiles against closed forms, its phases, what survives a restart."""

import math

import msgspec
import numpy as np
import pytest
import torch
from actor_critics import (
    HEADS,
    LEARNER,
    assert_goes_on,
    batches,
    chain,
    chain_values,
    improved_format,
    state_of,
)
from torch import nn

from embodied.core.config import component, convert
from embodied.learn.adamw import AdamW
from embodied.learn.config import IDQLConfig
from embodied.learn.idql import IDQL
from embodied.learn.learner import Learner, PolicyFormat
from embodied.learn.updates.base import cosine
from embodied.learn.updates.idql import IDQLUpdates, expectile_loss
from policies.checkpoint import policy_from_state, policy_state
from policies.critics.configs import ImprovementConfig

PHASES = IDQLConfig(cloning_steps=4, offline_steps=3, critic_steps=2)


@pytest.mark.parametrize("expectile", [0.2, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_least_at_the_expectile(name, expectile):
    """Of values uniform between −9 and −1 it divides the range as √τ : √(1 − τ)."""
    cls, options = component("value_heads", HEADS[name], "head")
    head = cls(options)
    logits = nn.Parameter(torch.zeros(head.outputs))
    target = -9 + 8 * (torch.arange(100) + 0.5) / 100
    optimiser = AdamW({"logits": logits}, weight_decay=0.0)
    for step in range(500):
        optimiser.zero_grad()
        expectile_loss(head, logits.expand(100, -1), target, expectile).mean().backward()
        optimiser.step(0.1 * cosine(step / 500))
    up, down = math.sqrt(expectile), math.sqrt(1 - expectile)
    assert float(head.value(logits.detach())) == pytest.approx(-9 + 8 * up / (up + down), abs=0.02)


def chain_by_hand(expectile):
    """Fixed point of Q = r + γ V, V an expectile of two equally frequent values."""
    q = np.zeros((3, 2))
    for _ in range(500):
        v = np.append(expectile * q.max(axis=1) + (1 - expectile) * q.min(axis=1), 0.0)
        q = np.stack([-1 + 0.9 * v[[0, 0, 1]], [-1, -1, 0] + 0.9 * v[[1, 2, 3]]], axis=1)
    return q


@pytest.mark.parametrize("head, expectile, steps", [("scalar", 0.7, 400), ("hl_gauss", 0.98, 700)])
def test_critic_and_value_converge_to_the_fixed_point_that_is_optimal_for_high_expectiles(
    head, expectile, steps
):
    policy, batch = chain(HEADS[head])
    options = IDQLConfig(
        cloning_steps=0,
        offline_steps=10_000,
        expectile=expectile,
        critic_learning_rate=4e-3,
        target_rate=0.2,
        discount=0.9,
    )
    form = PolicyFormat(
        (), lambda _: policy, policy_state, policy_from_state,
        lambda policy, learner, seed: IDQLUpdates(policy, options, learner, seed),
    )  # fmt: skip
    learner = Learner(policy, form, LEARNER, seed=0)
    for _ in range(steps):
        learner.update(batch)
    expected = chain_by_hand(expectile)
    np.testing.assert_allclose(chain_values(policy.critic), expected, atol=0.1)
    optimal = np.array([[-2.71, -1.9], [-2.71, -1.0], [-1.9, 0.0]])
    assert (np.abs(expected - optimal).max() < 0.1) == (expectile > 0.9)


def test_the_policy_is_cloned_then_stays_then_is_cloned_from_what_was_done():
    form = improved_format(IDQLUpdates, PHASES)
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    moved, rows = [], []
    for batch in batches(11):
        before = state_of(learner)
        rows.append(learner.update(batch))
        after = state_of(learner)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        parts = ("policy/policy.", "policy/critic.", "updates/target", "updates/value.", "ema/")
        moved.append([p for p in parts if any(name.startswith(p) for name in changed)])
    assert moved[:4] == [["policy/policy.", "ema/"]] * 4
    critic = ["policy/critic.", "updates/target", "updates/value."]
    assert moved[4:7] == [critic] * 3
    assert moved[7:] == [["policy/policy.", *critic, "ema/"], critic] * 2
    assert {"q", "v", "value_loss"} <= rows[4].keys() and "policy_loss" in rows[7]


def test_online_the_policy_takes_the_step_of_cloning():
    """From the same policy, down its loss on the batch's actions: whatever the critic says."""
    rate = {"actor_learning_rate": LEARNER.learning_rate, "offline_steps": 0}
    online = improved_format(
        IDQLUpdates, msgspec.structs.replace(PHASES, cloning_steps=0, critic_steps=1, **rate)
    )
    cloning = improved_format(
        IDQLUpdates, msgspec.structs.replace(PHASES, cloning_steps=10**9, critic_steps=1, **rate)
    )
    config = msgspec.structs.replace(LEARNER, warmup_steps=0)
    first, second = (Learner(form.make({}), form, config, seed=1) for form in (online, cloning))
    for batch in batches(3):
        first.update(batch)
        second.update(batch)
    for name, value in first.policy.policy.state_dict().items():
        torch.testing.assert_close(value, second.policy.policy.state_dict()[name])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [5, 8])
def test_what_was_saved_goes_on_bit_for_bit(tmp_path, cut, precision):
    head = {"name": "hl_gauss", "low": -15.0, "high": 1.0, "bins": 16}
    form = improved_format(IDQLUpdates, PHASES, head)
    config = msgspec.structs.replace(LEARNER, precision=precision)
    assert_goes_on(form, config, cut, tmp_path / "c.safetensors")


def test_what_acts_is_the_best_of_the_proposals_as_they_are():
    found = convert(IDQL(IDQLConfig(proposals=9)).improvement, ImprovementConfig)
    assert found == ImprovementConfig(proposals=9, kept=9, steps=0, temperature=None)
