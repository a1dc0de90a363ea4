import itertools

import msgspec
import numpy as np
import pytest

from embodied.core.errors import ConfigError, EmbodiedError, NoActionError, SpecError
from embodied.core.specs import ArraySpec, PolicySpec
from embodied.run.evaluate import Evaluator, summarise
from embodied.run.goals import ExpertGoals
from embodied.run.rollout import Rollout, Start
from hal.group import make_group
from sim import family
from sim.family import EVALUATION_SEEDS, SimConfig
from sim.pointmass import PointMassDriver, PointMassExpert, PointMassFamily


class Straight:
    """Goes straight to the goal by the newest observation, in chunks; remembers its inputs."""

    def __init__(self, n_obs_steps=2, horizon=6, n_action_steps=4, gain=1.0):
        spec = PointMassDriver.spec
        self.spec = PolicySpec(spec.observation, spec.action, n_obs_steps, horizon, n_action_steps)
        self.gain = gain
        self.seen = []

    def init(self, batch):
        return None

    def act(self, carry, obs, *, prefix=None, seed):
        self.seen.append({key: value.copy() for key, value in obs.items()})
        position, goal = obs["observation.state"], obs["observation.environment_state"]
        offset = (goal - position)[:, -1]
        count = self.spec.horizon
        steps = np.clip(self.gain * offset / (0.05 * count), -1, 1)
        return carry, np.repeat(steps[:, None], count, 1).astype(np.float32)


def make_rollout(rows, starts, *, policy=None, horizon=None):
    waiting = {row: list(reversed(starts[row])) for row in range(rows)}
    group = make_group(lambda row: family.make_device("pointmass", SimConfig(), row=row), rows)
    steps = [[] for _ in range(rows)]
    rollout = Rollout(
        group,
        PointMassFamily().make_task("", SimConfig(horizon=horizon)),
        next_start=lambda row: waiting[row].pop() if waiting[row] else None,
        experts=[PointMassExpert() for _ in range(rows)],
        on_step=lambda row, step: steps[row].append(step),
    )
    if policy is not None:
        rollout.set_policy(policy, 7)
    return rollout, steps


class Told(Straight):
    """Asks for the instruction too, in max_bytes."""

    def __init__(self, max_bytes):
        super().__init__()
        told = {**self.spec.observation, "task": ArraySpec((max_bytes,), "uint8")}
        self.spec = msgspec.structs.replace(self.spec, observation=told)


def test_a_policy_that_asks_is_told_the_instruction():
    policy = Told(20)
    rollout, _ = make_rollout(2, [[Start(1)], [Start(2)]], policy=policy)
    run(rollout)
    text = policy.seen[0]["task"]
    assert text.shape == (2, 2, 20) and text.dtype == np.uint8
    assert {bytes(row).rstrip(b"\0") for row in text.reshape(4, 20)} == {b"move to the goal"}
    with pytest.raises(SpecError, match=r"'move to the goal.*16 bytes.*reads 8"):
        rollout.set_policy(Told(8), 8)


class Aimed(Straight):
    """Goes to the place it is given for a goal."""

    def __init__(self):
        super().__init__()
        state = self.spec.observation["observation.state"]
        aimed = {"observation.state": state, "goal.observation.state": state}
        self.spec = msgspec.structs.replace(self.spec, observation=aimed)

    def act(self, carry, obs, *, prefix=None, seed):
        goal = obs.pop("goal.observation.state")
        assert goal.shape == obs["observation.state"].shape
        return super().act(carry, {**obs, "observation.environment_state": goal}, seed=seed)


def test_goals_are_what_the_expert_ends_with_from_the_same_start_state():
    evaluator = Evaluator("pointmass", SimConfig(), rows=3)
    results = evaluator.run(Aimed(), 1, range(8))
    evaluator.close()
    assert sum(result.success for result in results) >= 6
    rollout, _ = make_rollout(1, [[Start(1)]])
    with pytest.raises(ConfigError, match=r"'goal.observation.state', and nobody gives"):
        rollout.set_policy(Aimed(), 1)
    with pytest.raises(ConfigError, match="'pusht' has no scripted expert"):
        ExpertGoals("pusht", SimConfig())(1)


def test_a_policy_that_reads_what_is_not_there_is_refused():
    rollout, _ = make_rollout(1, [[]])
    for array, key, match in (
        (ArraySpec((8, 8, 3), "uint8"), "observation.images.top", "camera.*top.*sim.cameras"),
        (ArraySpec((3,)), "observation.state", r"state' as float32 \(3,\).*float32 \(2,\)"),
    ):
        policy = Straight()
        seen = {**policy.spec.observation, key: array}
        policy.spec = msgspec.structs.replace(policy.spec, observation=seen)
        with pytest.raises(ConfigError, match=match):
            rollout.set_policy(policy, 1)


def run(rollout, ticks=2000):
    results = []
    for _ in range(ticks):
        results += rollout.tick()
        if rollout.idle:
            results += rollout.tick()
        if rollout.idle:
            return results
    raise AssertionError("the rollout did not end")


class Counting(Straight):
    """Counts its decisions in its carry."""

    def init(self, batch):
        return {"count": np.zeros(batch, np.int64)}

    def act(self, carry, obs, *, prefix=None, seed):
        self.counts += [(int(s), int(n)) for s, n in zip(seed, carry["count"], strict=True)]
        _, chunk = super().act(None, obs, seed=seed)
        return {"count": carry["count"] + 1}, chunk

    counts: list[tuple[int, int]]


def test_what_a_policy_remembers_is_kept_row_by_row_and_begins_anew_with_an_episode():
    seeds = [[1, 2], [3], [4, 5, 6]]

    def decisions(rows):
        policy = Counting(gain=0.5)
        policy.counts = []
        rollout, _ = make_rollout(
            len(rows), [[Start(s) for s in row] for row in rows], policy=policy, horizon=30
        )
        results = run(rollout)
        assert len(results) == sum(len(row) for row in rows)
        return policy.counts

    together = decisions(seeds)
    alone = [found for row in seeds for seed in row for found in decisions([[seed]])]
    assert sorted(together) == sorted(alone)
    assert sum(count == 0 for _, count in together) == 6
    assert max(count for _, count in together) >= 3


def test_what_a_policy_remembers_does_not_outlast_its_weights():
    policies = [Counting(gain=0.0), Counting(gain=0.0)]
    for policy in policies:
        policy.counts = []
    rollout, _ = make_rollout(1, [[Start(1)]], policy=policies[0], horizon=30)
    for _ in range(9):
        rollout.tick()
    rollout.set_policy(policies[0], 8)
    for _ in range(4):
        rollout.tick()
    rollout.set_policy(policies[1], 9)
    run(rollout)
    assert [count for _, count in policies[0].counts] == [0, 1, 2, 3]
    assert [count for _, count in policies[1].counts] == [0, 1, 2, 3]


def test_an_episode_has_one_record_a_step_and_the_last_observation_once():
    rollout, steps = make_rollout(1, [[Start(1, takeover_tick=0), Start(2, takeover_tick=0)]])
    results = run(rollout)
    assert [result.seed for result in results] == [1, 2]
    assert all(r.success and r.demonstration and r.interventions == r.ticks for r in results)
    rows = steps[0]
    for result in results:
        episode, rows = rows[: result.ticks + 1], rows[result.ticks + 1 :]
        assert [step.index for step in episode] == list(range(result.ticks + 1))
        assert [step.final for step in episode] == [False] * result.ticks + [True]
        assert [step.terminated for step in episode] == [False] * (result.ticks - 1) + [True, False]
        assert all(step.intervention for step in episode[:-1])
        for before, after in itertools.pairwise(episode):
            moved = after.observation["observation.state"] - before.observation["observation.state"]
            np.testing.assert_allclose(moved, 0.05 * before.action, atol=1e-6)
            distance = np.linalg.norm(
                after.observation["observation.environment_state"]
                - after.observation["observation.state"]
            )
            assert before.reward == pytest.approx(-distance, abs=1e-5), "reward of this action"
    assert not rows


def test_time_running_out_is_truncation_not_termination():
    rollout, steps = make_rollout(1, [[Start(1)]], policy=Straight(gain=0.0), horizon=9)
    (result,) = run(rollout)
    assert result.ticks == 9 and not result.success
    last = steps[0][-2]
    assert last.truncated and not last.terminated and steps[0][-1].final


def test_the_expert_takes_over_in_the_middle_and_only_its_steps_are_marked():
    rollout, steps = make_rollout(1, [[Start(5, takeover_tick=6)]], policy=Straight(gain=-1.0))
    (result,) = run(rollout)
    assert result.success and not result.demonstration
    marks = [step.intervention for step in steps[0][:-1]]
    assert marks == [False] * 6 + [True] * (result.ticks - 6)
    assert result.interventions == result.ticks - 6
    versions = [step.policy_version for step in steps[0][:-1]]
    assert versions == [7] * 6 + [-1] * (result.ticks - 6)
    expert = PointMassExpert()
    for step in steps[0][6:-1]:
        np.testing.assert_allclose(step.action, expert.act(step.observation), atol=1e-6)


def test_the_policy_sees_its_history_padded_at_the_start():
    policy = Straight(n_obs_steps=3)
    rollout, steps = make_rollout(1, [[Start(9)]], policy=policy)
    run(rollout)
    states = [step.observation["observation.state"] for step in steps[0]]
    first, second = policy.seen[0]["observation.state"], policy.seen[1]["observation.state"]
    np.testing.assert_array_equal(first[0], [states[0]] * 3)
    np.testing.assert_array_equal(second[0], states[2:5])


def test_a_long_history_is_never_cut():
    policy = Straight(n_obs_steps=48, gain=0.0)
    rollout, steps = make_rollout(1, [[Start(9)]], policy=policy, horizon=150)
    run(rollout)
    goal = steps[0][0].observation["observation.environment_state"]
    assert all((s["observation.environment_state"] == goal).all() for s in policy.seen)
    rollout, steps = make_rollout(1, [[Start(9)]], policy=(slow := Straight(48, gain=0.02)))
    run(rollout)
    states = np.stack([step.observation["observation.state"] for step in steps[0]])
    for decision, seen in enumerate(slow.seen):
        tick = 4 * decision
        index = np.clip(np.arange(tick - 47, tick + 1), 0, None)
        np.testing.assert_array_equal(seen["observation.state"][0], states[index])


def test_weights_that_arrive_within_a_chunk_count_from_the_next_one():
    rollout, steps = make_rollout(1, [[Start(2)]], policy=Straight())
    rollout.tick()
    rollout.tick()
    rollout.set_policy(Straight(), 8)
    run(rollout)
    assert [step.policy_version for step in steps[0][:6]] == [7] * 4 + [8] * 2


def test_rows_that_are_due_decide_in_one_batch():
    policy = Straight()
    rollout, _ = make_rollout(3, [[Start(1)], [Start(2)], []], policy=policy)
    run(rollout)
    assert len(policy.seen[0]["observation.state"]) == 2


class Absent(Straight):
    """Gives no decision in every second call."""

    calls = 0

    def act(self, carry, obs, *, prefix=None, seed):
        self.calls += 1
        if self.calls % 2:
            raise NoActionError("nobody answers")
        return super().act(carry, obs, prefix=prefix, seed=seed)


def test_a_row_without_a_decision_waits_and_the_others_go_on():
    starts = [[Start(2)], [Start(3, takeover_tick=0)]]
    rollout, steps = make_rollout(2, starts, policy=Absent())
    rollout.tick()
    assert [len(row) for row in steps] == [0, 1]
    run(rollout)
    undisturbed, expected = make_rollout(2, starts, policy=Straight())
    run(undisturbed)
    for row, wanted in zip(steps, expected, strict=True):
        assert len(row) == len(wanted)
        for step, other in zip(row, wanted, strict=True):
            np.testing.assert_array_equal(step.action, other.action)
            assert (step.held, step.policy_version) == (other.held, other.policy_version)


def test_noise_changes_the_expert_and_is_seeded():
    def actions(noise):
        rollout, steps = make_rollout(1, [[Start(3, takeover_tick=0, noise=noise)]])
        run(rollout)
        return np.stack([step.action for step in steps[0][:-1]])

    clean, noisy = actions(0.0), actions(0.4)
    assert not np.array_equal(clean[:5], noisy[:5])
    np.testing.assert_array_equal(noisy, actions(0.4))
    assert np.abs(noisy).max() <= 1


def test_an_episode_without_policy_or_expert_is_refused():
    rollout, _ = make_rollout(1, [[Start(1)]])
    with pytest.raises(EmbodiedError, match="needs a policy"):
        rollout.tick()


def test_evaluation_does_not_depend_on_the_number_of_rows():
    outcomes = []
    for rows in (1, 2, 5):
        evaluator = Evaluator("pointmass", SimConfig(), rows=rows)
        for _ in range(2):
            results = evaluator.run(Straight(), 3, range(10, 17))
            assert [r.seed for r in results] == list(range(10, 17))
            outcomes.append([(r.ticks, r.total_reward) for r in results])
        evaluator.close()
    assert all(outcome == outcomes[0] for outcome in outcomes)
    summary = summarise(results)
    assert summary["episodes"] == 7 and summary["successes"] == 7
    assert summary["success_interval"][0] < 1.0


def test_training_and_evaluation_seeds_never_meet():
    seeds = [family.training_seed(root, "a", i) for root in range(5) for i in range(200)]
    assert min(seeds) >= EVALUATION_SEEDS and len(set(seeds)) == 1000
    evaluator = Evaluator("pointmass", SimConfig(), rows=1)
    with pytest.raises(ValueError, match="evaluation seeds"):
        evaluator.run(Straight(), 0, [EVALUATION_SEEDS])
    evaluator.close()
