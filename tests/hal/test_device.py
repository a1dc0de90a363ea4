import itertools
import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from point import POINT_SPEC, PointDriver

from embodied.core.clock import RealClock, VirtualClock
from embodied.core.errors import DeviceLostError, EmbodiedError, SpecError
from embodied.core.frames import Chunk
from hal.device import Device
from hal.group import DeviceGroup, make_group
from hal.health import DeviceInfo, Health

INFO = DeviceInfo("point:0", "point", "local")


def chunk(start, actions, *, seq, obs=None, until=None, **kwargs):
    actions = np.asarray(actions, np.float32)
    return Chunk(
        start_tick=start,
        actions_HD=actions,
        obs_tick=start if obs is None else obs,
        valid_until_tick=start + len(actions) - 1 if until is None else until,
        seq=seq,
        **kwargs,
    )


@pytest.fixture
def device(point_driver):
    with Device(point_driver, info=INFO) as opened:
        yield opened


def test_for_a_holder_a_device_that_is_not_open_yet_is_lost(point_driver):
    """A servo process answers while it still looks for its robot; the holder asks again later."""
    device = Device(point_driver, info=INFO)
    for ask in (lambda: device.tick, lambda: device.frames(0), lambda: device.advance(1)):
        with pytest.raises(DeviceLostError, match="not open"):
            ask()


def test_every_tick_has_a_frame_with_the_action_that_was_executed(device, point_driver):
    actions = np.linspace(-1, 1, 12).reshape(6, 2).astype(np.float32)
    device.submit(chunk(0, actions, seq=1))
    device.advance(6)
    frames = device.frames(0)
    assert [frame.tick for frame in frames] == list(range(7))
    assert frames[-1].action is None and not frames[-1].held
    np.testing.assert_array_equal([frame.action for frame in frames[:-1]], actions)
    for before, after in itertools.pairwise(frames):
        moved = after.observation["observation.state"] - before.observation["observation.state"]
        np.testing.assert_allclose(moved, 0.05 * before.action, atol=1e-6)
        assert after.t_ns["observation.state"] > before.t_ns["observation.state"]


def test_holds_when_the_chunk_has_run_out(device, point_driver):
    device.submit(chunk(0, np.ones((2, 2)), seq=1))
    device.advance(5)
    assert [frame.held for frame in device.frames(0)] == [False, False, True, True, True, False]
    assert point_driver.held == 3


def test_actions_are_addressed_by_tick_not_by_arrival(device):
    device.submit(chunk(2, [[0.5, 0.5]], seq=1, obs=0))
    device.advance(4)
    assert [frame.held for frame in device.frames(0)][:4] == [True, True, False, True]


def test_a_late_chunk_never_executes_a_past_action(device):
    device.advance(3)
    ticket = device.submit(chunk(0, np.arange(10).reshape(5, 2) / 10, seq=1, until=9))
    assert ticket.late_ticks == 3 and ticket.first_tick == 3 and len(ticket.accepted_HD) == 2
    device.advance(5)
    np.testing.assert_allclose(device.frames(3)[0].action, [0.6, 0.7], atol=1e-6)


def test_a_later_chunk_replaces_the_rest_of_an_earlier_one(device):
    device.submit(chunk(0, np.full((8, 2), 0.1), seq=1))
    device.advance(2)
    device.submit(chunk(2, np.full((2, 2), 0.9), seq=2))
    device.advance(6)
    executed = [frame.action for frame in device.frames(0)[:-1]]
    np.testing.assert_allclose([a[0] for a in executed[:4]], [0.1, 0.1, 0.9, 0.9], atol=1e-6)
    assert executed[4] is None, "the tail of the replaced chunk must not come back"


BAD = st.sampled_from(["nan", "inf", "shape", "dtype", "empty", "stale", "future", "old", "order"])


@settings(max_examples=60, deadline=None)
@given(BAD, st.integers(0, 5))
def test_no_faulty_chunk_moves_the_robot(fault, ticks):
    driver = PointDriver()
    with Device(driver, info=INFO) as device:
        device.submit(chunk(0, np.zeros((1, 2)), seq=5))
        device.advance(ticks + 1)
        now, actions = device.tick, np.full((4, 2), 0.5, np.float32)
        good = chunk(now, actions, seq=9)
        faulty = {
            "nan": replace(good, actions_HD=np.where(np.eye(4, 2), np.nan, actions)),
            "inf": replace(good, actions_HD=actions * np.inf),
            "shape": replace(good, actions_HD=np.ones((4, 3), np.float32)),
            "dtype": replace(good, actions_HD=np.ones((4, 2), np.int64)),
            "empty": replace(good, actions_HD=np.zeros((0, 2), np.float32)),
            "stale": replace(good, start_tick=now - 4, valid_until_tick=now - 1),
            "future": replace(good, obs_tick=now + 1),
            "old": replace(good, obs_tick=now - 65),
            "order": replace(good, seq=5),
        }[fault]
        driven = len(driver.driven)
        ticket = device.submit(faulty)
        assert ticket.rejections and not len(ticket.accepted_HD)
        assert all(rejection.reason for rejection in ticket.rejections)
        device.advance(now + 4)
        assert len(driver.driven) == driven


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=2, max_size=12))
def test_what_is_driven_is_always_within_the_bounds(values):
    driver = PointDriver()
    with Device(driver, info=INFO) as device:
        actions = np.array(values[: len(values) // 2 * 2], np.float32).reshape(-1, 2)
        ticket = device.submit(chunk(0, actions, seq=1))
        device.advance(len(actions))
        assert ticket.clipped == int((np.abs(actions) > 1).sum())
        assert all((np.abs(action) <= 1).all() for action in driver.driven)


def test_max_step_limits_the_change_between_ticks(point_driver):
    point_driver.spec = msgspec.structs.replace(POINT_SPEC, max_step=(0.1, 0.2))
    with Device(point_driver, info=INFO) as device:
        device.submit(chunk(0, [[0, 0], [1, 1], [1, 1]], seq=1))
        device.advance(3)
    np.testing.assert_allclose(point_driver.driven, [[0, 0], [0.1, 0.2], [0.2, 0.4]], atol=1e-6)


def test_a_tick_without_command_does_not_open_the_step_limit(point_driver):
    spec = msgspec.structs.replace(POINT_SPEC, max_step=(0.1, 0.1))
    point_driver.spec = spec
    with Device(point_driver, info=INFO) as device:
        device.submit(chunk(0, [[-1, -1]], seq=1))
        device.advance(2)
        device.submit(chunk(2, [[1, 1]], seq=2))
        device.advance(3)
    np.testing.assert_allclose(point_driver.driven, [[-1, -1], [-0.9, -0.9]], atol=1e-6)


def test_a_driver_that_opens_wrongly_is_closed_again(point_driver):
    point_driver.sense = lambda: {"observation.state": np.zeros(3, np.float32)}
    closed = []
    point_driver.close = lambda: closed.append(1)
    with pytest.raises(SpecError, match="keys"):
        Device(point_driver, info=INFO).open()
    assert closed


def test_a_fenced_lease_holder_is_refused(device):
    first, second = device.lease(), device.lease()
    assert second > first
    old = chunk(0, np.ones((1, 2)), seq=1, lease_token=first)
    assert "lease" in device.submit(old).rejections[0].reason
    assert not device.submit(replace(old, lease_token=second)).rejections


def test_halt_latches_until_a_person_clears_it(device, point_driver):
    device.submit(chunk(0, np.ones((8, 2)), seq=1))
    device.advance(2)
    device.halt("stop pressed")
    device.halt("again")
    device.advance(4)
    assert len(point_driver.driven) == 2
    assert "stop pressed" in device.submit(chunk(4, np.ones((1, 2)), seq=2)).rejections[0].reason
    assert device.info.health is Health.HALTED
    device.clear()
    assert device.submit(chunk(4, np.ones((1, 2)), seq=3)).rejections[0].code == "halted"
    token = device.lease()
    assert not device.submit(chunk(4, np.ones((1, 2)), seq=3, lease_token=token)).rejections


def test_a_failing_driver_loses_the_device_with_the_reason(device, point_driver):
    point_driver.fail_at_tick = 2
    device.submit(chunk(0, np.ones((8, 2)), seq=1))
    with pytest.raises(DeviceLostError, match="bus timed out"):
        device.advance(5)
    assert device.info.health is Health.LOST
    with pytest.raises(DeviceLostError):
        device.submit(chunk(2, np.ones((1, 2)), seq=2))


def test_frames_that_are_gone_are_an_error_not_a_gap(point_driver):
    with Device(point_driver, info=INFO, frame_capacity=4) as device:
        device.advance(10)
        assert [frame.tick for frame in device.frames(6)] == [6, 7, 8, 9, 10]
        with pytest.raises(EmbodiedError, match="gone"):
            device.frames(5)


def test_reset_starts_from_the_seed_and_keeps_counting_ticks(device):
    device.advance(3)
    first = device.reset(7)
    assert first == 4
    a = device.latest().observation["observation.state"]
    device.submit(chunk(4, np.ones((3, 2)), seq=1))
    device.advance(6)
    device.reset(7)
    np.testing.assert_array_equal(device.latest().observation["observation.state"], a)
    device.reset(8)
    assert not np.array_equal(device.latest().observation["observation.state"], a)


def test_a_real_clock_ticks_by_itself(real_point_driver):
    with Device(real_point_driver, info=INFO, clock=RealClock()) as device:
        device.submit(chunk(2, np.full((20, 2), 0.5), seq=1, obs=0))
        device.advance(12)
        frames = device.frames(0)
    assert [frame.tick for frame in frames[:13]] == list(range(13))
    assert frames[0].held and not frames[5].held
    stamps = np.array([frame.t_ns["observation.state"] for frame in frames])
    assert (np.diff(stamps) > 0).all()
    with pytest.raises(EmbodiedError, match="no simulator"):
        device._opened() and device.reset(0)


def test_virtual_time_at_speed_one_is_no_faster_than_real_time():
    clock = VirtualClock(speed=2.0)
    started_s = time.monotonic()
    for k in range(1, 11):
        clock.sleep_until(k * 10_000_000)
    assert clock.now_ns() == 100_000_000
    assert time.monotonic() - started_s >= 0.045


def test_a_group_advances_only_the_rows_of_the_mask(point_driver):
    group = make_group(lambda row: Device(PointDriver(), info=INFO), 3)
    group.submit([chunk(0, np.ones((2, 2)), seq=1), None, chunk(0, np.ones((2, 2)), seq=1)])
    group.advance([2, 2, 1], np.array([True, False, True]))
    assert [device.tick for device in group.devices] == [2, 0, 1]
    frames = group.frames([0, 0, 0], np.array([True, True, False]))
    assert [len(rows) for rows in frames] == [3, 1, 0]
    group.close()


def test_a_group_needs_equal_specs(point_driver):
    other = msgspec.structs.replace(POINT_SPEC, tick_hz=50.0)
    with pytest.raises(SpecError, match="different specs"):
        DeviceGroup([Device(PointDriver(), info=INFO), Device(PointDriver(other), info=INFO)])
