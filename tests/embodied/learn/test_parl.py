"""Policy-agnostic RL: its phases, its backup against a closed form, and what survives a restart."""

import msgspec
import numpy as np
import pytest
import torch
from actor_critics import (
    HEADS,
    LEARNER,
    STATE,
    assert_goes_on,
    batches,
    chain,
    chain_values,
    improved_format,
    state_of,
)

from embodied.core.config import convert
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.learn.config import PARLConfig
from embodied.learn.learner import Learner, PolicyFormat
from embodied.learn.updates.parl import PARLUpdates
from policies.checkpoint import policy_from_state, policy_state

PHASES = PARLConfig(cloning_steps=4, offline_steps=3, critic_steps=2)


def make_format(options=PHASES, head=None, name="flow", **sizes):
    return improved_format(PARLUpdates, options, head, name, **sizes)


def test_the_policy_is_cloned_then_stays_then_both_learn():
    form = make_format()
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    moved, acts, keys = [], [], []
    for batch in batches(11):
        before = state_of(learner)
        acts.append(learner.acts)
        keys.append("policy_loss" in learner.update(batch))
        after = state_of(learner)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        moved.append(
            "".join(
                part[0]
                for part in ("policy/policy.", "policy/critic.", "updates/target", "ema/")
                if any(name.startswith(part) for name in changed)
            )
            + ("" if any(name.startswith("policy/policy.") for name in changed) else "-")
        )
    assert moved[:4] == ["pe"] * 4
    assert moved[4:7] == ["pu-"] * 3
    assert moved[7:] == ["ppue", "pu-"] * 2
    assert acts == [False] * 7 + [True] * 4 and keys == [False] * 7 + [True, False] * 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("age", [0, 3])
@pytest.mark.parametrize("cut", [2, 5, 8])
def test_what_was_saved_in_any_phase_goes_on_bit_for_bit(tmp_path, cut, precision, age):
    form = make_format(msgspec.structs.replace(PHASES, proposals_age=age))
    config = msgspec.structs.replace(LEARNER, precision=precision)
    assert_goes_on(form, config, cut, tmp_path / "c.safetensors")


def test_what_is_published_acts_with_averaged_weights_and_the_present_critic():
    form = make_format()
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    for batch in batches(9):
        learner.update(batch)
    acting = policy_from_state(*learner.weights())
    averaged = learner.ema.parameters()
    assert averaged and all(name.startswith("policy.") for name in averaged)
    for name, value in acting.state_dict().items():
        expected = averaged.get(name, learner.policy.state_dict()[name])
        assert torch.equal(value, expected), name
    obs = {STATE: np.zeros((2, 1, 3), np.float32)}
    assert acting.act(acting.init(2), obs, seed=np.arange(2))[1].shape == (2, 4, 2)


def test_averages_are_only_borrowed():
    form = make_format()
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    for batch in batches(3):
        learner.update(batch)
    before = state_of(learner)
    with learner.averaged():
        for name, value in learner.policy.named_parameters():
            if name.startswith("policy."):
                assert torch.equal(value, before[f"ema/{name}"])
    for name, value in state_of(learner).items():
        assert torch.equal(value, before[name]), name


def test_what_was_seen_later_is_not_taken_for_the_outcome_of_better_actions():
    form = make_format(msgspec.structs.replace(PHASES, cloning_steps=1, offline_steps=0))
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    told, loss = [], learner.policy.policy.loss

    def record(batch):
        told.append(batch["future_is_pad"])
        return loss(batch)

    learner.policy.policy.loss = record
    for batch in batches(2):
        learner.update({**batch, "future_is_pad": np.zeros((32, 1), bool)})
    assert [bool(pad.any()) for pad in told] == [False, True] and told[1].all()


@pytest.mark.parametrize("cloning_steps, metric", [(0, "policy_loss"), (3, "grad_norm")])
def test_only_what_led_to_success_is_cloned_and_distilled(cloning_steps, metric):
    options = PARLConfig(
        cloning_steps=cloning_steps, offline_steps=0, critic_steps=1, distil_successes=True
    )
    learner_format = make_format(options)
    learner = Learner(learner_format.make({}), learner_format, LEARNER, seed=1)
    told, loss = [], learner.policy.policy.loss

    def record(batch):
        told.append(batch[STATE])
        return loss(batch)

    learner.policy.policy.loss = record
    for batch, failed in zip(batches(3), (slice(0, 20), slice(0, 0), slice(0, 32)), strict=True):
        batch["episode_success"][failed] = False
        metrics = learner.update(batch)
        succeeded = np.delete(batch[STATE], failed, axis=0)
        assert (metric in metrics) == bool(len(succeeded))
        if len(succeeded):
            np.testing.assert_array_equal(told.pop(), succeeded)
    assert not told


def test_a_single_candidate_that_would_always_be_the_recorded_one_is_refused():
    with pytest.raises(ConfigError, match=r"distils the recorded action alone.*or keep 2"):
        PARLConfig(improvement={"kept": 1})
    assert PARLConfig(improvement={"kept": 1}, distil_data=False).improvement == {"kept": 1}


def test_without_only_successful_failures_are_cloned_as_well():
    form = make_format(PARLConfig(cloning_steps=1, only_successful=False))
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    (batch,) = batches(1)
    del batch["episode_success"]
    assert learner.update(batch)["grad_norm"] > 0


def test_values_beyond_the_head_stop_training():
    head = {"name": "hl_gauss", "low": -1.0, "high": 1.0, "bins": 16}
    form = make_format(msgspec.structs.replace(PHASES, cloning_steps=0), head)
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    with pytest.raises(EmbodiedError, match=r"beyond what algorithm\.critic\.head can say"):
        learner.update(next(batches(1)))


@pytest.mark.parametrize(
    "rewards, discount, low, high, fits",
    [
        ("cost", 0.9, -10.1, 0.0, True),
        ("cost", 0.9, -9.0, 0.0, False),
        ("sparse", 0.9, 0.0, 1.0, True),
        ("sparse", 0.9, 0.0, 0.9, False),
        ("recorded", 0.9, 0.0, 0.1, True),
    ],
)
def test_the_heads_range_is_checked_against_the_rewards(rewards, discount, low, high, fits):
    options = convert({"rewards": rewards, "discount": discount}, PARLConfig)
    if fits:
        options.check_value_range(low, high)
    else:
        with pytest.raises(ConfigError, match=r"algorithm\.critic\.head goes from"):
            options.check_value_range(low, high)


@pytest.mark.parametrize("head", HEADS)
def test_the_backup_converges_to_the_values_of_the_best_actions(head):
    policy, batch = chain(HEADS[head])
    options = PARLConfig(
        cloning_steps=0,
        offline_steps=10_000,
        critic_learning_rate=2e-3,
        target_rate=0.05,
        discount=0.9,
    )
    form = PolicyFormat(
        (), lambda _: policy, policy_state, policy_from_state,
        lambda policy, learner, seed: PARLUpdates(policy, options, learner, seed),
    )  # fmt: skip
    learner = Learner(policy, form, LEARNER, seed=0)
    for _ in range(1200):
        learner.update(batch)
    expected = np.array([[-2.71, -1.9], [-2.71, -1.0], [-1.9, 0.0]])
    np.testing.assert_allclose(chain_values(policy.critic), expected, atol=0.1)
