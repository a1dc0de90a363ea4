"""Limits on position, velocity, acceleration, jerk, steps and place; remote ones only tighten."""

import itertools

import msgspec
import numpy as np
import pytest
from follower import FOLLOWER_SPEC, Follower
from hand import (
    INFO,
    MOTION,
    SAFETY,
    STEP_S,
    Hand,
    Link,
    check_trajectory,
    many_seeds,
    opened,
)
from point import POINT_SPEC, PointDriver

from embodied.core.errors import ConfigError, LeaseError
from embodied.core.frames import Chunk
from hal.device import Device
from hal.drivers.so101_arm import LOW_RAD, MODEL, SPEC
from hal.safety.config import Bounds, SafetyConfig, Workspace, WorkspaceConfig

WORKSPACE = WorkspaceConfig(str(MODEL), (0.05, -0.25, 0.03), (0.35, 0.25, 0.30))
RATES = ("velocity", "acceleration", "jerk")


def test_remote_parties_can_only_tighten():
    device = opened(safety=msgspec.structs.replace(SAFETY, bounds=Bounds(velocity=(1.0,))))
    for bounds, match in (
        (Bounds(velocity=(1.5,)), r"velocity\[0\] is 1.5, wider than 1"),
        (Bounds(low=(-2.0, -1, 0)), r"low\[0\]"),
        (Bounds(high=(1.5, 1.0)), "1 or 3 finite"),
        (Bounds(jerk=(float("nan"),)), "finite"),
        (Bounds(low=(0.5, -1, 0)), "outside of"),
    ):
        with pytest.raises(ConfigError, match=match):
            device.tighten(bounds)
    device.grant(1, "far away")
    device.tighten(Bounds(velocity=(0.5,), high=(0.1, 1.0, 2.0)))
    Hand(device, np.random.default_rng(0), token=1).wander(40)
    p = np.array(device.driver.setpoints)
    assert p[:, 0].max() <= 0.1 + 1e-5 and np.abs(np.diff(p, axis=0)).max() <= 0.5 * STEP_S + 1e-6
    device.lease("the next one has the host's limits")
    device.revoke("")
    with pytest.raises(ConfigError, match=r"safety.bounds.velocity\[0\]"):
        opened(safety=msgspec.structs.replace(SAFETY, bounds=Bounds(velocity=(9.0,))))


@many_seeds(50)
def test_random_bounds_are_in_force_if_none_is_wider_and_change_nothing_if_one_is(seeds):
    taken = 0
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        device.grant(1, "far away")
        low, high = (limit.astype(float) for limit in FOLLOWER_SPEC.action.bounds())
        limits = {name: np.array(getattr(MOTION, name)) for name in RATES}
        for _ in range(int(rng.integers(1, 5))):
            widest = 1.0 if rng.random() < 0.6 else 1.3
            asked = {name: limits[name] * rng.uniform(0.3, widest, 3) for name in RATES}
            room = rng.uniform(-0.1 if widest > 1 else 0.0, 0.2, (2, 3))
            asked["low"], asked["high"] = low + room[0], high - room[1]
            chosen = [name for name in asked if rng.random() < 0.6]
            wider = any(
                (asked[name] < low).any()
                if name == "low"
                else (asked[name] > (high if name == "high" else limits[name])).any()
                for name in chosen
            )
            bounds = Bounds(**{name: tuple(asked[name].tolist()) for name in chosen})
            if wider:
                with pytest.raises(ConfigError, match="only be tightened"):
                    device.tighten(bounds)
                continue
            device.tighten(bounds)
            taken += 1
            limits.update({name: asked[name] for name in chosen if name in RATES})
            low = asked["low"] if "low" in chosen else low
            high = asked["high"] if "high" in chosen else high
        link = Link(device, rng)
        Hand(device, rng, link=link, token=1).wander(30)
        action = msgspec.structs.replace(FOLLOWER_SPEC.action, low=tuple(low), high=tuple(high))
        motion = msgspec.structs.replace(MOTION, **{n: tuple(limits[n]) for n in RATES})
        check_trajectory(
            driver.setpoints, motion, msgspec.structs.replace(FOLLOWER_SPEC, action=action)
        )
    assert len(seeds) / 2 < taken


@many_seeds(50)
def test_limits_tightened_while_the_arm_moves_break_none(seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        driver = Follower()
        device = opened(driver)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(5, 15)))
        low, high = hand.low, hand.high
        share = rng.uniform(0.1, 0.9)
        bounds = Bounds(
            velocity=tuple(share * np.array(MOTION.velocity)),
            acceleration=tuple(share * np.array(MOTION.acceleration)),
            jerk=tuple(share * np.array(MOTION.jerk)),
            low=tuple(low + 0.1 * share),
            high=tuple(high - 0.1 * share),
        )
        token = device.lease("careful")
        try:
            device.tighten(bounds)
        except ConfigError:
            continue
        changed_at = len(driver.setpoints)
        with pytest.raises(LeaseError):
            device.grant(token, "again")
        for _ in range(30):
            tick = device.tick
            here = driver.setpoints[-1][None].astype(np.float32)
            goal = rng.uniform(low, high, (1, 3)).astype(np.float32)
            path = here + np.linspace(0, 1, 8, dtype=np.float32)[:, None] * (goal - here)
            device.submit(Chunk(tick, path, tick, tick + 7, tick, 0, token))
            device.advance(tick + 3)
        check_trajectory(driver.setpoints)
        settled = np.array(driver.setpoints[changed_at + 40 :])
        speed = np.abs(np.diff(settled, axis=0)) / STEP_S
        assert (speed <= share * np.array(MOTION.velocity) * 1.001 + 1e-6).all()


@many_seeds(50)
def test_no_step_of_a_device_without_motion_is_longer_than_allowed(seeds):
    safety = SafetyConfig(start_tolerance=None, tracking_error=None)
    steps = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        most = rng.uniform(0.02, 0.5, 2)
        driver = PointDriver(msgspec.structs.replace(POINT_SPEC, max_step=tuple(most)))
        device = Device(driver, info=INFO, safety=safety).open()
        link = Link(device, rng)
        hand = Hand(device, rng, link=link)
        while device.tick < 50:
            hand.send(rng.uniform(-2, 2, (int(rng.integers(1, 9)), 2)))
            hand.advance(device.tick + int(rng.integers(1, 5)))
        driven = np.array(driver.driven)
        steps += len(driven)
        assert np.isfinite(driven).all() and np.abs(driven).max() <= 1
        assert (np.abs(np.diff(driven, axis=0)) <= most + 1e-6).all()
    assert steps > 20 * len(seeds)


@many_seeds(20)
def test_the_tool_stays_in_its_box(seeds):
    from sim.so101.arm import REST_RAD

    tool = Workspace(WORKSPACE)
    safety = msgspec.structs.replace(SAFETY, workspace=WORKSPACE, tracking_error=None)
    outside = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        driver = Follower(start=REST_RAD, spec=SPEC)
        device = opened(driver, safety=safety)
        hand = Hand(device, rng)
        for _ in range(25):
            target = rng.uniform(LOW_RAD, -np.array(LOW_RAD), 6)
            here = device.latest().observation["observation.state"]
            share = np.linspace(0.05, 1.0, 10)[:, None]
            ticket = hand.send(here + share * (target - here))
            outside += any(r.code == "workspace" for r in ticket.rejections)
            device.advance(device.tick + 4)
        check_trajectory(driver.setpoints, SPEC.motion, SPEC)
        assert all(not tool.fault(p) for p in driver.setpoints)
    assert outside > 2 * len(seeds), "the test must try to leave"


def test_frames_say_which_chunk_moved_the_arm_and_where_it_was_commanded():
    driver = Follower()
    device = opened(driver)
    hand = Hand(device, np.random.default_rng(0))
    hand.wander(12)
    frames = device.frames(0)[:-1]
    ends = driver.setpoints[1::2]
    for frame, end in itertools.zip_longest(frames, ends[: len(frames)]):
        if not frame.held:
            np.testing.assert_allclose(frame.action, end, atol=1e-6)
            assert frame.seq > 0


def test_from_outside_of_its_limits_an_arm_may_only_come_in():
    from sim.so101.virtual import Faults  # noqa: F401 - sets up OpenGL before MuJoCo is imported

    driver = Follower(start=(1.55, 0.0, 1.0))
    device = opened(driver)
    token = device.lease("rescue")
    path = np.linspace([1.55, 0, 1], [1.3, 0, 1], 40).astype(np.float32)
    ticket = device.submit(Chunk(0, path, 0, 39, 1, 0, token))
    assert not ticket.rejections
    device.advance(40)
    x = np.array(driver.setpoints)[:, 0]
    assert x.max() <= 1.55 + 1e-6 and x[-1] < 1.4 and (np.diff(x) <= 1e-9).all()
    start = np.array([0.0, -1.1, 0.9, 0.2, 0.0, 0.4])
    box = WorkspaceConfig(str(MODEL), (0.05, -0.25, 0.03), (0.19, 0.25, 0.30))
    safety = msgspec.structs.replace(SAFETY, workspace=box, tracking_error=None)
    driver = Follower(start=start, spec=SPEC)
    device = opened(driver, safety=safety)
    tool = Workspace(box)
    outside = tool.outside_m(start)
    assert outside > 0.01
    token = device.lease("rescue")
    goal = start + np.array([0, -0.4, 0.2, 0, 0, 0])
    path = np.linspace(start, goal, 60).astype(np.float32)
    assert tool.outside_m(goal) == 0.0
    for k in range(0, 60, 6):
        device.submit(Chunk(device.tick, path[k:], device.tick, device.tick + 99, k + 1, 0, token))
        device.advance(device.tick + 6)
    gaps = [tool.outside_m(p) for p in driver.setpoints]
    assert max(gaps) <= outside + 1e-5 and gaps[-1] == 0.0


def test_protections_that_a_device_cannot_have_are_refused():
    with pytest.raises(ConfigError, match="start_tolerance protects position-controlled"):
        Device(PointDriver(), info=INFO, safety=SAFETY)
    for wrong in ({"committed_ticks": -1}, {"overruns": -3}, {"tracking_error": np.inf},
                  {"position_margin": np.nan}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SafetyConfig(**wrong)
