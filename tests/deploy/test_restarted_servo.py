"""A servo process that is replaced: the lease before it is over, the next one stands at once."""

import contextlib
import os
import signal
import threading
import time

import pytest

from embodied.core.errors import DeviceLostError, LeaseError
from hal.commander import Commander
from hal.pool.holding import Holding
from hal.remote import RemoteDevice


def connected(address, token):
    """The device once its new process is there, which takes as long as the machine is busy."""
    deadline_s = time.monotonic() + 20
    while True:
        try:
            return RemoteDevice(address, token).open()
        except DeviceLostError:
            assert time.monotonic() < deadline_s


@pytest.mark.slow
def test_a_replaced_servo_process_never_takes_the_old_lease_and_the_next_one_at_once(host):
    host.agent("+robot@robots.sim=simulated", "robots.sim.driver.task=so101/reach")
    host.wait("ready", "degraded", name="sim", timeout_s=60.0)
    [row] = host.pool.devices()
    found = []

    def insist(token, until_s):
        """Try to command with an old token for as long as the process is replaced."""
        while time.monotonic() < until_s:
            try:
                with RemoteDevice(row.address, token) as device:
                    found.append(device.tick)
            except (LeaseError, DeviceLostError):
                time.sleep(0.01)

    for _ in range(3):
        servo = host.servo_pid()
        with Holding(host.pool, "old", "id=sim", timeout_s=10) as old:
            token = old.devices[0].token
            with RemoteDevice(row.address, token) as device:
                device.advance(device.tick + 5)
                os.kill(servo, signal.SIGKILL)
            insisting = threading.Thread(target=insist, args=(token, time.monotonic() + 3.0))
            insisting.start()
        killed_s = time.monotonic()
        with (
            Holding(host.pool, "next", "id=sim", timeout_s=10) as held,
            contextlib.closing(connected(row.address, held.devices[0].token)) as device,
        ):
            assert time.monotonic() - killed_s < 20.0
            commander = Commander(device)
            here = device.latest().observation["observation.state"]
            for _ in range(50):
                tick = device.tick
                commander.send(here[None].repeat(5, 0), obs_tick=tick, start_tick=tick + 1)
                device.advance(tick + 1)
        insisting.join()
        assert not found, "the old lease was over"
        assert host.servo_pid() != servo
