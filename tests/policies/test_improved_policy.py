"""A policy improved by a critic is a policy like any other, and better by its critic."""

import json

import msgspec
import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.protocols import Composite
from embodied.core.registry import names
from embodied.core.seeds import derive_seed
from embodied.core.specs import ArraySpec
from policies.acting import InferenceConfig
from policies.checkpoint import load_policy, policy_from_state, policy_state, save_policy
from policies.compose.build import compose
from policies.critics.configs import ImprovementConfig
from policies.improved import improved
from policies.improvement import choose, improve
from policies.inference.policy import ActingPolicy

HISTOGRAM = {"name": "hl_gauss", "low": -10.0, "high": 0.0, "bins": 16}


@pytest.fixture
def build(make):
    def go(name="flow", head=HISTOGRAM, seed=5, **options):
        base = make.awaken(make.policy(name))
        critic = make.awaken(make.critic(base.spec, head=head), seed)
        sizes = {"proposals": 8, "kept": 4, "steps": 3, "step_size": 0.05} | options
        return improved(base, critic, ImprovementConfig(**sizes))

    return go


@pytest.mark.parametrize(
    "name", sorted({*names("policies")} - {"improved", "lerobot", "lora", "vae"})
)
def test_every_policy_is_improved_without_a_special_case(build, make, name):
    policy, obs = build(name), make.obs(3)
    assert policy.spec == policy.policy.spec and isinstance(policy, Composite)
    assert policy.parts() == {"policy": policy.policy}
    chosen = policy.sample(obs, 2, seed=0)
    assert chosen.shape == (3, 2, 6, 2) and chosen.abs().max() <= 1
    pools = policy.policy.sample(obs, 16, seed=derive_seed(0, "proposals"))
    q = policy.critic.q(obs, pools).unflatten(1, (2, 8))
    assert (policy.critic.q(obs, chosen) > q.max(dim=2).values).all()


def test_without_steps_the_best_proposal_acts(build, make):
    policy, obs, seeds = build(steps=0), make.obs(3), np.array([4, 9, 2])
    carry, chunk = policy.act(policy.init(3), obs, seed=seeds)
    assert carry is None
    for row, seed in enumerate(seeds):
        one = {key: value[row : row + 1] for key, value in obs.items()}
        pool = policy.policy.sample(one, 8, seed=derive_seed(int(seed), "proposals"))
        best = pool[0, policy.critic.q(one, pool)[0].argmax()]
        np.testing.assert_array_equal(chunk[row], best.numpy())


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_a_row_depends_on_its_own_seed_and_observation(build, make, temperature):
    policy, obs = build(temperature=temperature), make.obs(4)
    _, chunk = policy.act(None, obs, seed=np.arange(4))
    _, other = policy.act(None, obs, seed=np.array([8, 1, 9, 3]))
    np.testing.assert_array_equal(other[1::2], chunk[1::2])
    assert (other[::2] != chunk[::2]).any(axis=(1, 2)).all()
    for row in range(4):
        one = {key: value[row : row + 1] for key, value in obs.items()}
        alone = policy.act(None, one, seed=np.array([row]))[1]
        np.testing.assert_allclose(alone[0], chunk[row], atol=1e-5)


def test_a_temperature_draws_and_none_takes_the_best(build, make):
    obs = make.obs(3)

    def mean_q(temperature):
        policy = build(head={"name": "scalar"}, temperature=temperature)
        return policy.critic.q(obs, policy.sample(obs, 60, seed=0)).mean().item()

    assert mean_q(1e4) < mean_q(0.1) < mean_q(1e-6) == pytest.approx(mean_q(None), abs=1e-5)


def test_committed_actions_stand_while_the_rest_is_judged_and_moved(build, make):
    obs, seeds = make.obs(3), np.arange(3)
    prefix = np.float32([[[0.3, -1.0], [1.0, 0.1]]] * 3)
    policy = build()
    _, chunk = policy.act(None, obs, prefix=prefix, seed=seeds)
    np.testing.assert_array_equal(chunk[:, :2], prefix)
    for row, seed in enumerate(seeds):
        one = {key: value[row : row + 1] for key, value in obs.items()}
        pool = policy.policy.sample(one, 8, seed=derive_seed(int(seed), "proposals"))
        before = torch.from_numpy(prefix[row])

        def tail_q(tail, one=one, before=before):
            head = before.expand(1, tail.shape[1], -1, -1)
            return policy.critic.q(one, torch.cat([head, tail], dim=2))

        options = policy.config.improvement
        kept, q = improve(tail_q, pool[:, :, 2:], policy.low_D, policy.high_D, options)
        expected = choose(kept, q, None, None)[0].numpy()
        np.testing.assert_allclose(chunk[row, 2:], expected, atol=1e-5)
    with pytest.raises(SpecError, match="4 actions are committed"):
        policy.act(None, obs, prefix=prefix.repeat(2, axis=1), seed=seeds)
    with pytest.raises(SpecError, match="prefix has shape"):
        policy.act(None, obs, prefix=prefix[:2], seed=seeds)


def test_learns_as_its_policy_does(build, make):
    policy, batch = build(), make.batch(4)
    policy.seed_training(3)
    loss, metrics = policy.loss(batch)
    policy.policy.seed_training(3)
    expected, own = policy.policy.loss(batch)
    assert torch.equal(loss, expected) and metrics == own


def test_a_checkpoint_acts_bit_for_bit(build, make, tmp_path):
    policy, obs, seeds = build(temperature=0.5), make.obs(3), np.arange(3)
    save_policy(tmp_path / "final", policy)
    twin = load_policy(tmp_path / "final")
    assert twin.config == policy.config and type(twin.critic) is type(policy.critic)
    assert twin.state_dict().keys() == policy.state_dict().keys()
    for key, value in policy.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    np.testing.assert_array_equal(
        twin.act(None, obs, seed=seeds)[1], policy.act(None, obs, seed=seeds)[1]
    )
    assert torch.equal(twin.sample(obs, 3, seed=1), policy.sample(obs, 3, seed=1))


def test_acts_with_packed_networks_and_as_a_part_of_others(build, make):
    policy, obs, seeds = build(), make.obs(3), np.arange(3)
    acting = ActingPolicy(policy, InferenceConfig())
    np.testing.assert_allclose(
        acting.act(acting.init(3), obs, seed=seeds)[1],
        policy.act(None, obs, seed=seeds)[1],
        atol=1e-4,
    )
    pool = compose({"a": policy, "b": build("act")}, {"name": "pooled", "proposals": 2})
    twin = policy_from_state(*policy_state(pool))
    np.testing.assert_array_equal(
        twin.act(None, obs, seed=seeds)[1], pool.act(None, obs, seed=seeds)[1]
    )


def test_a_critic_may_read_less_than_its_policy(make):
    base = make.awaken(make.policy())
    state = {"observation.state": base.spec.observation["observation.state"]}
    spec = msgspec.structs.replace(base.spec, observation=state, n_obs_steps=1)
    policy = improved(base, make.awaken(make.critic(spec)), ImprovementConfig())
    obs = make.obs(2)
    newest = {"observation.state": obs["observation.state"][:, -1:]}
    chosen = policy.sample(obs, 2, seed=0)
    drawn = base.sample(obs, 64, seed=derive_seed(0, "proposals")).unflatten(1, (2, 32))
    for k in range(2):
        found = policy.critic.q(newest, chosen[:, k : k + 1])[:, 0]
        assert (found > policy.critic.q(newest, drawn[:, k]).max(dim=1).values).all()


def test_a_critic_may_read_what_its_policy_does_not(make):
    base = make.awaken(make.policy())
    depth = {"observation.depth": ArraySpec((3,))}
    make.all_stats = lambda: {**type(make).all_stats(make), "observation.depth": make.stats(3)}
    critic = make.awaken(make.critic(msgspec.structs.replace(base.spec, observation=depth)))
    policy = improved(base, critic, ImprovementConfig(proposals=8, kept=8, steps=0))
    assert policy.spec == msgspec.structs.replace(
        base.spec, observation=base.spec.observation | depth
    )
    obs, seeds = make.obs(2), np.arange(2)
    seen = obs | {"observation.depth": np.float32(np.random.default_rng(0).normal(size=(2, 2, 3)))}
    _, chunk = policy.act(None, seen, seed=seeds)
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in seen.items()}
        pool = base.sample({key: one[key] for key in obs}, 8, seed=derive_seed(row, "proposals"))
        best = critic.q({"observation.depth": one["observation.depth"]}, pool)[0].argmax()
        np.testing.assert_array_equal(chunk[row], pool[0, best].numpy())
    twin = policy_from_state(*policy_state(policy))
    np.testing.assert_array_equal(twin.act(None, seen, seed=seeds)[1], chunk)
    alone = ActingPolicy(policy, InferenceConfig(critic=False))
    assert alone.spec == base.spec
    np.testing.assert_allclose(
        alone.act(None, obs, seed=seeds)[1], base.act(None, obs, seed=seeds)[1], atol=1e-5
    )
    alone.prepare(policy_state(policy)[1])
    alone.swap()
    assert alone.source is not policy and alone.source.spec == policy.spec
    np.testing.assert_allclose(
        alone.act(None, obs, seed=seeds)[1], base.act(None, obs, seed=seeds)[1], atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observation": {"observation.state": ArraySpec((3,), unit="m")}}, "with other specs"),
        ({"n_obs_steps": 3}, "critic reads 3 observations, the policy only 2"),
        ({"action": ArraySpec((2,), low=(-2.0,), high=(2.0,))}, "'policy' and 'critic' differ"),
        ({"horizon": 9}, r"critic\.horizon is 8, and the policy's chunks have 6"),
    ],
)
def test_a_critic_that_does_not_fit_is_refused(make, change, words):
    base = make.policy()
    spec = msgspec.structs.replace(base.spec, **change)
    critic = make.critic(spec, horizon=8 if "horizon" in change else 4)
    with pytest.raises(ConfigError, match=words):
        improved(base, critic, ImprovementConfig())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda options: options["critic"]["spec"].pop("action"), "the critic's spec"),
        (lambda options: options["critic"]["options"].update(width=32), "critic.network"),
        (lambda options: options["critic"]["options"].update(widht=32), "Did you mean"),
        (lambda options: options["policy"]["spec"].update(n_action_steps=2), "improved policy's"),
        (lambda options: options["improvement"].update(kept=9), "kept is 9"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(build, change, words):
    config, arrays = policy_state(build())
    config = json.loads(json.dumps(config))
    change(config["options"])
    with pytest.raises((ConfigError, CorruptDataError), match=words):
        policy_from_state(config, arrays)
