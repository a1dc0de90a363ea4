"""Small learners of algorithms with a critic: options, batches, and critics in closed form."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from embodied.buffer.sample.statistics import FeatureStats
from embodied.learn.config import LearnerConfig
from embodied.learn.learner import Learner
from policies.critics.configs import ScalarConfig
from policies.critics.heads import Scalar

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
        }


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
