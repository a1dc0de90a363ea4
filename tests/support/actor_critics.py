"""Small learners of algorithms with a critic: options, batches, and critics in closed form."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from embodied.buffer.sample.statistics import FeatureStats
from embodied.core.specs import ArraySpec, DeviceSpec, PolicySpec
from embodied.learn.config import LearnerConfig
from embodied.learn.learner import Learner, PolicyFormat
from policies.build import build_critic, build_policy
from policies.checkpoint import policy_from_state, policy_state
from policies.critics.configs import ImprovementConfig, ScalarConfig
from policies.critics.heads import Scalar
from policies.improved import ImprovedConfig, ImprovedPolicy, StoredCritic, improved

LEARNER = LearnerConfig(
    batch_size=32,
    steps=10_000,
    minutes=None,
    learning_rate=1e-3,
    weight_decay=0.0,
    warmup_steps=10,
    max_grad_norm=10.0,
    precision="float32",
    ema_decay=0.99,
    threads=1,
    publish_every=10,
    checkpoint_every=10,
    steps_per_round=10,
    samples_per_insert=None,
)
STATE = "observation.state"
STATS = FeatureStats(
    mean=[0.0] * 3, std=[1.0] * 3, min=[-1.0] * 3, max=[1.0] * 3, q01=[-1.0] * 3, q99=[1.0] * 3,
    count=10,
)  # fmt: skip


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            STATE: rng.uniform(-1, 1, (32, 1, 3)).astype(np.float32),
            f"next.{STATE}": rng.uniform(-1, 1, (32, 1, 3)).astype(np.float32),
            "action": rng.uniform(-1, 1, (32, 4, 2)).astype(np.float32),
            "action_is_pad": np.zeros((32, 4), bool),
            "return": rng.uniform(-2, 0, 32).astype(np.float32),
            "discount": np.full(32, 0.9, np.float32),
            "return_to_go": rng.uniform(-4, 0, 32).astype(np.float32),
            "episode_success": np.ones(32, bool),
        }


NETWORK = {"name": "mlp", "width": 32, "depth": 1, "time_dim": 16}


def improved_format(kind, options, head=None, name="flow", **sizes):
    """Small policies with small critics that updates of a kind, with these options, train."""
    device = DeviceSpec({STATE: ArraySpec((3,))}, ArraySpec((2,), low=(-1.0,), high=(1.0,)), 10.0)
    chunks = {"n_obs_steps": 1, "horizon": 4, "n_action_steps": 2, "network": NETWORK, **sizes}

    def make(statistics):
        base = build_policy(name, chunks, device, [STATE], {STATE: STATS}, seed=3)
        values = {"head": head or {"name": "scalar"}, "horizon": chunks["n_action_steps"]}
        critic = build_critic(
            {**values, "members": 3, "width": 16}, base.spec, {STATE: STATS}, seed=4
        )
        return improved(base, critic, ImprovementConfig(proposals=4, kept=2, steps=1))

    def updates(policy, learner, seed):
        return kind(policy, options, learner, seed)

    return PolicyFormat((STATE, "action"), make, policy_state, policy_from_state, updates)


class BothWays(nn.Module):
    """Proposes a step back and a step forth, whatever it sees."""

    name = "both_ways"

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.unused = nn.Parameter(torch.zeros(1))

    def sample(self, obs, n, *, seed):
        chunks = torch.tensor([-1.0, 1.0])[:, None, None]
        return chunks.expand(len(obs[STATE]), n, 1, 1).clone()

    def seed_training(self, seed):
        pass


HEADS = {
    "scalar": {"name": "scalar"},
    "hl_gauss": {"name": "hl_gauss", "low": -11.0, "high": 1.0, "bins": 96},
}
PLACES = np.eye(4, 3, dtype=np.float32)[:, None]


def chain(head):
    """A chain of four places, the last one the goal; each step costs 1, the discount is .9: a
    policy that steps back or forth, and a batch of every step that there is."""
    spec = PolicySpec({STATE: ArraySpec((3,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 1, 1, 1)
    values = {"head": head, "horizon": 1, "members": 2, "width": 64}
    critic = build_critic(values, spec, {STATE: STATS}, seed=4)
    stored = StoredCritic(spec={}, options=critic.config)
    improvement = ImprovementConfig(proposals=2, kept=2, steps=0)
    config = ImprovedConfig(policy={}, critic=stored, improvement=improvement)
    policy = ImprovedPolicy(spec, config, BothWays(spec), critic)
    places, actions = np.repeat(np.arange(3), 2), np.tile([-1.0, 1.0], 3)
    after = np.maximum(places + actions.astype(int), 0)
    batch = {
        STATE: PLACES[places],
        f"next.{STATE}": PLACES[after],
        "action": actions.astype(np.float32)[:, None, None],
        "action_is_pad": np.zeros((6, 1), bool),
        "return": np.where(after == 3, 0.0, -1.0).astype(np.float32),
        "discount": np.where(after == 3, 0.0, 0.9).astype(np.float32),
    }
    return policy, batch


def chain_values(critic):
    """Of the steps back and forth, in each place but the goal [3, 2]."""
    asked = torch.tensor([-1.0, 1.0]).expand(3, 2)[:, :, None, None]
    return critic.q({STATE: PLACES[:3]}, asked).detach().numpy()


def state_of(learner):
    policy = {f"policy/{k}": v.clone() for k, v in learner.policy.state_dict().items()}
    updates = {f"updates/{k}": v.clone() for k, v in learner.updates.tensors().items()}
    return policy | updates | {f"ema/{k}": v for k, v in learner.ema.parameters().items()}


def assert_goes_on(form, config, cut, path, count=14):
    """What was saved after `cut` batches ends bit for bit as what was never saved."""
    whole = Learner(form.make({}), form, config, seed=1)
    first = Learner(form.make({}), form, config, seed=1)
    rest = list(batches(count))
    for batch in rest:
        whole.update(batch)
    for batch in rest[:cut]:
        first.update(batch)
    first.save(path, {})
    second, _ = Learner.load(path, form, config, seed=1)
    for batch in rest[cut:]:
        second.update(batch)
    expected, found = state_of(whole), state_of(second)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


@dataclass
class Judged:
    horizon: int = 1


class Parabola(nn.Module):
    """Q = −(a − c)² / 2τ² + b of the first action, whatever is seen; only b, from 0 on, learns."""

    def __init__(self, spec, centre, scale):
        super().__init__()
        self.spec, self.config = spec, Judged()
        self.centre, self.scale = centre, scale
        self.head = Scalar(ScalarConfig())
        self.shift = nn.Parameter(torch.zeros(1))

    def encode(self, obs, rng=None):
        return torch.zeros(len(obs[STATE]), 1)

    def logits(self, cond_BC, actions_BnHD):
        off = (actions_BnHD[:, :, 0, 0] - self.centre) / self.scale
        return -0.5 * off.square()[None, ..., None] + self.shift

    def values(self, cond_BC, actions_BnHD):
        return self.head.value(self.logits(cond_BC, actions_BnHD))
