"""Real-time chunking's schedule, by itself and on a device whose policy takes its time."""

import time

import numpy as np
from follower import FOLLOWER_SPEC, Follower
from hypothesis import given
from hypothesis import strategies as st

from embodied.core.clock import RealClock
from embodied.core.specs import PolicySpec
from embodied.core.tasks import Outcome
from embodied.run.rollout import Rollout, Start
from hal.device import Device
from hal.group import DeviceGroup
from hal.health import DeviceInfo
from hal.safety.config import SafetyConfig
from hal.schedule import ChunkSchedule


def chunk(tick, horizon):
    """Actions that name the tick they are for."""
    return np.arange(tick, tick + horizon, dtype=np.float32)[:, None]


@given(
    st.lists(st.floats(0.0, 0.2), min_size=1, max_size=30), st.integers(4, 16), st.integers(1, 8)
)
def test_every_action_stays_with_its_tick_and_the_prefix_is_what_will_play(delays_s, horizon, s):
    schedule = ChunkSchedule(50.0, realtime=True)
    tick, playing = 100, {}
    schedule.begin(tick)
    for elapsed_s in delays_s:
        tick = max(tick, schedule.next_tick)
        assert schedule.due(tick) and not schedule.due(tick - 1)
        prefix = schedule.prefix(tick)
        if prefix is not None:
            assert len(prefix) == schedule.delay
            for k, action in enumerate(prefix):
                assert playing[tick + k] == action[0] == tick + k
        expected = schedule.delay
        start, rest = schedule.decided(tick, chunk(tick, horizon), s, elapsed_s)
        needed = max(1, int(np.ceil(elapsed_s * 50.0)))
        assert start == tick + min(max(expected, needed), horizon - 1)
        assert rest[0, 0] == start and len(rest) == tick + horizon - start
        playing.update({start + k: row[0] for k, row in enumerate(rest)})
        assert schedule.next_tick == max(tick + s, start)


def test_virtual_time_waits_so_a_chunk_begins_at_once():
    schedule = ChunkSchedule(50.0, realtime=False)
    schedule.begin(7)
    start, rest = schedule.decided(7, chunk(7, 8), 4, 3.0)
    assert start == 7 and len(rest) == 8 and schedule.next_tick == 11
    assert schedule.delay == 0 and schedule.prefix(11) is None and schedule.starved == 0


def test_a_delay_beyond_what_the_chunk_covers_is_counted():
    schedule = ChunkSchedule(50.0, realtime=True)
    schedule.begin(0)
    schedule.decided(0, chunk(0, 8), 6, 0.05)
    assert schedule.starved == 1 and schedule.delay == 2, "no more than 8 - 6"


class SlowPolicy:
    """Goes up slowly; remembers the prefixes it was given. 30 ms a decision."""

    spec = PolicySpec(
        observation=FOLLOWER_SPEC.observation,
        action=FOLLOWER_SPEC.action,
        n_obs_steps=1,
        horizon=16,
        n_action_steps=8,
    )

    def __init__(self):
        self.prefixes = []

    def init(self, batch):
        return None

    def act(self, carry, obs, *, prefix=None, seed):
        self.prefixes.append(prefix)
        time.sleep(0.03)
        at = obs["observation.state"][:, -1:]
        return None, np.repeat(at, 16, axis=1) + 0.01 * np.arange(1, 17)[None, :, None]


class Task:
    name, instruction, horizon = "climb", "", 60

    def reset(self, device, seed):
        return device.device.latest().tick

    def judge(self, frame, elapsed_ticks):
        return Outcome(0.0, False, elapsed_ticks >= self.horizon, False)


class RealFollower(Follower):
    """Its time cannot be stepped."""

    step_time = signals = reset = None

    def open(self):
        self.position = self.start.copy()

    def drive(self, action_D):
        self.setpoints.append(action_D.copy())
        self.position = action_D


def listen(schedule):
    """(tick, prefix) of each decision, and what the device accepted, by absolute tick."""
    told, playing = [], {}
    prefix, accepted = schedule.prefix, schedule.accepted

    def telling(tick):
        found = prefix(tick)
        if found is not None:
            told.append((tick, found.copy()))
        return found

    def accepting(first_tick, actions_HD):
        playing.update({first_tick + k: action for k, action in enumerate(actions_HD)})
        accepted(first_tick, actions_HD)

    schedule.prefix, schedule.accepted = telling, accepting
    return told, playing


def test_inference_runs_while_the_committed_actions_play():
    class Real:
        """Only what a real driver has."""

        def __init__(self):
            self.inner = RealFollower(start=(-1.0, -0.8, 0.2))
            self.spec = FOLLOWER_SPEC
            for name in ("open", "sense", "drive", "hold", "close"):
                setattr(self, name, getattr(self.inner, name))

    device = Device(
        Real(),
        info=DeviceInfo("real", "follower", "here"),
        clock=RealClock(),
        safety=SafetyConfig(start_tolerance=None, overruns=0, heartbeat_s=5.0),
    )
    steps, policy, starts = [], SlowPolicy(), iter([Start(seed=1)])
    with device:
        rollout = Rollout(
            DeviceGroup([device]),
            Task(),
            next_start=lambda row: next(starts, None),
            on_step=lambda row, step: steps.append(step),
        )
        rollout.set_policy(policy, 3)
        told, playing = listen(rollout._schedules[0])
        results = []
        while not results:
            results = rollout.tick()
    moving = [step for step in steps if not step.final][4:]
    assert [step.index for step in steps] == list(range(61))
    assert not any(step.held for step in moving), "no gap between two chunks"
    assert all(step.policy_version == 3 for step in moving)
    given_prefixes = [prefix for prefix in policy.prefixes if prefix is not None]
    assert len(given_prefixes) >= 4 and all(p.shape[1] >= 2 for p in given_prefixes[1:])
    assert told and len(told) == len(given_prefixes)
    for (tick, prefix), got in zip(told, given_prefixes, strict=True):
        np.testing.assert_array_equal(got[0], prefix)
        np.testing.assert_array_equal(prefix, [playing[tick + k] for k in range(len(prefix))])
    assert device.info.counts.get("underruns", 0) == 0
