"""A robot host as its users have it: agent, watchdog and servo process, bus and servos."""

import os
import signal
import time

import numpy as np
import pytest

from embodied.core.errors import ConfigError, LeaseError
from hal.commander import Commander
from hal.drivers.so101_arm import HIGH_RAD, LOW_RAD, SPEC
from hal.pool.holding import Holding
from hal.process.servo import AGENT_SILENT_S
from hal.remote import RemoteDevice
from hal.safety.config import Bounds, SafetyConfig

SAFETY = SafetyConfig()
STOPPING_S = 0.25
TICK_S = 0.02
BOTH = [pytest.param(signal.SIGSTOP, marks=pytest.mark.slow), signal.SIGKILL]
NOISE_S = 0.5
"""What a shared machine may add: processes wait for a core, and the arm settles."""


@pytest.fixture
def moving(host):
    """The arm moves at up to 1.5 rad/s under a lease."""
    host.virtual_arm(seed=1)
    host.arm_agent()
    host.wait("ready", "degraded")
    mover = host.mover()
    time.sleep(0.4)
    host.arm.clear_peaks()
    return mover


def check_limits(host):
    """True motion stays within the position limits, and near the commanded speed."""
    peaks = host.arm.state().peaks
    low, high = np.array(LOW_RAD), np.array(HIGH_RAD)
    assert (peaks.q_low_rad >= low - 0.01).all() and (peaks.q_high_rad <= high + 0.01).all()
    assert (peaks.dq_rad_s <= 1.2 * SPEC.motion.velocity[0]).all()


def test_a_lease_moves_the_arm_and_its_end_holds_it(host):
    arm = host.virtual_arm(seed=2)
    host.arm_agent()
    host.wait("ready", "degraded")
    with (
        Holding(host.pool, "test", "so101", timeout_s=10) as held,
        RemoteDevice(held.devices[0].address, held.devices[0].token) as device,
    ):
        commander = Commander(device)
        goal = np.array([0.4, -0.9, 1.0, 0.5, 0.3, 0.6])
        commander.move_to(goal)
        np.testing.assert_allclose(arm.state().q_rad, goal, atol=0.06)
        assert [row.holder for row in host.pool.devices()] == ["test"]
        with pytest.raises(ConfigError, match="only be tightened"):
            device.tighten(Bounds(velocity=(9.0,)))
        device.tighten(Bounds(velocity=(1.0,)))
        with pytest.raises(LeaseError, match="held by test"):
            host.pool.acquire("thief", "so101", timeout_s=0.2)
        frames = device.frames(device.tick - 20)
        assert [frame.tick for frame in frames] == list(range(device.tick - 20, device.tick + 1))
        late = RemoteDevice(held.devices[0].address, held.devices[0].token)
    with pytest.raises(LeaseError):
        late.open()
        Commander(late).move_to(np.zeros(6))
    late.close()
    time.sleep(0.5)
    np.testing.assert_allclose(arm.state().q_rad, goal, atol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_an_actor_that_stops_or_dies_stops_the_arm(host, moving, number):
    os.kill(moving.pid, number)
    stopped_s = host.standstill_s()
    ahead_s = 10 * TICK_S
    bound_s = max(SAFETY.heartbeat_s, ahead_s) + SAFETY.committed_ticks * TICK_S + STOPPING_S
    assert stopped_s <= bound_s + TICK_S + NOISE_S
    check_limits(host)
    if number == signal.SIGSTOP:
        os.kill(moving.pid, signal.SIGCONT)
        assert moving.wait(timeout=10) != 0, "its lease is over"
    deadline_s = time.monotonic() + 15
    with Holding(host.pool, "next", "so101", timeout_s=20) as held:
        assert held.devices[0].token > 0 and time.monotonic() < deadline_s


@pytest.mark.parametrize("number", BOTH)
def test_an_agent_that_stops_or_dies_stops_the_arm(host, moving, number):
    agent = host.agent_process
    os.kill(agent.pid, number)
    stopped_s = host.standstill_s()
    bound_s = AGENT_SILENT_S + SAFETY.committed_ticks * TICK_S + STOPPING_S
    assert stopped_s <= bound_s + TICK_S + NOISE_S
    check_limits(host)
    assert moving.wait(timeout=10) != 0
    if number == signal.SIGSTOP:
        os.kill(agent.pid, signal.SIGCONT)
    else:
        agent.wait(timeout=5)
        host.arm_agent()
    host.wait("ready", "degraded")
    host.mover()


@pytest.mark.slow
def test_a_servo_process_that_stops_is_killed_the_arm_held_and_the_halt_latched(host, moving):
    pid = host.servo_pid()
    os.kill(pid, signal.SIGSTOP)
    stopped_s = host.standstill_s()
    assert stopped_s <= STOPPING_S + NOISE_S, "the goals stopped with the process"
    reason = host.wait("halted")
    assert "stalled" in reason
    assert host.servo_pid() != pid
    check_limits(host)
    held_rad = host.arm.state().q_rad
    assert moving.wait(timeout=10) != 0
    time.sleep(0.3)
    np.testing.assert_allclose(host.arm.state().q_rad, held_rad, atol=0.02)


@pytest.mark.slow
def test_a_servo_process_that_dies_is_replaced_and_waits_for_a_new_lease(host, moving):
    pid = host.servo_pid()
    old_token = host.pool.devices()[0].token
    os.kill(pid, signal.SIGKILL)
    assert host.standstill_s() <= STOPPING_S + NOISE_S
    check_limits(host)
    assert moving.wait(timeout=15) != 0
    host.wait("ready", "degraded")
    assert host.servo_pid() != pid
    [row] = host.pool.devices()
    with pytest.raises(LeaseError, match=r"has ended|held until"):
        RemoteDevice(row.address, old_token).open()
    host.mover()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_watchdog_that_stops_or_dies_stops_the_arm(host, moving, number):
    pid = host.watchdog_pid()
    os.kill(pid, number)
    assert host.standstill_s() <= AGENT_SILENT_S + 2 * TICK_S + STOPPING_S + NOISE_S
    check_limits(host)
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    assert moving.wait(timeout=15) != 0
    time.sleep(3.0)
    host.wait("ready", "degraded", timeout_s=30)
    host.mover()


@pytest.mark.slow
def test_an_unplugged_arm_is_lost_and_comes_back(host, moving):
    host.arm.unplug()
    host.wait("lost")
    assert moving.wait(timeout=10) != 0
    host.arm.plug()
    host.wait("ready", "degraded")
    host.mover()
    check_limits(host)


@pytest.mark.slow
def test_the_emergency_stop_needs_no_agent_and_survives_its_restart(host, moving):
    from embodied.cli.main import main

    agent = host.agent_process
    os.kill(agent.pid, signal.SIGSTOP)
    assert main(["estop", "--reason", "hand in the way"]) == 1, "no agent confirms it"
    assert host.standstill_s() <= STOPPING_S + NOISE_S
    os.kill(agent.pid, signal.SIGCONT)
    assert "hand in the way" in host.wait("halted")
    agent.terminate()
    agent.wait(timeout=15)
    host.arm_agent()
    assert "hand in the way" in host.wait("halted")
    assert main(["estop", "--clear"]) == 0
    host.wait("ready", "degraded")
    host.mover()


@pytest.mark.slow
def test_a_second_agent_for_the_same_robot_is_refused_and_harms_nothing(host):
    host.virtual_arm(seed=7)
    first = host.arm_agent()
    host.wait("ready", "degraded")
    second = host.arm_agent()
    assert second.wait(timeout=20) == 2
    time.sleep(1.0)
    assert first.poll() is None and host.health()[0] in ("ready", "degraded")
    assert "registered by process" in host.text()
