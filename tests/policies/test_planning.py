"""Acting on what a world model predicts, on a linear system whose every outcome is known."""

import json

import msgspec
import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.protocols import Composite, WorldModel
from embodied.core.specs import ArraySpec, PolicySpec
from policies.acting import InferenceConfig
from policies.checkpoint import load_policy, policy_from_state, policy_state, save_policy
from policies.inference.policy import ActingPolicy
from policies.world.history import succession
from policies.world.planning import Planner, planned

STATE, GOAL = "observation.state", "goal.observation.state"
A = torch.tensor([[0.9, 0.2], [-0.1, 0.8]])
B = torch.tensor([[0.5, 0.0], [0.1, 0.4]])


class Linear:
    """x′ = A x + B u at every tick of the chunk, without noise; proposes uniformly."""

    def __init__(self, horizon=4, steps=1, n_obs_steps=2, first=None, keys=(STATE,)):
        action = ArraySpec((2,), low=(-1.0,), high=(1.0,))
        observation = {STATE: ArraySpec((2,)), "observation.load": ArraySpec((1,))}
        seen = {key: observation[key] for key in dict.fromkeys((STATE, *keys))}
        self.spec = PolicySpec(seen, action, n_obs_steps, horizon, horizon)
        self.predicted_keys = (STATE,)
        first = horizon if first is None else first
        self.predicted_ticks = tuple(range(first, first + steps))

    def trajectory(self, x_B2, chunk_BH2):
        """States after 1..H actions [B, H, 2]."""
        states = []
        for k in range(chunk_BH2.shape[1]):
            x_B2 = x_B2 @ A.T + chunk_BH2[:, k] @ B.T
            states.append(x_B2)
        return torch.stack(states, dim=1)

    def infer(self, obs, *, actions=None, next_obs=None, want, seed):
        assert want == {"next_obs"} and next_obs is None and len(seed) == len(actions)
        states_BH2 = self.trajectory(torch.as_tensor(obs[STATE])[:, -1], actions)
        at = [tick - 1 for tick in self.predicted_ticks]
        return {"next_obs": {STATE: states_BH2[:, at]}}

    def init(self, batch):
        return None

    def act(self, carry, obs, *, prefix=None, seed):
        rows = [np.random.default_rng(int(s)).uniform(-1, 1, (self.spec.horizon, 2)) for s in seed]
        return None, np.float32(rows)

    def sample(self, obs, n, *, seed):
        rng = torch.Generator().manual_seed(seed % 2**63)
        shape = (len(obs[STATE]), n, self.spec.horizon, 2)
        return 2 * torch.rand(shape, generator=rng) - 1

    def loss(self, batch):
        raise NotImplementedError


def observed(rows, n_obs_steps=2, seed=0):
    rng = np.random.default_rng(seed)
    return {STATE: rng.uniform(-1, 1, (rows, n_obs_steps, 2)).astype(np.float32)}


def to(target, **weights):
    return {"name": "goal", "targets": {STATE: target}, "weights": weights}


def test_scores_are_minus_the_distances_of_the_outcomes():
    system, obs = Linear(), observed(3)
    planner = Planner(system, system, to([0.4, -0.3]), 8)
    pool = planner.draw(obs, 8, seed=1)
    scores = planner.scores(obs, pool, [0, 1, 2])
    power = torch.linalg.matrix_power
    for row in range(3):
        for k in range(8):
            end = power(A, 4) @ torch.from_numpy(obs[STATE][row, -1])
            end = end + sum(power(A, 3 - j) @ B @ pool[row, k, j] for j in range(4))
            expected = -torch.linalg.norm(end - torch.tensor([0.4, -0.3]))
            assert scores[row, k].item() == pytest.approx(expected.item(), abs=1e-5)
    best = planner.best(obs, pool, [0, 1, 2])
    for row, k in enumerate(scores.argmax(dim=1)):
        assert torch.equal(best[row], pool[row, k])


def test_planning_reaches_a_goal_that_its_policy_does_not():
    system = Linear()
    planner = Planner(system, system, to(GOAL), 256)
    assert planner.spec.observation[GOAL] == system.spec.observation[STATE]
    rng = np.random.default_rng(3)
    goal_B12 = np.float32(rng.uniform(-0.5, 0.5, (16, 1, 2)))
    history = observed(16)

    def after(proposals):
        x_B2 = torch.from_numpy(history[STATE][:, -1])
        for decision in range(3):
            obs = {STATE: np.stack([x_B2, x_B2], axis=1), GOAL: goal_B12.repeat(2, axis=1)}
            pool = planner.draw(obs, proposals, seed=decision)
            x_B2 = system.trajectory(x_B2, planner.best(obs, pool, list(range(16))))[:, -1]
        return torch.linalg.norm(x_B2 - torch.from_numpy(goal_B12[:, 0]), dim=1).mean().item()

    assert after(256) < 0.1 < 0.4 < after(1)


def test_a_history_is_made_of_what_was_seen_and_predicted():
    def follow(**sizes):
        system = Linear(**sizes)
        step, obs = succession(system), observed(2, sizes.get("n_obs_steps", 2))
        chunk = torch.rand((2, system.spec.horizon, 2), generator=torch.Generator().manual_seed(0))
        states = system.trajectory(torch.from_numpy(obs[STATE][:, -1]), chunk)
        predicted = system.infer(obs, actions=chunk, want={"next_obs"}, seed=np.arange(2))
        later = step.history(obs, predicted["next_obs"])
        return step, torch.cat([torch.from_numpy(obs[STATE]), states], dim=1), later[STATE]

    step, path, later = follow(steps=3, first=2)
    assert (step.ticks, step.exact) == (3, True)
    assert torch.equal(later, path[:, 2 + 2 - 1 : 2 + 3])
    step, path, later = follow(first=1, n_obs_steps=3)
    assert (step.ticks, step.exact) == (1, True)
    assert torch.equal(later, path[:, 1:4])
    step, path, later = follow()
    assert (step.ticks, step.exact) == (4, False)
    assert torch.equal(later, path[:, [5, 5]])
    with pytest.raises(ConfigError, match=r"reads observation\.load and does not predict it"):
        succession(Linear(keys=("observation.load",)))


def test_a_critic_values_what_the_policy_goes_on_with(make):
    base = make.awaken(make.policy("uwm", next_after="executed", next_obs_steps=2))
    critic = make.awaken(make.critic(base.spec))
    policy = planned(base, {"name": "critic", "draws": 2}, proposals=5, critic=critic)
    obs, seeds = make.obs(3), np.arange(3)
    own = policy.planner
    pool = own.draw(obs, 5, seed=0)
    scores = own.scores(obs, pool, [0, 1, 2])
    assert scores.shape == (3, 5) and scores.std(dim=1).min() > 0
    assert torch.equal(own.scores(obs, pool, [0, 1, 2]), scores)
    twin = policy_from_state(*policy_state(policy))
    chunk = policy.act(None, obs, seed=seeds)[1]
    np.testing.assert_array_equal(twin.act(None, obs, seed=seeds)[1], chunk)
    small = make.critic(msgspec.structs.replace(base.spec, n_obs_steps=3))
    with pytest.raises(ConfigError, match="critic reads 3 observations and the world model 2"):
        planned(base, {"name": "critic"}, critic=small)


def test_rows_depend_on_their_own_seeds_and_survive_a_checkpoint(make, tmp_path):
    base = make.awaken(make.policy("uwm"))
    scorer = {"name": "goal", "targets": {"observation.goal": "goal.observation.goal"}}
    policy = planned(base, scorer, proposals=6)
    assert isinstance(policy, Composite) and policy.parts() == {"policy": base}
    goal = {"goal.observation.goal": make.obs(4, seed=9)["observation.goal"]}
    obs, seeds = make.obs(4) | goal, np.arange(4)
    chunk = policy.act(None, obs, seed=seeds)[1]
    other = policy.act(None, obs, seed=np.array([8, 1, 9, 3]))[1]
    np.testing.assert_allclose(other[1::2], chunk[1::2], atol=1e-6)
    assert (other[::2] != chunk[::2]).any(axis=(1, 2)).all()
    save_policy(tmp_path / "planned", policy)
    np.testing.assert_array_equal(
        load_policy(tmp_path / "planned").act(None, obs, seed=seeds)[1], chunk
    )
    acting = ActingPolicy(policy, InferenceConfig())
    np.testing.assert_allclose(acting.act(acting.init(4), obs, seed=seeds)[1], chunk, atol=1e-4)
    prefix = np.full((4, 2, 2), 0.25, np.float32)
    ahead = policy.act(None, obs, prefix=prefix, seed=seeds)[1]
    np.testing.assert_array_equal(ahead[:, :2], prefix)
    with pytest.raises(SpecError, match="prefix has shape"):
        policy.act(None, obs, prefix=prefix[:2], seed=seeds)


def test_what_does_not_fit_is_refused(make):
    system, flow = Linear(), make.policy("flow")
    assert isinstance(system, WorldModel) and not isinstance(flow, WorldModel)
    with pytest.raises(ConfigError, match="FlowPolicy is no world model"):
        planned(flow, to([0.0, 0.0, 0.0]))
    with pytest.raises(ConfigError, match=r"unknown predicted key in targets 'observation\.load'"):
        Planner(system, system, {"name": "goal", "targets": {"observation.load": [0.0]}}, 4)
    with pytest.raises(ConfigError, match="2 elements, its target is"):
        Planner(system, system, to([0.0]), 4)
    with pytest.raises(ConfigError, match=r"unknown observation key in targets 'goal\.state'"):
        Planner(system, system, to("goal.state"), 4)
    with pytest.raises(ConfigError, match="needs targets"):
        Planner(system, system, {"name": "goal", "targets": {}}, 4)
    with pytest.raises(ConfigError, match="reads chunks of 6 steps, and the policy's have 4"):
        Planner(system, Linear(horizon=6), to([0.0, 0.0]), 4)
    config, arrays = policy_state(make.policy("planned"))
    config = json.loads(json.dumps(config))
    config["spec"]["n_action_steps"] = 2
    with pytest.raises(CorruptDataError, match="spec is not the one of its parts"):
        policy_from_state(config, arrays)
