"""A host that misses its deadlines or stands still, on a fake clock of the real kind."""

import threading

import numpy as np
from follower import Follower
from hand import (
    INFO,
    SAFETY,
    STEP_S,
    TICK_S,
    Hand,
    check_trajectory,
    many_seeds,
    report,
    standstill_s,
    stopping_s,
)

from embodied.core.clock import RealClock
from hal.device import Device
from hal.health import Health

SILENT_S = SAFETY.heartbeat_s + SAFETY.committed_ticks * TICK_S + stopping_s()


class FakeClock(RealClock):
    """Passes when it is waited for, and when something keeps its host busy."""

    now = 0

    def now_ns(self):
        return self.now

    def sleep_until(self, t_ns):
        self.now = max(self.now, t_ns)


class Hog(Follower):
    """An arm whose host is late by late_s(tick) at a tick's begin.

    on_tick(device, tick): called before that in the device's own thread, so that all runs of a
    seed are the same. driven_s: when each set point came.
    """

    def __init__(self, late_s, on_tick=lambda device, tick: None):
        super().__init__()
        self.clock, self.late_s, self.on_tick = FakeClock(), late_s, on_tick
        self.driven_s = []
        self.ticks, self.last_tick = -1, 0
        self.done, self.go = threading.Event(), threading.Event()
        self.device = Device(self, info=INFO, safety=SAFETY, clock=self.clock)

    def sense(self):
        self.ticks += 1
        if self.ticks > self.last_tick:
            self.done.set()
            self.go.wait(60)
        elif self.ticks:
            self.on_tick(self.device, self.ticks)
            self.clock.now += round(1e9 * self.late_s(self.ticks))
        return super().sense()

    def drive(self, action_D):
        super().drive(action_D)
        self.driven_s.append(self.clock.now / 1e9)

    def run(self, ticks):
        """Its device, with its thread waiting after so many ticks."""
        self.last_tick = ticks
        self.device.open()
        assert self.done.wait(60)
        return self.device

    def end(self):
        self.go.set()
        self.device.close()


def moved_by(rng, until_tick=10**9):
    """A hand that acts every third tick; what it sends last is long."""
    hands = []

    def on_tick(device, tick):
        if not hands:
            hands.append(Hand(device, rng, horizon=60))
        elif tick < until_tick and tick % 3 == 0 and not device.pulse(hands[0].token):
            hands[0].send(hands[0].absurd(60))

    return on_tick


def test_missed_deadlines_in_a_row_latch_the_halt():
    cases = (
        (range(10, 12), 0.05, False),
        (range(10, 13), 0.05, True),
        (range(10, 60), 0.016, True),
        (range(10, 60, 3), 0.05, False),
        (range(10, 60), 0.008, False),
    )
    for slow, slow_s, halted in cases:
        hog = Hog(lambda tick, slow=slow, slow_s=slow_s: slow_s * (tick in slow))
        device = hog.run(40)
        assert (device.info.health is Health.HALTED) == halted, device.info
        hog.end()


@many_seeds(30)
def test_missed_deadlines_in_a_row_stop_the_arm(seeds, capsys):
    times_s, halts = [], 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        first, count = int(rng.integers(5, 40)), int(rng.integers(1, 7))
        late_s = rng.uniform(0.02, 0.4, count)
        hog = Hog(
            lambda tick, first=first, late_s=late_s: (
                late_s[tick - first] if 0 <= tick - first < len(late_s) else 0.0
            ),
            moved_by(rng),
        )
        device = hog.run(80)
        halted = count >= SAFETY.overruns
        assert (device.info.health is Health.HALTED) == halted, device.info
        if halted:
            halts += 1
            assert "deadlines missed" in device.info.reason
            third = 2 * (first + SAFETY.overruns)
            times_s.append(standstill_s(hog.setpoints, third))
        check_trajectory(hog.setpoints)
        assert (np.diff(hog.driven_s) > 0.5 * STEP_S).all(), "lost time is not made up in haste"
        hog.end()
    assert 0 < halts < len(seeds)
    report(capsys, "third missed deadline", times_s, stopping_s() + 2 * STEP_S)


@many_seeds(30)
def test_a_host_that_stood_still_ends_the_lease(seeds, capsys):
    times_s = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        at = int(rng.integers(5, 40))
        pause_s = float(np.exp(rng.uniform(np.log(SAFETY.heartbeat_s + 0.02), np.log(1e5))))
        hog = Hog(lambda tick, at=at, pause_s=pause_s: pause_s * (tick == at), moved_by(rng))
        device = hog.run(80)
        assert device.info.health is not Health.HALTED, "once is no fault"
        assert "stood still" in device.pulse(device.token)
        times_s.append(standstill_s(hog.setpoints, 2 * at))
        assert all(frame.held for frame in device.frames(at + SAFETY.committed_ticks)[:-1])
        check_trajectory(hog.setpoints)
        assert (np.diff(hog.driven_s) > 0.5 * STEP_S).all(), "lost time is not made up in haste"
        hog.end()
    committed_s = SAFETY.committed_ticks * TICK_S
    report(capsys, "host stood still", times_s, committed_s + stopping_s() + STEP_S)


@many_seeds(30)
def test_a_silent_holder_stops_the_arm_of_a_late_host(seeds, capsys):
    """Not counted is by how much the host was late after the holder's last sign of life."""
    times_s = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        silent_tick = int(rng.integers(6, 30))
        late_s = np.where(rng.random(120) < 0.1, rng.uniform(0, 0.2, 120), rng.uniform(0, 0.005))
        hog = Hog(lambda tick, late_s=late_s: late_s[tick], moved_by(rng, silent_tick))
        device = hog.run(110)
        assert device.pulse(device.token), "the lease is over"
        last = len(hog.setpoints) - 1
        since = 2 * (silent_tick - 1)
        moved = since + round(standstill_s(hog.setpoints, since) / STEP_S)
        lateness_s = late_s[silent_tick : moved // 2 + 1].sum()
        assert moved < last
        times_s.append(hog.driven_s[moved] - hog.driven_s[since] - lateness_s)
        check_trajectory(hog.setpoints)
        hog.end()
    report(capsys, "holder silent, host late", times_s, SILENT_S)
