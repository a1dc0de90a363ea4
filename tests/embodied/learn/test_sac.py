"""Soft actor-critic: its policy, temperature and backup against closed forms, and restarts."""

import math

import msgspec
import numpy as np
import pytest
import torch
from actor_critics import LEARNER, STATE, STATS, Parabola, assert_goes_on, batches, state_of

from embodied.core.config import convert
from embodied.core.errors import ConfigError
from embodied.core.specs import ArraySpec, DeviceSpec
from embodied.learn.config import RLPDConfig
from embodied.learn.learner import Learner, PolicyFormat
from embodied.learn.updates.sac import SACUpdates
from policies.build import build_critic, build_policy
from policies.checkpoint import policy_from_state, policy_state
from policies.critics.configs import CriticConfig, ImprovementConfig
from policies.improved import ImprovedConfig, ImprovedPolicy, StoredCritic, improved

RANKED = ImprovementConfig(proposals=1, kept=1, steps=0)
PHASES = RLPDConfig(cloning_steps=4, offline_steps=3, critic_steps=2, entropy_backup=True)
ONLINE = RLPDConfig(cloning_steps=0, offline_steps=0, actor_learning_rate=3e-3)


def base_policy(horizon, executed, dim=1):
    device = DeviceSpec({STATE: ArraySpec((3,))}, ArraySpec((dim,), low=(-1.0,), high=(1.0,)), 10.0)
    sizes = {"n_obs_steps": 1, "horizon": horizon, "n_action_steps": executed, "width": 32}
    return build_policy("gaussian", sizes, device, [STATE], {STATE: STATS}, seed=3)


def make_format(options=PHASES):
    def make(statistics):
        base = base_policy(4, 2, 2)
        values = {"head": {"name": "scalar"}, "horizon": 2, "members": 3, "width": 16}
        critic = build_critic(values, base.spec, {STATE: STATS}, seed=4)
        return improved(base, critic, RANKED)

    def updates(policy, learner, seed):
        return SACUpdates(policy, options, learner, seed)

    return PolicyFormat((STATE, "action"), make, policy_state, policy_from_state, updates)


def judged_by(critic, base, options, **learner):
    """A learner whose policy is judged in closed form."""
    stored = StoredCritic(spec={}, options=CriticConfig(head={"name": "scalar"}, horizon=1))
    config = ImprovedConfig(policy={}, critic=stored, improvement=RANKED)
    policy = ImprovedPolicy(base.spec, config, base, critic)
    form = PolicyFormat(
        (), lambda _: policy, policy_state, policy_from_state,
        lambda policy, learner, seed: SACUpdates(policy, options, learner, seed),
    )  # fmt: skip
    return Learner(policy, form, msgspec.structs.replace(LEARNER, **learner), seed=0)


def one_state(n, horizon=1, reward=0.0, discount=0.0):
    return {
        STATE: np.zeros((n, 1, 3), np.float32),
        f"next.{STATE}": np.zeros((n, 1, 3), np.float32),
        "action": np.zeros((n, horizon, 1), np.float32),
        "action_is_pad": np.zeros((n, horizon), bool),
        "return": np.full(n, reward, np.float32),
        "discount": np.full(n, discount, np.float32),
    }


def test_the_policy_is_cloned_then_stays_then_both_learn():
    form = make_format()
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    parts = ("policy/policy.", "policy/critic.", "updates/target", "updates/log_temperature")
    moved = []
    for batch in batches(11):
        before, acted = state_of(learner), learner.acts
        learner.update(batch)
        changed = {k for k, v in state_of(learner).items() if not torch.equal(v, before[k])}
        moved.append((*(any(k.startswith(part) for k in changed) for part in parts), acted))
    cloned, alone = (True, False, False, False, False), (False, True, True, False, False)
    online = [(True, True, True, True, True), (False, True, True, False, True)]
    assert moved == [cloned] * 4 + [alone] * 3 + online * 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [2, 5, 8])
def test_what_was_saved_in_any_phase_goes_on_bit_for_bit(tmp_path, cut, precision):
    form, config = make_format(), msgspec.structs.replace(LEARNER, precision=precision)
    assert_goes_on(form, config, cut, tmp_path / "c.safetensors")


def test_what_is_published_acts_with_its_critic_beside_it():
    form = make_format()
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    for batch in batches(9):
        learner.update(batch)
    acting = policy_from_state(*learner.weights())
    obs = {STATE: np.zeros((2, 1, 3), np.float32)}
    chunks = acting.act(acting.init(2), obs, seed=np.arange(2))[1]
    assert chunks.shape == (2, 4, 2) and (chunks[0] != chunks[1]).any()
    assert not any("temperature" in name for name in acting.state_dict())


def test_the_policy_becomes_the_exponential_of_the_values():
    """π ∝ exp(Q/α) with Q = −(a − c)² / 2τ²: normal, mean c, variance α τ²."""
    centre, scale, temperature = 0.3, 0.5, 0.05
    options = msgspec.structs.replace(
        ONLINE, initial_temperature=temperature, temperature_learning_rate=0.0
    )
    base = base_policy(1, 1)
    learner = judged_by(Parabola(base.spec, centre, scale), base, options, ema_decay=0.9)
    for _ in range(500):
        metrics = learner.update(one_state(256))
    drawn = policy_sample(learner)
    assert drawn.mean() == pytest.approx(centre, abs=0.01)
    assert drawn.std() == pytest.approx(math.sqrt(temperature) * scale, rel=0.08)
    entropy = 0.5 * math.log(2 * math.pi * math.e * temperature * scale**2)
    assert metrics["entropy"] == pytest.approx(entropy, abs=0.1)
    assert metrics["temperature"] == pytest.approx(temperature)


def policy_sample(learner):
    with learner.averaged():
        return learner.policy.sample({STATE: np.zeros((1, 1, 3), np.float32)}, 4000, seed=0).numpy()


@pytest.mark.parametrize("start", [pytest.param(0.003, marks=pytest.mark.slow), 0.3])
def test_the_temperature_moves_until_the_entropy_is_the_target(start):
    """Of a normal with the variance α τ²; so α is known too."""
    target, scale = -1.2, 0.5
    options = msgspec.structs.replace(
        ONLINE,
        initial_temperature=start,
        temperature_learning_rate=1e-2,
        target_entropy=target,
    )
    base = base_policy(3, 1)
    learner = judged_by(Parabola(base.spec, 0.2, scale), base, options)
    found = [learner.update(one_state(256, 3)) for _ in range(900)][-200:]
    assert np.mean([row["entropy"] for row in found]) == pytest.approx(target, abs=0.05)
    expected = math.exp(2 * target) / (2 * math.pi * math.e) / scale**2
    assert np.mean([row["temperature"] for row in found]) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("entropy_backup", [True, False])
def test_targets_hold_the_entropy_of_what_is_executed_if_they_are_told_to(horizon, entropy_backup):
    """Where all values are 0: y = r − γ α E log π of the first step."""
    base = base_policy(horizon, 1)
    options = msgspec.structs.replace(
        ONLINE, initial_temperature=0.7, offline_steps=1, entropy_backup=entropy_backup
    )
    learner = judged_by(Parabola(base.spec, 0.0, math.inf), base, options)
    obs = {STATE: np.zeros((20_000, 1, 3), np.float32)}
    with torch.no_grad():
        log_prob_BH = base.rsample(obs, torch.Generator("cpu").manual_seed(1))[1]
    bonus = -0.9 * 0.7 * float(log_prob_BH[:, 0].mean())
    found = learner.update(one_state(20_000, horizon, reward=-1.0, discount=0.9))["target"]
    assert abs(bonus) > 0.1
    assert found == pytest.approx(-1.0 + (bonus if entropy_backup else 0.0), abs=0.02)


def test_the_critics_parameters_get_no_gradient_from_the_policy():
    form = make_format(ONLINE)
    learner = Learner(form.make({}), form, LEARNER, seed=1)
    before = {name: p.requires_grad for name, p in learner.policy.named_parameters()}
    seen = {}

    class Watched:
        def descend(self, group, loss, learning_rate):
            learner.policy.zero_grad(set_to_none=True)
            loss.backward()
            named = learner.policy.named_parameters()
            seen[group] = {name.split(".")[0] for name, p in named if p.grad is not None}
            return 0.0

    learner.updates.step(
        {k: torch.from_numpy(v) for k, v in next(batches(1)).items()}, Watched(), 0
    )
    assert seen == {"critic": {"critic"}, "policy": {"policy"}, "temperature": set()}
    assert before == {name: p.requires_grad for name, p in learner.policy.named_parameters()}


def test_a_target_entropy_beyond_the_uniform_densitys_is_refused():
    with pytest.raises(ConfigError, match="target_entropy"):
        convert({"target_entropy": 0.7}, RLPDConfig)
