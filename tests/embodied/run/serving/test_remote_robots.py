"""Robots that are moved by a policy server which dies, hangs, and comes back."""

import itertools
import signal
import time

import numpy as np
import pytest
from point import RealPointDriver
from served import Padded, make_policy, publish, published, stored

from embodied.core.clock import RealClock
from embodied.core.errors import ConfigError, LinkError
from embodied.core.tasks import Outcome
from embodied.run.remote import policy as remote_policy
from embodied.run.remote.policy import connect
from embodied.run.rollout import Rollout, Start
from hal.device import Device
from hal.group import DeviceGroup, make_group
from hal.health import DeviceInfo
from sim import family
from sim.family import SimConfig

LOCAL = 77
pytestmark = pytest.mark.alone


class Endless:
    name, instruction = "endless", ""

    def reset(self, device, seed):
        return device.device.latest().tick

    def judge(self, frame, elapsed_ticks):
        return Outcome(0.0, False, False, False)


class Robot:
    """A point whose time does not wait, for one episode without an end."""

    def __init__(self):
        info = DeviceInfo("real:0", "point", "here")
        self.device = Device(RealPointDriver(), info=info, clock=RealClock()).open()
        self.steps = []
        starts = iter([Start(seed=1)])
        self.rollout = Rollout(
            DeviceGroup([self.device]),
            Endless(),
            next_start=lambda row: next(starts, None),
            on_step=lambda row, step: self.steps.append(step),
        )

    def until(self, condition, since=0):
        """Tick until it holds of one of the steps from `since` on; how many there are then."""
        ends_s = time.monotonic() + 20
        while not any(condition(step) for step in self.steps[since:]):
            assert time.monotonic() < ends_s, self.steps[-5:]
            self.rollout.tick()
        return len(self.steps)

    def close(self):
        self.device.close()


@pytest.fixture
def robot():
    made = Robot()
    yield made
    made.close()


@pytest.fixture
def run(tmp_path):
    made = published(tmp_path / "run")
    publish(made, make_policy())
    return made


def moves(version):
    return lambda step: not step.held and step.policy_version == version


def is_held(step):
    return step.held


def check_whole(steps):
    """No tick is missing, nothing leaves the bounds, and what is held does not move."""
    assert [step.index for step in steps] == list(range(len(steps)))
    for step, following in itertools.pairwise(steps):
        assert np.isfinite(step.action).all() and np.abs(step.action).max() <= 1.0
        moved = following.observation["observation.state"] - step.observation["observation.state"]
        expected = 0.0 if step.held else 0.05 * step.action
        np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_a_robot_holds_while_its_server_is_dead_and_goes_on_with_the_next_one(start, run, robot):
    server = start(run.path)
    remote = server.connect()
    robot.rollout.set_policy(remote, remote.version)
    seen = robot.until(moves(1))
    seen = robot.until(moves(1), seen + 16)
    server.kill()
    killed = robot.until(is_held, seen)
    committed = robot.steps[seen:killed]
    assert sum(not step.held for step in committed) <= 16 + 1, "no more than was committed"
    publish(run, make_policy(1))
    server.start()
    robot.until(moves(2), killed)
    check_whole(robot.steps)
    assert {step.policy_version for step in robot.steps if not step.held} == {1, 2}
    remote.close()


def test_the_local_policy_decides_while_the_server_hangs_and_each_step_says_who(start, run, robot):
    server = start(run.path)
    local = Padded(make_policy(5))
    remote = server.connect(local=local, local_version=LOCAL)
    robot.rollout.set_policy(remote, remote.version)
    seen = robot.until(moves(1))
    server.signal(signal.SIGSTOP)
    taken_over = robot.until(moves(LOCAL), seen)
    decisions = remote.local_decisions
    hung = robot.until(lambda step: remote.local_decisions >= decisions + 3, taken_over)
    assert all(moves(LOCAL)(step) or step.held for step in robot.steps[taken_over - 1 : hung])
    server.signal(signal.SIGCONT)
    robot.until(moves(1), hung)
    check_whole(robot.steps)
    remote.close()


def simulated(policy, version, seed, after_tick=lambda decisions, waits: None):
    """(steps, result) of an episode on a simulated robot, whose time waits."""
    steps, starts, results = [], iter([Start(seed)]), []
    group = make_group(lambda row: family.make_device("pointmass", SimConfig(), row=row), 1)
    rollout = Rollout(
        group,
        family.find("pointmass")[0].make_task("", SimConfig(horizon=40)),
        next_start=lambda row: next(starts, None),
        on_step=lambda row, step: steps.append(step),
    )
    rollout.set_policy(policy, version)
    ends_s = time.monotonic() + 60
    while not results:
        assert time.monotonic() < ends_s
        before = len(steps)
        results = rollout.tick()
        after_tick(len(rollout.latencies_s), len(steps) == before)
    group.close()
    return steps, results[0]


def test_a_simulated_robot_waits_for_its_server_and_does_exactly_what_it_would_have(
    start, run, monkeypatch
):
    monkeypatch.setattr(remote_policy, "_ANSWER_S", 0.2)
    server = start(run.path)
    remote = server.connect()
    undisturbed, _ = simulated(Padded(make_policy()), 1, 3)
    happened = []

    def after_tick(decisions, waits):
        if decisions == 2 and not happened:
            server.kill()
            happened.append("killed")
        elif waits and happened == ["killed"]:
            server.start()
            happened.append("waited")

    steps, result = simulated(remote, remote.version, 3, after_tick)
    assert happened == ["killed", "waited"]
    assert result.policy_version == 1 and {s.policy_version for s in steps[:-1]} == {1}
    assert len(steps) == len(undisturbed) and not any(step.held for step in steps)
    for step, expected in zip(steps, undisturbed, strict=True):
        np.testing.assert_array_equal(step.action, expected.action)
    remote.close()


def test_a_server_that_stays_away_is_an_error_in_the_end(start, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_policy, "_ANSWER_S", 0.2)
    server = start(stored(tmp_path / "policy"))
    remote = server.connect(patience_s=0.5)
    server.kill()
    with pytest.raises(LinkError, match=r"no decision from the policy server in \d+ s.*is its"):
        simulated(remote, -1, 3)
    remote.close()


def test_what_cannot_be_asked_is_said_at_the_start(start, tmp_path):
    with pytest.raises(LinkError, match=r"inference\.remote=ipc.*embodied serve checkpoint"):
        connect(f"ipc://{tmp_path}/nobody", patience_s=1.0, connect_s=0.05)
    with pytest.raises(ConfigError, match="address 'nowhere' is unknown"):
        connect("nowhere", patience_s=1.0, connect_s=0.05)
    server = start(stored(tmp_path / "policy"))
    with pytest.raises(ConfigError, match="local policy has n_action_steps=4"):
        server.connect(local=Padded(make_policy(n_action_steps=4)))
    with pytest.raises(ConfigError, match="by 3 observations"):
        server.connect(local=Padded(make_policy(n_obs_steps=3)))
