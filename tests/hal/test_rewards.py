"""Rewards without a network: rules on what is sensed, and a person's verdicts."""

import numpy as np
import pytest

from embodied.core.errors import ConfigError
from embodied.core.frames import Frame
from embodied.core.specs import ArraySpec, DeviceSpec
from embodied.run.rollout import Rollout, Start
from hal.group import make_group
from hal.rewards import make_reward, make_rewards
from sim import family
from sim.family import SimConfig
from sim.pointmass import PointMassExpert, PointMassFamily

SPEC = DeviceSpec(
    observation={
        "observation.state": ArraySpec((3,), names=("base", "elbow", "gripper")),
        "observation.force": ArraySpec((1,), unit="N"),
    },
    action=ArraySpec((1,), low=(-1.0,), high=(1.0,)),
    tick_hz=10.0,
    signals=("score",),
)


def frame(*state, force=0.0, score=0.0):
    observed = {
        "observation.state": np.array(state or (0, 0, 0), np.float32),
        "observation.force": np.array([force], np.float32),
    }
    return Frame(0, observed, {}, signals={"score": score})


def rule(success, **options):
    return make_reward({"name": "rule", "success": success, **options}, SPEC, None)


def verdicts(reward, frames):
    reward.begin(frame())
    return [reward(one) for one in frames]


GRIPPED = {"key": "observation.state", "index": "gripper", "low": 0.5}


def test_a_rule_holds_within_its_bounds_ends_included():
    reward = rule([{**GRIPPED, "high": 0.75}])
    values = [0.4375, 0.5, 0.625, 0.75, 0.8125, float("nan")]
    found = verdicts(reward, [frame(9, 9, value) for value in values])
    assert found == [None, True, True, True, None, None]


def test_all_conditions_must_hold_at_once_on_observations_and_signals():
    reward = rule(
        [GRIPPED, {"key": "observation.force", "low": 2.0}, {"key": "score", "high": 0.0}]
    )
    frames = [
        frame(0, 0, 1, force=3, score=1),
        frame(0, 0, 1, force=1),
        frame(0, 0, 0, force=3),
        frame(0, 0, 1, force=3),
    ]
    assert verdicts(reward, frames) == [None, None, None, True]


def test_a_rule_must_hold_for_ticks_in_a_row_of_one_episode():
    reward = rule([GRIPPED], held_ticks=3)
    up, down = frame(0, 0, 1), frame()
    assert verdicts(reward, [up, up, down, up, up, up]) == [None] * 5 + [True]
    assert verdicts(reward, [up, up]) == [None, None]
    assert verdicts(reward, [up, up, up]) == [None, None, True], "the last episode is forgotten"


def test_a_failure_ends_the_episode_and_beats_a_success():
    reward = rule([GRIPPED], failure=[{"key": "observation.force", "low": 10.0}])
    frames = [frame(), frame(0, 0, 1, force=20), frame(force=20)]
    assert verdicts(reward, frames) == [None, False, False]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"key": "observation.stat", "low": 0}, "Did you mean 'observation.state'"),
        ({"key": "observation.state", "low": 0}, "has index None; 0 to 2"),
        ({"key": "observation.state", "index": 3, "low": 0}, "has index 3; 0 to 2"),
        ({"key": "observation.state", "index": -1, "low": 0}, "has index -1; 0 to 2"),
        ({"key": "observation.state", "index": "griper", "low": 0}, "Did you mean 'gripper'"),
        ({"key": "score", "index": 0, "low": 0}, "leave out index"),
        ({"key": "score"}, "neither low nor high"),
        ({"key": "score", "low": 2.0, "high": 1.0}, "at least 2 and at most 1"),
        ({"key": "score", "low": "1"}, "Expected `float`"),
        ({"key": "score", "least": 1}, "unknown key 'reward.success"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(condition, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        rule([condition])


def test_nothing_to_hold_is_refused():
    with pytest.raises(ConfigError, match="length >= 1"):
        rule([])
    with pytest.raises(ConfigError, match=r"Known: classifier, reach, rule, success_key"):
        make_reward({"name": "juge"}, SPEC, None)


def test_a_rule_judges_each_robot_by_its_own_ticks_in_the_tasks_place():
    near = {"key": "reward", "low": -0.05, "high": 0.0}
    data = {"name": "rule", "success": [near], "held_ticks": 4}
    rows, seeds = 3, {0: [1], 1: [2], 2: [3]}
    group = make_group(lambda row: family.make_device("pointmass", SimConfig(), row=row), rows)
    steps = [[] for _ in range(rows)]
    rollout = Rollout(
        group,
        PointMassFamily().make_task("", SimConfig()),
        next_start=lambda row: Start(seeds[row].pop(), takeover_tick=0) if seeds[row] else None,
        experts=[PointMassExpert() for _ in range(rows)],
        on_step=lambda row, step: steps[row].append(step),
        rewards=make_rewards(data, group.spec, rows),
    )
    results = []
    while not results or not rollout.idle:
        results += rollout.tick()
    group.close()
    assert len(results) == rows and all(result.success for result in results)
    assert [result.total_reward for result in results] == [1.0] * rows
    assert len({result.ticks for result in results}) > 1
    for episode in steps:
        seen = np.array([step.observation["observation.state"] for step in episode])
        goal = episode[0].observation["observation.environment_state"]
        close = np.linalg.norm(seen - goal, axis=1) <= 0.05
        assert close[-4:].all() and not close[:-4].any(), "four ticks near, not one as by the task"
        *before, last, final = episode
        assert final.final and last.terminated and last.success and last.reward == 1.0
        assert not any(step.terminated or step.reward for step in before)


def test_without_a_verdict_the_horizon_truncates():
    data = {"name": "rule", "success": [{"key": "reward", "low": 1.0}]}
    group = make_group(lambda row: family.make_device("pointmass", SimConfig(), row=row), 1)
    starts = [Start(1, takeover_tick=0)]
    steps = []
    rollout = Rollout(
        group,
        PointMassFamily().make_task("", SimConfig(horizon=30)),
        next_start=lambda row: starts.pop() if starts else None,
        experts=[PointMassExpert()],
        on_step=lambda row, step: steps.append(step),
        rewards=make_rewards(data, group.spec, 1),
    )
    results = []
    while not results:
        results += rollout.tick()
    group.close()
    assert (results[0].ticks, results[0].success) == (30, False)
    assert (steps[-2].truncated, steps[-2].terminated) == (True, False)


class Person:
    """Signals what is put into `pressed`."""

    def __init__(self):
        self.pressed = []

    def ask(self, text):
        raise AssertionError(text)

    def events(self):
        found, self.pressed = self.pressed, []
        return found


def test_a_person_says_how_an_episode_ends_and_earlier_keys_do_not_count():
    person = Person()
    reward = make_reward({"name": "success_key"}, SPEC, person)
    person.pressed = ["success"]
    reward.begin(frame())
    assert reward(frame()) is None
    person.pressed = ["rerecord", "failure", "success"]
    assert reward(frame()) is False and reward(frame()) is None
    person.pressed = ["success"]
    assert reward(frame()) is True
    with pytest.raises(ConfigError, match="needs a person"):
        make_reward({"name": "success_key"}, SPEC, None)


def test_reaching_is_judged_by_the_place_of_the_tool():
    found, name = family.find("so101/reach")
    spec = found.make_driver(name, SimConfig()).spec
    data = {"name": "reach", "model": "so101.xml", "target": [0.1981, 0.1139, 0.1443]}
    reward = make_reward({**data, "radius_m": 0.02}, spec, None)
    reached = np.array([0.5, -0.7, 0.7, 0.4, 0.0, 0.3], np.float32)
    frames = [Frame(0, {"observation.state": pose}, {}) for pose in (reached, 0 * reached)]
    assert [reward(frame) for frame in frames] == [True, None]
    with pytest.raises(ConfigError, match="there is no file nowhere"):
        make_reward({**data, "model": "nowhere.xml"}, spec, None)
    with pytest.raises(ConfigError, match="position-controlled"):
        make_reward(data, SPEC, None)
