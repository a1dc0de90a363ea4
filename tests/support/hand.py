"""Who commands a simulated arm in the safety tests, over which link, and what must hold then."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from follower import FOLLOWER_SPEC, Follower
from sizes import size

from embodied.core.frames import Chunk
from hal.device import Device
from hal.health import DeviceInfo
from hal.safety.config import SafetyConfig

SEEDS = size(1000, 200)
INFO = DeviceInfo("arm:0", "arm", "here")
MOTION = FOLLOWER_SPEC.motion
TICK_S = 1 / FOLLOWER_SPEC.tick_hz
STEP_S = 1 / MOTION.servo_hz
SAFETY = SafetyConfig()


def many_seeds(few):
    """Parametrises `seeds`: a few of them in the fast suite, SEEDS in the slow one."""
    slow = [pytest.param(range(SEEDS), marks=pytest.mark.slow)] if few < SEEDS else []
    return pytest.mark.parametrize("seeds", [range(few), *slow], ids=len)


def opened(driver=None, safety=SAFETY, **kwargs):
    return Device(driver or Follower(), info=INFO, safety=safety, **kwargs).open()


def poisoned(actions, rng):
    """With one value that is no number."""
    actions = np.array(actions, np.float32)
    actions[tuple(rng.integers(actions.shape))] = rng.choice([np.nan, np.inf, -np.inf])
    return actions


class Link:
    """Carries chunks to a device late, in another order, twice, spoilt or never.

    lost, twice, spoilt: how likely. tickets: of what has arrived, with the chunk, by time.
    """

    def __init__(self, device, rng, *, lost=0.1, twice=0.1, spoilt=0.1, longest_ticks=6):
        self.device, self.rng = device, rng
        self.lost, self.twice, self.spoilt, self.longest = lost, twice, spoilt, longest_ticks
        self.underway = []
        self.tickets = []

    def submit(self, chunk):
        if self.rng.random() < self.spoilt:
            chunk = replace(chunk, actions_HD=poisoned(chunk.actions_HD, self.rng))
        copies = int(self.rng.random() >= self.lost) + int(self.rng.random() < self.twice)
        for _ in range(copies):
            due = self.device.tick + int(self.rng.integers(0, self.longest + 1))
            self.underway.append((due, self.rng.random(), chunk))

    def advance(self, until_tick):
        while self.device.tick < until_tick:
            tick = self.device.tick
            due = sorted((item for item in self.underway if item[0] <= tick), key=lambda i: i[1])
            self.underway = [item for item in self.underway if item[0] > tick]
            self.tickets += [(chunk, self.device.submit(chunk)) for _, _, chunk in due]
            self.device.advance(tick + 1)


class Hand:
    """Sends random, partly absurd chunks under one lease; the first one passes the start check.

    link: what carries all but the first; None for a direct one.
    """

    def __init__(self, device, rng, horizon=8, link=None, token=0):
        self.device, self.rng, self.horizon = device, rng, horizon
        self.token = token or device.lease("hand")
        self.seq = 0
        low, high = device.spec.action.bounds()
        self.low, self.high = low, high
        self.submit, self.advance = device.submit, device.advance
        here = device.latest().observation["observation.state"]
        self.send(np.repeat(here[None], 2, axis=0))
        if link is not None:
            self.submit, self.advance = link.submit, link.advance

    def chunk(self, actions, **changes):
        self.seq += 1
        tick = self.device.tick
        actions = np.asarray(actions, np.float32)
        chunk = Chunk(
            start_tick=tick,
            actions_HD=actions,
            obs_tick=tick,
            valid_until_tick=tick + len(actions) - 1,
            seq=self.seq,
            lease_token=self.token,
        )
        return replace(chunk, **changes)

    def send(self, actions, **changes):
        return self.submit(self.chunk(actions, **changes))

    def absurd(self, horizon):
        """A jump or a ramp with noise, beyond the bounds now and then [horizon, D]."""
        spread = 1.5 * (self.high - self.low)
        goal = self.low + spread * self.rng.random((1, len(self.low))) - 0.25 * spread
        noise = 0.05 * self.rng.standard_normal((horizon, len(self.low)))
        ramp = self.rng.random() < 0.5
        share = np.linspace(0, 1, horizon)[:, None] if ramp else 1.0
        here = self.device.latest().observation["observation.state"]
        return here + share * (goal - here) + noise

    def wander(self, ticks):
        end = self.device.tick + ticks
        while self.device.tick < end:
            self.send(self.absurd(self.horizon))
            self.advance(min(end, self.device.tick + int(self.rng.integers(1, 7))))


def check_trajectory(setpoints, motion=MOTION, spec=FOLLOWER_SPEC):
    """Position, velocity, acceleration and jerk of everything that reached the motors."""
    p = np.array(setpoints)
    low, high = spec.action.bounds()
    assert np.isfinite(p).all()
    assert (p >= low - 1e-5).all() and (p <= high + 1e-5).all()
    for order, limit in enumerate((motion.velocity, motion.acceleration, motion.jerk), start=1):
        differences = np.abs(np.diff(p, order, axis=0)) / STEP_S**order
        assert (differences <= np.array(limit) * (1 + 1e-3) + 1e-6).all(), f"order {order}"


def standstill_s(setpoints, since):
    """Time from set point number `since` to the last one that moved."""
    moving = np.flatnonzero((np.abs(np.diff(np.array(setpoints[since:]), axis=0)) > 1e-12).any(1))
    return 0.0 if not len(moving) else (moving[-1] + 1) * STEP_S


def stopping_s():
    v, a, j = (np.array(x) for x in (MOTION.velocity, MOTION.acceleration, MOTION.jerk))
    return float((v / a + 2 * a / j).max())


def report(capsys, what, times_s, bound_s, after="stands still"):
    """Print the distribution beside its bound, which holds to a tick."""
    p50, p99 = np.percentile(times_s, [50, 99])
    with capsys.disabled():
        sys.stdout.write(
            f"\n{what}: {after} after p50 {p50:.3f}, p99 {p99:.3f}, max {max(times_s):.3f} s; "
            f"bound {bound_s:.3f} s, {len(times_s)} seeds "
        )
    assert max(times_s) <= bound_s + TICK_S
