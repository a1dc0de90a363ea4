"""Cameras beside a robot: their own rate, their own time, their own failures."""

import time

import numpy as np
import pytest
from follower import FOLLOWER_SPEC, Follower

from embodied.core.clock import RealClock
from embodied.core.errors import DeviceLostError
from embodied.core.specs import ArraySpec
from hal.device import Device
from hal.drivers.opencv import OpenCVCamera
from hal.health import DeviceInfo, Health
from hal.safety.config import SIMULATED
from sim.so101.virtual import VirtualArm

INFO = DeviceInfo("arm", "arm", "here")


class Counting:
    """Pictures that hold their number, every 50 ms."""

    spec = ArraySpec((2, 3, 3), "uint8")

    def __init__(self):
        self.number, self.opened, self.broken = 0, 0, False

    def open(self):
        self.opened += 1
        if self.broken:
            raise OSError("no camera")

    def read(self):
        if self.broken:
            raise OSError("cable pulled")
        time.sleep(0.05)
        self.number += 1
        return np.full((2, 3, 3), self.number % 256, np.uint8)

    def close(self):
        pass


def device_with(camera):
    return Device(
        Follower(), info=INFO, clock=RealClock(), safety=SIMULATED, cameras={"wrist": camera}
    )


def test_pictures_come_at_their_own_rate_with_their_own_time():
    camera = Counting()
    with device_with(camera) as device:
        assert device.spec.observation["observation.images.wrist"] == camera.spec
        device.advance(device.tick + 50)
        frames = device.frames(1)
    numbers = [int(f.observation["observation.images.wrist"][0, 0, 0]) for f in frames]
    taken_ns = [f.t_ns["observation.images.wrist"] for f in frames]
    most = 2 + (taken_ns[-1] - taken_ns[0]) / 0.05e9
    assert numbers == sorted(numbers) and numbers[-1] - numbers[0] <= most, "20 per second"
    assert numbers[-1] >= 5, "in a second or more"
    for frame in frames:
        age_s = (frame.t_ns["observation.state"] - frame.t_ns["observation.images.wrist"]) / 1e9
        assert -0.3 < age_s < 1.0
    assert len(set(taken_ns)) == len(set(numbers))


def test_a_camera_that_fails_ages_and_comes_back():
    camera = Counting()
    with device_with(camera) as device:
        device.advance(device.tick + 5)
        camera.broken = True
        time.sleep(0.3)
        old = device.latest().t_ns["observation.images.wrist"]
        device.advance(device.tick + 10)
        assert device.latest().t_ns["observation.images.wrist"] == old
        assert device.info.health is not Health.LOST, "the robot itself goes on"
        camera.broken = False
        deadline_s = time.monotonic() + 5
        while device.latest().t_ns["observation.images.wrist"] == old:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_a_camera_without_a_picture_does_not_open():
    camera = Counting()
    camera.broken = True
    with pytest.raises(DeviceLostError, match="no camera"):
        device_with(camera).open()


@pytest.mark.slow
def test_a_virtual_camera_through_opencv(tmp_path):
    with VirtualArm(tmp_path, seed=4, cameras=True) as arm:
        options = OpenCVCamera.Config(source=arm.camera_url("front"), width=640, height=480, fps=15)
        device = Device(
            Follower(spec=FOLLOWER_SPEC),
            info=INFO,
            clock=RealClock(),
            safety=SIMULATED,
            cameras={"front": OpenCVCamera(options)},
        )
        with device:
            device.advance(device.tick + 60)
            frames = device.frames(device.tick - 50)
            pictures = {f.t_ns["observation.images.front"] for f in frames}
            newest = frames[-1].observation["observation.images.front"]
    assert newest.std() > 10 and len(pictures) > 3
