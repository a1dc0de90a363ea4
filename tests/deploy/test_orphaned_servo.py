"""A watchdog that dies while its servo process is stopped: nobody could end that one any more."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from embodied.cli.main import main

STOPPED = "stalled: the servo process was stopped when its watchdog died"


def gone(pid, timeout_s=20.0):
    """Whether a process ends in time; one that nobody has reaped yet has ended."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def moving(host):
    """The arm moves under a lease."""
    host.virtual_arm(seed=3)
    host.arm_agent()
    host.wait("ready", "degraded")
    mover = host.mover()
    time.sleep(0.4)
    return mover


def orphan(host):
    """Stop the servo process and kill its watchdog before that can do anything about it."""
    servo, watchdog = host.servo_pid(), host.watchdog_pid()
    os.kill(servo, signal.SIGSTOP)
    os.kill(watchdog, signal.SIGKILL)
    return servo


def stands(host):
    """The goals are where the arm is, and it stays there."""
    host.standstill_s()
    state = host.arm.state()
    np.testing.assert_allclose(state.goal_rad, state.q_rad, atol=0.03)
    time.sleep(0.3)
    np.testing.assert_allclose(host.arm.state().q_rad, state.q_rad, atol=0.02)


@pytest.mark.slow
def test_the_next_watchdog_kills_the_stopped_servo_process_holds_and_latches(host, moving):
    servo = orphan(host)
    assert gone(servo), host.text()
    assert host.wait("halted") == STOPPED
    assert moving.wait(timeout=10) != 0
    stands(host)
    assert host.servo_pid() != servo
    assert main(["estop", "--clear", "left"]) == 0
    host.wait("ready", "degraded")
    host.mover()


@pytest.mark.slow
def test_an_agent_that_ends_meanwhile_finishes_it_itself(host, moving):
    agent = host.agent_process
    os.kill(agent.pid, signal.SIGSTOP)
    servo = orphan(host)
    agent.terminate()
    os.kill(agent.pid, signal.SIGCONT)
    assert agent.wait(timeout=120) == 0, host.text()
    assert gone(servo, timeout_s=1.0), host.text()
    stands(host)
    host.arm_agent()
    assert host.wait("halted") == STOPPED


@pytest.mark.slow
def test_the_next_agent_finishes_what_a_killed_one_left(host, moving):
    agent = host.agent_process
    os.kill(agent.pid, signal.SIGSTOP)
    servo = orphan(host)
    agent.kill()
    agent.wait(timeout=5)
    time.sleep(0.5)
    assert not gone(servo, timeout_s=0.0), "nobody is left who could end it"
    host.arm_agent()
    assert gone(servo), host.text()
    assert host.wait("halted") == STOPPED
    stands(host)


@pytest.mark.slow
def test_a_servo_process_that_does_not_end_when_its_agent_stops_is_killed_and_the_halt_latched(
    host, moving
):
    agent, watchdog, servo = host.agent_process, host.watchdog_pid(), host.servo_pid()
    os.kill(watchdog, signal.SIGSTOP)
    os.kill(servo, signal.SIGSTOP)
    agent.terminate()
    time.sleep(0.2)
    os.kill(watchdog, signal.SIGCONT)
    assert agent.wait(timeout=120) == 0, host.text()
    assert gone(servo, timeout_s=1.0)
    stands(host)
    host.arm_agent()
    assert "did not end in 10 s" in host.wait("halted")
