import msgspec
import numpy as np
import pytest
import torch

from embodied.buffer.sample.statistics import FeatureStats
from embodied.core.errors import CorruptDataError, EmbodiedError
from embodied.learn.config import LearnerConfig
from embodied.learn.learner import Learner, PolicyFormat
from policies.build import build_policy
from policies.checkpoint import policy_from_state, policy_state
from sim.pointmass import PointMassDriver

SPEC = PointMassDriver.spec
KEYS = tuple(SPEC.observation)
CONFIG = LearnerConfig(
    batch_size=32,
    steps=100,
    minutes=None,
    learning_rate=1e-3,
    weight_decay=1e-6,
    warmup_steps=10,
    max_grad_norm=1.0,
    precision="float32",
    ema_decay=0.9,
    threads=1,
    publish_every=10,
    checkpoint_every=10,
    steps_per_round=10,
    samples_per_insert=None,
)


def make_policy(statistics=None):
    stats = {
        key: FeatureStats(
            mean=[0.0] * 2,
            std=[0.5] * 2,
            min=[-1.0] * 2,
            max=[1.0] * 2,
            q01=[-1.0] * 2,
            q99=[1.0] * 2,
            count=10,
        )
        for key in KEYS
    }
    options = {"network": {"name": "mlp", "width": 32, "depth": 1}, "n_obs_steps": 1, "horizon": 4}
    return build_policy("flow", {**options, "n_action_steps": 2}, SPEC, KEYS, stats, seed=3)


FORMAT = PolicyFormat((*KEYS, "action"), make_policy, policy_state, policy_from_state)


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            **{key: rng.uniform(-1, 1, (32, 1, 2)).astype(np.float32) for key in KEYS},
            "action": rng.uniform(-1, 1, (32, 4, 2)).astype(np.float32),
            "action_is_pad": rng.random((32, 4)) < 0.1,
        }


def test_a_learner_that_was_saved_goes_on_bit_for_bit(tmp_path):
    whole = Learner(make_policy(), FORMAT, CONFIG, seed=1)
    for batch in batches(12):
        whole.update(batch)
    first = Learner(make_policy(), FORMAT, CONFIG, seed=1)
    rest = list(batches(12))
    for batch in rest[:7]:
        first.update(batch)
    first.seconds = 4.5
    first.save(tmp_path / "c.safetensors", {"note": 1})
    second, extra = Learner.load(tmp_path / "c.safetensors", FORMAT, CONFIG, seed=1)
    assert extra == {"note": 1} and second.step == 7 and second.seconds == 4.5
    for batch in rest[7:]:
        second.update(batch)
    for kind in ("policy", "ema"):
        a = whole.policy.state_dict() if kind == "policy" else whole.ema.parameters()
        b = second.policy.state_dict() if kind == "policy" else second.ema.parameters()
        for name in a:
            assert torch.equal(a[name], b[name]), (kind, name)


def test_published_weights_are_the_averages(tmp_path):
    learner = Learner(make_policy(), FORMAT, CONFIG, seed=1)
    for batch in batches(5):
        learner.update(batch)
    config, arrays = learner.weights()
    averaged = learner.ema.parameters()
    trained = learner.policy.state_dict()
    assert any(not torch.equal(averaged[name], trained[name]) for name in averaged)
    acting = policy_from_state(config, arrays)
    for name, value in acting.named_parameters():
        assert torch.equal(value, averaged[name])


def test_the_learning_rate_warms_up_and_falls_to_zero():
    learner = Learner(make_policy(), FORMAT, CONFIG, seed=1)
    batch, rates = next(batches(1)), []
    for step in range(100):
        learner.step = step
        rates.append(learner.update(batch)["learning_rate"])
    assert rates[0] == pytest.approx(1e-4, rel=1e-3)
    assert max(rates) == pytest.approx(1e-3, rel=0.03) and rates[-1] < 2e-6
    assert np.all(np.diff(rates[10:]) < 0)
    learner.step = 100
    assert learner.done


def test_a_time_budget_ends_training_too():
    learner = Learner(make_policy(), FORMAT, msgspec.structs.replace(CONFIG, minutes=0.5), seed=1)
    learner.seconds = 15.0
    assert learner.progress == pytest.approx(0.5)
    learner.seconds = 30.0
    assert learner.done


def test_a_gradient_that_is_not_finite_stops_training():
    learner = Learner(make_policy(), FORMAT, CONFIG, seed=1)
    with torch.no_grad():
        next(learner.policy.parameters()).fill_(float("nan"))
    with pytest.raises(EmbodiedError, match=r"learner\.learning_rate"):
        learner.update(next(batches(1)))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    from embodied.core.files import write_tensors

    write_tensors(tmp_path / "x", {"a": np.zeros(3)}, b"{}")
    with pytest.raises(CorruptDataError, match="not written by this version"):
        Learner.load(tmp_path / "x", FORMAT, CONFIG, seed=1)


def test_training_lowers_the_loss():
    config = msgspec.structs.replace(CONFIG, learning_rate=5e-3)
    learner = Learner(make_policy(), FORMAT, config, seed=1)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(100):
        observation = {k: rng.uniform(-1, 1, (32, 1, 2)).astype(np.float32) for k in KEYS}
        action = np.repeat(observation[KEYS[0]], 4, 1)
        batch = {**observation, "action": action, "action_is_pad": np.zeros((32, 4), bool)}
        losses.append(learner.update(batch)["loss"])
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
