"""The regulariser of Cal-QL: what it counts, what it leaves alone, and what it does to a critic."""

import math

import numpy as np
import pytest
import torch
from actor_critics import LEARNER, STATE, assert_goes_on, batches, improved_format

from embodied.buffer.sample.windows import WindowSpec
from embodied.learn.config import PARLConfig
from embodied.learn.learner import Learner
from embodied.learn.parl import PARL
from embodied.learn.updates.calql import calibrated
from embodied.learn.updates.parl import PARLUpdates


def tabulated(seed=0):
    """Values of 2 members in 3 situations: recorded, 10 random, 2 of the policy's."""
    rng = torch.Generator().manual_seed(seed)
    return [
        (-5 * torch.rand(shape, generator=rng, dtype=torch.float64)).requires_grad_()
        for shape in ((2, 3), (2, 3, 10), (2, 3, 2))
    ]


def test_it_is_the_mean_of_31_terms():
    """methods.md D4.4: M = 31 with n = 10, the policy's two chunks counting ten times each."""
    q, random, policy = tabulated()
    bound = torch.tensor([-2.0, -4.0, -1.0], dtype=torch.float64)
    found = calibrated(q, random, policy, bound, copies=10)
    for e in range(2):
        for b in range(3):
            kept = [max(float(x), float(bound[b])) for x in policy[e, b] for _ in range(10)]
            terms = [*random[e, b].tolist(), *kept, float(q[e, b])]
            assert len(terms) == 31
            mean = sum(math.exp(term) for term in terms) / 31
            assert float(found[e, b]) == pytest.approx(math.log(mean) - float(q[e, b]))


def test_where_all_values_are_the_same_nothing_is_to_be_held_down():
    level = torch.full((2, 3, 10), -7.0)
    for copies in (1, 4, 10):
        found = calibrated(
            level[..., 0], level, level[..., :2], torch.full((3,), -9.0), copies=copies
        )
        torch.testing.assert_close(found, torch.zeros(2, 3))


def test_what_is_valued_below_what_was_earned_is_not_pushed_further_down():
    q, random, policy = tabulated()
    bound = torch.tensor([1.0, -6.0, 1.0], dtype=torch.float64)
    calibrated(q, random, policy, bound, copies=10).sum().backward()
    assert (policy.grad[:, [0, 2]] == 0).all() and (policy.grad[:, 1] > 0).all()
    assert (random.grad > 0).all() and (q.grad < 0).all()


def test_the_more_was_earned_the_greater_it_is():
    q, random, policy = (x.detach() for x in tabulated())
    found = torch.stack(
        [
            calibrated(q, random, policy, torch.full((3,), bound).double(), copies=10)
            for bound in (-9.0, -6.0, 0.0, 0.5, 2.0)
        ]
    )
    assert torch.equal(found[0], found[1])
    assert (found[1:].diff(dim=0) > 0).all()


def trained(steps=120, earned=-9.0, **options):
    """Of a critic that is shown one action of value −1 everywhere: the values of that action,
    of random ones and of the policy's best; and its last metrics."""
    config = PARLConfig(cloning_steps=0, offline_steps=10**6, critic_learning_rate=3e-3, **options)
    form = improved_format(PARLUpdates, config)
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    metrics = {}
    for batch in batches(steps):
        shown = {
            "action": np.full((32, 4, 2), 0.5, np.float32),
            "return": np.full(32, -1.0, np.float32),
            "discount": np.zeros(32, np.float32),
            "return_to_go": np.full(32, earned, np.float32),
        }
        metrics = learner.update({**batch, **shown})
    obs = {STATE: np.random.default_rng(0).uniform(-1, 1, (64, 1, 3)).astype(np.float32)}
    random = torch.rand((64, 20, 4, 2), generator=torch.Generator().manual_seed(0)) * 2 - 1
    best = learner.policy.sample(obs, 1, seed=0)
    asked = (torch.full((64, 1, 4, 2), 0.5), random, best)
    with torch.no_grad():
        return [float(learner.policy.critic.q(obs, x).mean()) for x in asked], metrics


@pytest.mark.slow
def test_a_critic_learns_to_think_less_of_what_nobody_did():
    (shown, other, _), metrics = trained()
    assert shown == pytest.approx(-1, abs=0.1) and abs(other - shown) < 0.4
    assert "conservatism" not in metrics
    (held_shown, held, held_best), metrics = trained(conservatism=0.5)
    assert held < held_shown - 0.8 and held_best < held_shown - 0.5
    assert metrics["conservatism"] < -0.5
    (_, _, earned_best), _ = trained(conservatism=0.5, earned=0.0)
    assert earned_best > held_best + 0.1


@pytest.mark.parametrize(
    "asks, told",
    [
        ({}, (False, False)),
        ({"only_successful": True}, (False, True)),
        ({"conservatism": 0.1}, (True, False)),
        ({"distil_successes": True}, (False, True)),
    ],
)
def test_what_an_episode_came_to_is_asked_for_by_what_needs_it(asks, told):
    spec = WindowSpec(1, 4, (STATE,))
    found = PARL(PARLConfig(**{"only_successful": False, **asks})).windows(spec, 2)
    assert (found.return_to_go, found.episode_success) == told
    assert (found.n_step, found.rewards) == (2, "cost")


def test_what_was_saved_goes_on_bit_for_bit(tmp_path):
    config = PARLConfig(cloning_steps=2, offline_steps=4, critic_steps=2, conservatism=0.1)
    form = improved_format(PARLUpdates, config)
    assert_goes_on(form, LEARNER, 5, tmp_path / "c.safetensors", count=9)
