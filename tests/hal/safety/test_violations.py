"""Arms that do not do what they are told, and the robot's own faults."""

import re

import numpy as np
import pytest
from follower import FOLLOWER_SPEC, Follower
from hand import (
    MOTION,
    SAFETY,
    STEP_S,
    TICK_S,
    Hand,
    check_trajectory,
    many_seeds,
    opened,
    report,
    standstill_s,
    stopping_s,
)

from embodied.core.errors import DeviceLostError
from hal.health import Health


@pytest.mark.parametrize(
    ("fault", "match"),
    [("stuck", "from where it was commanded"), ("runaway", "beyond its limits|too fast")],
)
def test_measured_motion_out_of_bounds_latches_the_halt(fault, match):
    driver = Follower()
    if fault == "runaway":
        driver.step_time = lambda: setattr(driver, "position", driver.position + 0.05)
    device = opened(driver)
    if fault == "stuck":
        hand = Hand(device, np.random.default_rng(0))
        driver.stuck = True
        for _ in range(30):
            hand.send(np.tile([1.2, 0.9, 1.9], (8, 1)))
            device.advance(device.tick + 2)
    else:
        device.advance(device.tick + 12)
    assert device.info.health is Health.HALTED
    assert re.search(match, device.info.reason)


def outside(at, before, commanded):
    """Whether a measurement breaks what docs/safety.md allows."""
    low, high = FOLLOWER_SPEC.action.bounds()
    margin, speed = SAFETY.position_margin, SAFETY.velocity_factor * np.array(MOTION.velocity)
    return bool(
        (at < low - margin).any()
        or (at > high + margin).any()
        or (np.abs(at - before) > speed * TICK_S).any()
        or (np.abs(at - commanded) > SAFETY.tracking_error).any()
    )


class Disobedient(Follower):
    """Joints that are ruled are stuck, or run away at rates of their own (per s); with a glitch
    the first one is measured where it is not."""

    rates, ruled, glitch = np.zeros(3), np.zeros(3, bool), 0.0

    def sense(self):
        position = super().sense()["observation.state"]
        return {"observation.state": position + np.float32([self.glitch, 0, 0])}

    def step_time(self):
        before = self.position
        super().step_time()
        self.position = np.where(self.ruled, before + self.rates * STEP_S, self.position)


@many_seeds(50)
def test_an_arm_that_is_stuck_or_runs_away_is_halted_in_time_and_no_glitch_does_it(seeds, capsys):
    times_s = []
    for seed in seeds:
        driver, rng = Disobedient(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 20)))
        faulty_from, glitches = int(rng.integers(0, 40)), rng.uniform(0, 0.6)
        joint, rates = np.eye(3, dtype=bool)[rng.integers(3)], rng.uniform(-4, 4, 3)
        runaway = rng.random() < 0.5
        in_a_row, before = 0, driver.sense()["observation.state"]
        far = np.where(driver.position < (hand.low + hand.high) / 2, hand.high, hand.low)
        for k in range(300):
            driver.glitch = 0.8 if k < faulty_from and rng.random() < glitches else 0.0
            if k == faulty_from:
                driver.ruled, driver.rates = joint, rates * MOTION.velocity * runaway
                far = np.where(driver.position < (hand.low + hand.high) / 2, hand.high, hand.low)
            hand.send(np.tile(far, (8, 1)))
            device.advance(device.tick + 1)
            at = driver.sense()["observation.state"]
            in_a_row = in_a_row + 1 if outside(at, before, driver.setpoints[-1]) else 0
            before = at
            halted = device.info.health is Health.HALTED
            assert halted == (in_a_row >= SAFETY.violations), (seed, k, in_a_row, device.info)
            if halted:
                break
        assert halted, "sooner or later the joint is not where it should be"
        times_s.append(in_a_row * TICK_S)
        check_trajectory(driver.setpoints)
        if k < faulty_from:
            continue
        halted_at, place = len(driver.setpoints), driver.sense()["observation.state"]
        device.advance(device.tick + 20)
        still = ~driver.ruled | (driver.rates == 0)
        for setpoint in driver.setpoints[halted_at:]:
            np.testing.assert_allclose(setpoint[still], place[still], atol=1e-6)
    report(capsys, "arm disobeys", times_s, SAFETY.violations * TICK_S, "halted")


@many_seeds(50)
def test_the_robots_own_fault_stops_it(seeds, capsys):
    times_s = []
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 20)))
        driver.faulty = "elbow_flex: overload"
        faulty_at = len(driver.setpoints)
        hand.send(hand.absurd(60))
        device.advance(device.tick + round(stopping_s() / TICK_S) + 5)
        assert device.info.health is Health.HALTED and "overload" in device.info.reason
        times_s.append(standstill_s(driver.setpoints, faulty_at))
        check_trajectory(driver.setpoints)
        assert device.latest().tick == device.tick, "it is still sensed"
    report(capsys, "overload", times_s, TICK_S + stopping_s() + STEP_S)


@many_seeds(50)
def test_an_arm_that_cannot_be_read_a_few_times_in_a_row_is_lost(seeds):
    lost = 0
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 10)))
        failures = (rng.random(40) < rng.uniform(0, 0.5)).tolist()
        in_a_row = 0
        for failure in failures:
            device.pulse(hand.token)
            driver.unreadable = int(failure)
            in_a_row = in_a_row + 1 if failure else 0
            sensed_ns = device.latest().t_ns["observation.state"]
            if in_a_row >= SAFETY.lost_after:
                with pytest.raises(DeviceLostError, match="no answer"):
                    device.advance(device.tick + 1)
                assert device.info.health is Health.LOST
                lost += 1
                break
            device.advance(device.tick + 1)
            now_ns = device.latest().t_ns["observation.state"]
            assert (now_ns == sensed_ns) == failure, "an old reading looks old"
        check_trajectory(driver.setpoints)
    assert 0 < lost < len(seeds)


def test_the_robots_own_fault_latches_the_halt_and_a_lost_bus_does_not():
    driver = Follower()
    device = opened(driver)
    driver.faulty = "elbow_flex: overload"
    device.advance(device.tick + 2)
    assert device.info.health is Health.HALTED and "overload" in device.info.reason
    assert device.latest().tick == 2, "it is still sensed"
    device = opened(driver := Follower())
    driver.unreadable = 2
    device.advance(4)
    frames = device.frames(0)
    times_ns = [frame.t_ns["observation.state"] for frame in frames]
    assert times_ns[0] == times_ns[1] == times_ns[2] < times_ns[3], "an old reading looks old"
    assert device.info.counts["failed reads"] == 2 and device.info.health is Health.DEGRADED
    driver.unreadable = 3
    with pytest.raises(DeviceLostError, match="no answer"):
        device.advance(10)
    assert device.info.health is Health.LOST
