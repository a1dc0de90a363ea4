"""Pictures of a running device: bounded, and never at the cost of its servo steps."""

import threading
import time

import numpy as np
import pytest
from follower import Follower

from embodied.core.clock import RealClock, VirtualClock
from embodied.core.errors import ConfigError
from hal.commander import Commander
from hal.device import Device
from hal.health import DeviceInfo
from hal.pictures import LONGEST_SIDE
from hal.pool.holding import Holding
from hal.remote import RemoteDevice
from hal.safety.config import SafetyConfig

SAFETY = SafetyConfig(heartbeat_s=None, overruns=0)
TOO_LARGE = "4096 x 4096 pixels was asked for; each side must be 1 to 1024"


class Drawn(Follower):
    """Draws itself only when it is allowed to, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Event()
        self.drawing = threading.Event()

    def render(self, width, height):
        return np.zeros((height, width, 3), np.uint8)

    def snapshot(self, width, height):
        seen = self.position.copy()

        def picture():
            self.drawing.set()
            assert self.allowed.wait(20)
            return np.full((height, width, 3), 100 * seen[2], np.uint8)

        return picture


def device_of(driver, clock):
    return Device(driver, info=DeviceInfo("arm", "test", "here"), clock=clock, safety=SAFETY)


def test_a_real_device_goes_on_while_a_picture_of_its_past_is_drawn():
    driver = Drawn()
    pictures = []
    with device_of(driver, RealClock()) as device:
        thread = threading.Thread(target=lambda: pictures.append(device.render(8, 6)))
        thread.start()
        assert driver.drawing.wait(10)
        device.advance(device.tick + 10, timeout_s=10.0)
        driver.position[2] = 2.0
        driver.allowed.set()
        thread.join(10)
    assert pictures[0].shape == (6, 8, 3)
    assert (pictures[0] == 100).all(), "as it was when the picture was asked for"


def test_a_device_in_virtual_time_draws_itself_as_it_is():
    with device_of(Drawn(), VirtualClock()) as device:
        assert (device.render(8, 6) == 0).all()


@pytest.mark.parametrize("clock", [RealClock, VirtualClock])
def test_a_picture_that_is_too_large_or_empty_is_refused(clock):
    with device_of(Drawn(), clock()) as device:
        with pytest.raises(ConfigError, match=TOO_LARGE):
            device.render(4096, 4096)
        with pytest.raises(ConfigError, match="1 to 1024"):
            device.render(0, 10)


@pytest.fixture
def simulated(host):
    """The simulated SO-101 behind an agent, leased."""
    host.agent(
        "+robot@robots.sim=simulated",
        "robots.sim.driver.task=so101/reach",
        "+robots.sim.safety.heartbeat_s=5.0",  # drawing takes every core that there is
    )
    host.wait("ready", "degraded", name="sim", timeout_s=60.0)
    with (
        Holding(host.pool, "test", "id=sim", timeout_s=10) as held,
        RemoteDevice(held.devices[0].address, held.devices[0].token) as device,
    ):
        yield device


def test_pictures_of_a_simulated_robot_delay_no_answer_to_its_holder(simulated):
    device = simulated
    address = device._address
    stop = threading.Event()
    drawn = []

    def watch():
        with RemoteDevice(address) as watcher:
            while not stop.is_set():
                drawn.append(watcher.render(LONGEST_SIDE, LONGEST_SIDE))

    thread = threading.Thread(target=watch)
    thread.start()
    commander = Commander(device)
    here = device.latest().observation["observation.state"]
    took_s = []
    try:
        deadline_s = time.monotonic() + 20
        while (len(drawn) < 20 or len(took_s) < 100) and time.monotonic() < deadline_s:
            tick = device.tick
            started_s = time.monotonic()
            commander.send(np.repeat(here[None], 5, 0), obs_tick=tick, start_tick=tick + 1)
            took_s.append(time.monotonic() - started_s)
            device.advance(tick + 1)
    finally:
        stop.set()
        thread.join(30)
    assert len(drawn) >= 20 and drawn[0].shape == (LONGEST_SIDE, LONGEST_SIDE, 3)
    assert drawn[0].max() > drawn[0].min(), "something is to be seen"
    assert np.median(took_s) < 0.01, "a picture takes more than that"
    with pytest.raises(ConfigError, match=TOO_LARGE):
        device.render(4096, 4096)


def test_a_servo_process_refuses_what_a_client_does_not_check(simulated):
    from embodied.comms.channels import RequestClient
    from hal.process import messages as m

    address = simulated._described.pictures
    client = RequestClient(address, m.PICTURE_REPLIES)
    with client, pytest.raises(ConfigError, match=TOO_LARGE):
        client.request(m.Render(4096, 4096), {}, 5.0)
