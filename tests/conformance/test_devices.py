"""Every registered driver makes a device that keeps the same promises, on its specimen.

A new driver gets all of it by a row in the registry's "drivers" and one in its "specimens".
"""

import time

import numpy as np
import pytest

from embodied.core import registry
from embodied.core.clock import RealClock, VirtualClock
from embodied.core.errors import DeviceLostError
from embodied.core.frames import Chunk
from embodied.core.protocols import SimulatedDriver
from hal.commander import Commander
from hal.device import Device
from hal.health import DeviceInfo, Health
from hal.robot import check_robot, make_driver

SLOW = {"lerobot"}  # its import alone takes 10 s and more


def _drivers():
    marks = {name: [pytest.mark.slow] if name in SLOW else [] for name in registry.names("drivers")}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.fixture(scope="module", params=_drivers())
def specimen(request, tmp_path_factory):
    name = request.param
    assert name in registry.names("specimens"), f"driver '{name}' has no specimen to test it on"
    with registry.resolve("specimens", name)(tmp_path_factory.mktemp(name)) as found:
        yield found


class Spy:
    """A driver's commands, written down."""

    def __init__(self, driver):
        self.driven = []
        drive = driver.drive

        def spied(action_D):
            self.driven.append(np.array(action_D, np.float64))
            drive(action_D)

        driver.drive = spied


def make(specimen, folder, *, realtime=None):
    """An unopened device, in virtual time if the driver allows it."""
    driver = make_driver(specimen.robot)
    if realtime is None:
        realtime = not isinstance(driver, SimulatedDriver)
    spy = Spy(driver)
    device = Device(
        driver,
        info=DeviceInfo("specimen", specimen.robot.kind, "here"),
        clock=RealClock() if realtime else VirtualClock(),
        safety=specimen.robot.safety,
        latches=folder,
    )
    return device, spy


@pytest.fixture
def opened(specimen, tmp_path):
    device, spy = make(specimen, tmp_path)
    with device:
        yield device, spy


def pulse(device, token):
    """As a holder does in the background."""
    device.pulse(token)


def begin(device):
    """A lease and a first command where the robot is; how to send more."""
    token = device.lease("conformance")
    lead = int(device.realtime)
    seq = [0]

    def send(actions_HD, **changes):
        seq[0] += 1
        tick = device.tick
        fields = {"start_tick": tick + lead, "actions_HD": np.asarray(actions_HD, np.float32),
                  "obs_tick": tick, "valid_until_tick": tick + lead + len(actions_HD) - 1,
                  "seq": seq[0], "lease_token": token}  # fmt: skip
        return device.submit(Chunk(**{**fields, **changes}))

    motion = device.spec.motion
    here = device.latest().observation[motion.measured] if motion else np.zeros(
        device.spec.action.shape
    )  # fmt: skip
    low, high = device.spec.action.bounds()
    send([np.clip(here, low, high)] * 3)
    return send, token


def test_its_spec_is_known_before_it_is_opened_and_its_configuration_is_checked(specimen, tmp_path):
    check_robot(specimen.robot, "robot")
    device, _ = make(specimen, tmp_path)
    spec = device.spec
    assert spec.tick_hz > 0 and spec.observation and len(spec.action.shape) == 1
    assert spec.action.bounded, "a device whose actions have no bounds cannot be commanded safely"
    assert device.info.health is Health.ABSENT


def test_it_opens_senses_closes_and_opens_again(specimen, tmp_path):
    device, _ = make(specimen, tmp_path)
    for _ in range(2):
        with device:
            device.advance(device.tick + 3)
            frames = device.frames(device.tick - 3)
            for frame in frames:
                device.spec.check(frame.observation)
                values = [v for v in frame.observation.values() if v.dtype.kind == "f"]
                assert all(np.isfinite(v).all() for v in values)
                assert frame.t_ns.keys() == frame.observation.keys()
            assert device.info.health in (Health.READY, Health.DEGRADED)
        device.close()
        assert device.info.health is Health.ABSENT
        device, _ = make(specimen, tmp_path)


def test_ticks_follow_each_other_and_name_their_chunk(opened):
    device, _spy = opened
    _send, token = begin(device)
    first = device.tick
    for _ in range(10):
        pulse(device, token)
        device.advance(device.tick + 1)
    frames = device.frames(first)
    assert [f.tick for f in frames] == list(range(first, device.tick + 1))
    executed = [f for f in frames[:-1] if not f.held]
    assert executed and all(f.seq == 1 and f.action is not None for f in executed)
    assert all(f.action is None and f.seq == -1 for f in frames[:-1] if f.held)


def test_whatever_is_asked_only_bounded_commands_reach_it(opened):
    device, spy = opened
    send, token = begin(device)
    rng = np.random.default_rng(0)
    low, high = device.spec.action.bounds()
    bad = [np.nan, np.inf, -np.inf]
    for k in range(12):
        horizon = int(rng.integers(1, 9))
        actions = low + (high - low) * rng.uniform(-0.5, 1.5, (horizon, len(low)))
        ticket = send(actions)
        assert len(ticket.accepted_HD) or ticket.rejections
        poisoned = actions.copy()
        poisoned[rng.integers(horizon), rng.integers(len(low))] = bad[k % 3]
        ticket = send(poisoned)
        assert ticket.rejections[0].code == "nonfinite" and not len(ticket.accepted_HD)
        assert send(actions[:, 1:]).rejections[0].code == "shape"
        assert send(actions, lease_token=token - 1).rejections[0].code == "token"
        device.advance(device.tick + int(rng.integers(1, 4)))
    driven = np.array(spy.driven)
    assert len(driven) and np.isfinite(driven).all()
    assert (driven >= low - 1e-5).all() and (driven <= high + 1e-5).all()
    motion = device.spec.motion
    if motion is not None:
        for order, name in enumerate(("velocity", "acceleration", "jerk"), start=1):
            rates = np.abs(np.diff(driven, order, axis=0)) * motion.servo_hz**order
            limit = np.array(getattr(motion, name))
            assert (rates <= limit * 1.001 + 1e-6 * motion.servo_hz**order).all(), name


def test_without_a_heartbeat_it_holds_until_a_new_lease(opened):
    device, _spy = opened
    send, token = begin(device)
    heartbeat_ticks = int(device.safety.heartbeat_s * device.spec.tick_hz)
    device.advance(device.tick + heartbeat_ticks + 4)
    assert device.pulse(token), "the lease is over"
    assert send([np.zeros(device.spec.action.shape)]).rejections[0].code == "held"
    send, token = begin(device)
    device.advance(device.tick + 2)
    assert not device.pulse(token)


def test_a_halt_latches_and_is_cleared_by_hand(opened):
    device, _spy = opened
    send, _ = begin(device)
    device.halt("conformance")
    device.advance(device.tick + 3)
    assert device.info.health is Health.HALTED
    send, _ = begin(device)
    assert send([np.zeros(device.spec.action.shape)]).rejections[0].code == "halted"
    device.clear()
    assert device.info.health is not Health.HALTED


def test_it_keeps_its_rate_in_real_time(specimen, tmp_path):
    device, _ = make(specimen, tmp_path, realtime=True)
    with device:
        device.advance(device.tick + 2)
        for _ in range(5):  # a busy machine misses deadlines now and then
            begun_s, tick = time.monotonic(), device.tick
            time.sleep(1.0)
            rate = (device.tick - tick) / (time.monotonic() - begun_s)
            if rate == pytest.approx(device.spec.tick_hz, rel=0.15):
                break
        else:
            raise AssertionError(f"{rate:.1f} instead of {device.spec.tick_hz:g} ticks per second")


def test_unplugged_it_is_lost_and_comes_back_with_new_ticks(specimen, tmp_path):
    if specimen.unplug is None:
        pytest.skip("it has no cable")
    device, _ = make(specimen, tmp_path)
    with device:
        _, token = begin(device)
        device.advance(device.tick + 2)
        tick = device.tick
        specimen.unplug()
        with pytest.raises(DeviceLostError):
            device.advance(tick + 10_000, timeout_s=10)
        assert device.info.health is Health.LOST and device.info.reason
        specimen.plug()
        deadline_s = time.monotonic() + 20
        while device.info.health is Health.LOST and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert device.tick > tick and device.pulse(token), "the old lease is not good any more"
        _send, token = begin(device)
        device.advance(device.tick + 3)
        assert not device.pulse(token)


def test_it_goes_where_it_is_told(opened):
    device, _spy = opened
    if device.spec.motion is None:
        pytest.skip("it is not position-controlled")
    commander = Commander(device)
    at = device.latest().observation[device.spec.motion.measured].astype(float)
    low, high = device.spec.action.bounds()
    goal = np.clip(at + 0.05 * (high - low) * np.sign((low + high) / 2 - at), low, high)
    commander.move_to(goal, tolerance=0.03 * float((high - low).max()))


def test_a_simulated_one_repeats_itself(specimen, tmp_path):
    device, _ = make(specimen, tmp_path)
    if not isinstance(device.driver, SimulatedDriver):
        pytest.skip("it is not simulated")
    runs = []
    with device:
        for seed in (5, 6, 5):
            device.reset(seed)
            begin(device)
            first = device.tick
            device.advance(first + 5)
            frames = device.frames(first)
            runs.append([f.observation for f in frames])
    for key in runs[0][0]:
        same, other = (np.stack([o[key] for o in runs[k]]) for k in (2, 1))
        np.testing.assert_array_equal(np.stack([o[key] for o in runs[0]]), same)
        assert not np.array_equal(same, other)
