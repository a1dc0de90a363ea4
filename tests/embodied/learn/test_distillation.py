"""What PA-RL distils: the labels, and the law of the policy that learns them (methods.md D4)."""

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from actor_critics import LEARNER, STATE, STATS, Parabola
from gaussians import ideal
from torch import nn

from embodied.core.specs import ArraySpec, DeviceSpec
from embodied.learn.config import PARLConfig
from embodied.learn.learner import Learner, PolicyFormat
from embodied.learn.updates.parl import PARLUpdates
from policies.build import build_policy
from policies.checkpoint import policy_from_state, policy_state
from policies.critics.configs import CriticConfig, ImprovementConfig
from policies.improved import ImprovedConfig, ImprovedPolicy, StoredCritic

MEAN, SIGMA, CENTRE, SCALE = -0.2, 0.25, 0.51, 0.3
PROPOSALS, BINS = 64, 33
BIN = 2 / (BINS - 1)
NETWORK = {"name": "mlp", "width": 64, "depth": 2, "time_dim": 32}
OPTIONS = {
    "flow": {"network": NETWORK, "solver": "heun", "num_steps": 20},
    "diffusion": {"network": NETWORK, "scheduler": "dpmsolver++", "num_steps": 20},
    "autoregressive": {
        "tokenizer": {"name": "bins", "bins": BINS},
        "transformer": {"width": 32, "depth": 1, "heads": 2},
    },
}
CLASSES = ("flow", "autoregressive")


def build(name, horizon=1, dim=1, seed=1) -> Any:
    action = ArraySpec((dim,), low=(-1.0,), high=(1.0,))
    device = DeviceSpec({STATE: ArraySpec((3,))}, action, 10.0)
    sizes = {"n_obs_steps": 1, "horizon": horizon, "n_action_steps": 1}
    return build_policy(
        name, {**sizes, **OPTIONS[name]}, device, [STATE], {STATE: STATS}, seed=seed
    )


class Exact(nn.Module):
    """The flow to N(MEAN, SIGMA²), with something to learn."""

    def __init__(self):
        super().__init__()
        self.velocity = ideal("flow", MEAN, SIGMA, None)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x_BHD, time_B, cond_BC):
        u = torch.as_tensor(time_B)
        return self.velocity(x_BHD, u[:, None, None] if u.ndim else u) + self.shift


def normal(name, horizon):
    """A policy of a class, each of whose numbers is drawn from N(MEAN, SIGMA²)."""
    policy = build(name, horizon)
    if name == "flow":
        policy.network = Exact()
        return policy
    values_V = torch.linspace(-1, 1, BINS)
    with torch.no_grad():
        policy.head.outlet.weight.zero_()
        policy.head.outlet.bias.copy_(-0.5 * ((values_V - MEAN) / SIGMA).square())
    return policy


def judged(base, scale=SCALE, kept=PROPOSALS):
    stored = StoredCritic(spec={}, options=CriticConfig(head={"name": "scalar"}, horizon=1))
    improvement = ImprovementConfig(proposals=kept, kept=kept, steps=0)
    config = ImprovedConfig(policy={}, critic=stored, improvement=improvement)
    return ImprovedPolicy(base.spec, config, base, Parabola(base.spec, CENTRE, scale))


def make_learner(policy, options, config=LEARNER):
    form = PolicyFormat(
        (), lambda _: policy, policy_state, policy_from_state,
        lambda policy, learner, seed: PARLUpdates(policy, options, learner, seed),
    )  # fmt: skip
    return Learner(policy, form, config, seed=0)


def batch_of(states_BTK, actions_BHD):
    rows, horizon, _ = actions_BHD.shape
    return {
        STATE: states_BTK,
        f"next.{STATE}": states_BTK,
        "action": actions_BHD.astype(np.float32),
        "action_is_pad": np.zeros((rows, horizon), bool),
        "return": np.full(rows, -1.0, np.float32),
        "discount": np.full(rows, 0.9, np.float32),
        "episode_success": np.ones(rows, bool),
    }


def distilled(name, recorded, horizon=1, **options):
    """One step of a learner that is online at once: the labels that the policy is given, and the
    proposals that they were chosen from."""
    policy = judged(normal(name, horizon))
    once = {"cloning_steps": 0, "offline_steps": 0, "proposals_age": 0}
    learner = make_learner(policy, PARLConfig(**once, **options))
    pools, told = [], []
    sample, loss = policy.policy.sample, policy.policy.loss

    def propose(obs, n, *, seed):
        pools.append(sample(obs, n, seed=seed))
        return pools[-1]

    def learn(labels):
        told.append(labels)
        return loss(labels)

    policy.policy.sample, policy.policy.loss = propose, learn
    rows = len(recorded)
    states = np.random.default_rng(0).uniform(-1, 1, (rows, 1, 3)).astype(np.float32)
    batch = batch_of(states, np.repeat(recorded[:, None, None], horizon, axis=1))
    batch["action_is_pad"][:, 1:] = True
    learner.update(batch)
    (labels,) = told
    np.testing.assert_array_equal(labels[STATE], states)
    assert not labels["action_is_pad"].any()
    return labels["action"], pools[-1]


@pytest.mark.parametrize("distil_data", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_without_a_temperature_the_labels_are_the_best_candidates(name, distil_data):
    recorded = np.where(np.arange(200) % 2, CENTRE, -0.9)
    labels, pool = distilled(
        name, recorded, horizon=2, distil_temperature=None, distil_data=distil_data
    )
    data = torch.from_numpy(recorded.astype(np.float32))[:, None, None]
    taken = (labels == data).all(dim=(1, 2))
    assert taken.tolist() == ([False, True] * 100 if distil_data else [False] * 200)
    off = (labels[:, 0, 0] - CENTRE).abs()
    torch.testing.assert_close(off[~taken], (pool[:, :, 0, 0] - CENTRE).abs().amin(1)[~taken])
    assert (pool == labels[:, None]).all(dim=(2, 3)).any(dim=1)[~taken].all()


def tilt(mean, sigma, rounds):
    """Mean and deviation of N(mean, sigma²) times exp of so many times the critic's value."""
    precision = 1 / sigma**2 + rounds / SCALE**2
    return (mean / sigma**2 + rounds * CENTRE / SCALE**2) / precision, math.sqrt(1 / precision)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("name", CLASSES)
def test_at_a_temperature_the_labels_follow_the_exponential_tilt(name, temperature):
    """methods.md D4.1, with the temperature T: the critic's precision is 1/(Tτ²)."""
    labels, pool = distilled(
        name, np.full(4000, 0.9), distil_temperature=temperature, distil_data=False
    )
    assert not torch.isclose(labels, torch.tensor(0.9)).any()
    assert (float(pool.mean()), float(pool.std())) == pytest.approx((MEAN, SIGMA), abs=0.005)
    found = float(labels.mean()), float(labels.std())
    assert found == pytest.approx(tilt(MEAN, SIGMA, 1 / temperature), abs=0.02)


@pytest.mark.parametrize("name", CLASSES)
def test_at_a_temperature_the_recorded_action_is_one_of_the_candidates(name):
    """The best there is, in the place of the worst of n: its share is 1 / (1 + Σ exp(q − q₀))."""
    labels, pool = distilled(name, np.full(4000, CENTRE), distil_temperature=1.0, distil_data=True)
    others = torch.exp(-0.5 * ((pool[:, :, 0, 0] - CENTRE) / SCALE).square())
    expected = 1 / (1 + others.sum(dim=1) - others.amin(dim=1))
    share = (labels == np.float32(CENTRE)).float().mean()
    assert float(share) == pytest.approx(float(expected.mean()), abs=0.02)


def moments(policy, states, n=64):
    drawn = policy.sample({STATE: states}, n, seed=0).flatten()
    return float(drawn.mean()), float(drawn.std())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_policy_is_distilled_to_the_tilt_and_in_a_second_round_to_its_square(name):
    """methods.md D4.1: n rounds → precision 1/σ² + n/τ². All labels of a round are chosen from what
    the policy proposed at its beginning, in states so alike that it does not tell them apart."""
    steps = 400
    options = PARLConfig(
        cloning_steps=600,
        offline_steps=0,
        proposals_age=steps,
        distil_learning_rate=2e-3,
        distil_temperature=1.0,
        distil_data=False,
    )
    config = msgspec.structs.replace(LEARNER, learning_rate=3e-3, ema_decay=0.98)
    learner = make_learner(judged(build(name)), options, config)
    states = 1e-6 * np.arange(128 * 3, dtype=np.float32).reshape(128, 1, 3)
    rng = np.random.default_rng(0)

    def train(count):
        for _ in range(count):
            learner.update(batch_of(states, rng.normal(MEAN, SIGMA, (128, 1, 1))))
        with learner.averaged():
            return moments(learner.policy.policy, states)

    assert train(options.cloning_steps) == pytest.approx((MEAN, SIGMA), abs=0.02)
    for rounds in (1, 2):
        (mean, sigma), (wanted, deviation) = train(steps), tilt(MEAN, SIGMA, rounds)
        assert mean == pytest.approx(wanted, abs=0.04)
        assert sigma == pytest.approx(deviation, abs=0.015)


def optimised_data(rows):
    """Chunks of two steps of two numbers that depend on one another, out of proposals that go
    either way; the critic prefers one."""
    rng = np.random.default_rng(0)
    side = rng.choice([-0.4, 0.4], (rows, 16, 1, 1)) * np.array([[1.0, -0.5], [0.8, 0.2]])
    pool = side + rng.normal(0, 0.1, (rows, 16, 1, 1)) + rng.normal(0, 0.05, side.shape)
    policy = judged(build("flow", horizon=2, dim=2), scale=0.8, kept=16)
    obs = {STATE: np.zeros((rows, 1, 3), np.float32)}
    pool = torch.from_numpy(pool.astype(np.float32))
    return policy.optimised(obs, pool, seed=0, temperature=1.0).numpy()


@pytest.mark.slow
def test_diffusion_and_tokens_learn_the_same_law_from_the_same_optimised_data():
    """methods.md D4.7: the same moments within a bin, and the same correlations."""
    data = optimised_data(4096)
    form = PolicyFormat((), lambda _: None, policy_state, policy_from_state)
    config = msgspec.structs.replace(LEARNER, learning_rate=3e-3, steps=800, ema_decay=0.98)
    states, found = np.zeros((128, 1, 3), np.float32), {"data": data}
    for name in ("diffusion", "autoregressive"):
        rng = np.random.default_rng(1)
        learner = Learner(build(name, horizon=2, dim=2), form, config, seed=0)
        while not learner.done:
            learner.update(batch_of(states, data[rng.choice(len(data), 128)]))
        fitted = policy_from_state(*learner.weights())
        found[name] = fitted.sample({STATE: states}, 32, seed=0).flatten(0, 1).numpy()
    for one, other in itertools.combinations(found.values(), 2):
        np.testing.assert_allclose(one.mean(0), other.mean(0), atol=BIN / 2)
        np.testing.assert_allclose(one.std(0), other.std(0), atol=BIN / 2)
        correlations = (np.corrcoef(x.reshape(len(x), 4).T) for x in (one, other))
        np.testing.assert_allclose(*correlations, atol=0.15)
