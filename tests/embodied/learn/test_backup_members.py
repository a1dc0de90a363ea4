"""A target's value is the least of members of the ensemble, drawn with replacement."""

import itertools
from collections import Counter

import msgspec
import numpy as np
import pytest
import torch
from actor_critics import LEARNER, PLACES, STATE, BothWays, Judged, chain
from torch import nn

from embodied.learn.config import PARLConfig
from embodied.learn.learner import Learner, PolicyFormat
from embodied.learn.updates.parl import PARLUpdates
from policies.checkpoint import policy_from_state, policy_state
from policies.critics.configs import ScalarConfig
from policies.critics.heads import Scalar
from policies.improved import ImprovedPolicy

LEVELS = (5.0, -1.0, 2.0)
FROZEN = PARLConfig(cloning_steps=0, offline_steps=10_000, discount=0.9, critic_learning_rate=1e-12)


class Levels(nn.Module):
    """Member e says LEVELS[e] times the first action, whatever is seen."""

    def __init__(self, spec):
        super().__init__()
        self.spec, self.config = spec, Judged()
        self.head = Scalar(ScalarConfig())
        self.levels_E = nn.Parameter(torch.tensor(LEVELS))

    def encode(self, obs, rng=None):
        return torch.zeros(len(obs[STATE]), 1)

    def logits(self, cond_BC, actions_BnHD):
        return self.levels_E[:, None, None, None] * actions_BnHD[None, :, :, 0]

    def values(self, cond_BC, actions_BnHD):
        return self.head.value(self.logits(cond_BC, actions_BnHD))


def judged():
    """A policy that steps back or forth, and the ensemble that judges it."""
    chained, _ = chain({"name": "scalar"})
    spec = chained.spec
    return ImprovedPolicy(spec, chained.config, BothWays(spec), Levels(spec))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_least_of_a_targets_members_has_the_law_of_draws_with_replacement(count):
    """The second row's values are the first's, negated: so the greatest of them shows too."""
    policy, options = judged(), msgspec.structs.replace(FROZEN, backup_members=count)
    seen, chunks = {STATE: torch.zeros(2, 1, 3)}, torch.tensor([1.0, -1.0])[:, None, None]
    found = Counter()
    for seed in range(60):
        updates = PARLUpdates(policy, options, LEARNER, seed)
        for _ in range(20):
            least, negated = updates._least(seen, chunks).tolist()
            found[least, -negated] += 1
    tuples = [*itertools.product(LEVELS, repeat=count)]
    expected = Counter((min(drawn), max(drawn)) for drawn in tuples)
    assert found.keys() == expected.keys()
    for ends, ways in expected.items():
        assert found[ends] / found.total() == pytest.approx(ways / len(tuples), abs=0.05), ends


def test_a_step_aims_at_the_least_of_its_members():
    policy = judged()
    form = PolicyFormat(
        (), lambda _: policy, policy_state, policy_from_state,
        lambda policy, learner, seed: PARLUpdates(policy, FROZEN, learner, seed),
    )  # fmt: skip
    learner = Learner(policy, form, LEARNER, seed=0)
    batch = {
        STATE: PLACES[:3],
        f"next.{STATE}": PLACES[1:],
        "action": np.ones((3, 1, 1), np.float32),
        "action_is_pad": np.zeros((3, 1), bool),
        "return": np.full(3, -1.0, np.float32),
        "discount": np.full(3, 0.9, np.float32),
    }
    steps = 120
    found = Counter(round(learner.update(batch)["target"], 4) for _ in range(steps))
    # By the members' mean a step forth is the better one: its values are the levels.
    expected = {-1 + 0.9 * level: ways / 9 for level, ways in ((-1.0, 5), (2.0, 3), (5.0, 1))}
    assert {y: number / steps for y, number in found.items()} == pytest.approx(
        {round(y, 4): share for y, share in expected.items()}, abs=0.1
    )
