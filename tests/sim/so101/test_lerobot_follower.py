import logging
import time

import numpy as np
import pytest
from opengl import needs_opengl

from hal.drivers.so101_arm import JOINTS
from sim.so101.camera import FPS, HEIGHT, WIDTH
from sim.so101.servo import REGISTERS
from sim.so101.virtual import VirtualArm

pytestmark = pytest.mark.slow
lerobot = pytest.importorskip("lerobot")

_HZ = 50.0
_SECONDS = 2.0


def test_lerobot_knows_the_same_registers():
    from lerobot.motors.feetech.tables import STS_SMS_SERIES_CONTROL_TABLE

    ours = {(address, size) for address, size, _ in REGISTERS.values()}
    assert ours <= set(STS_SMS_SERIES_CONTROL_TABLE.values())


@pytest.mark.parametrize("with_camera", [False, pytest.param(True, marks=needs_opengl)])
def test_the_unmodified_follower_moves_the_virtual_arm(tmp_path, with_camera, caplog):
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

    caplog.set_level(logging.WARNING)
    with VirtualArm(tmp_path, seed=7, cameras=with_camera) as arm:
        arm.write_calibration(tmp_path / "calibration" / "virtual.json")
        cameras = {}
        if with_camera:
            url = arm.camera_url("front")
            cameras["front"] = OpenCVCameraConfig(
                index_or_path=url, width=WIDTH, height=HEIGHT, fps=FPS
            )
        robot = SO101Follower(
            SO101FollowerConfig(
                port=arm.port,
                id="virtual",
                calibration_dir=tmp_path / "calibration",
                cameras=cameras,
            )
        )
        for camera in robot.cameras.values():
            camera.width = camera.height = camera.fps = None  # FFmpeg refuses to set them
        robot.connect(calibrate=False)
        assert robot.is_connected and robot.is_calibrated
        start = robot.get_observation()
        arm.clear_peaks()
        due_s = time.perf_counter()
        goal, truth = {}, []
        for k in range(round(_SECONDS * _HZ)):
            # All joints to 0°, the gripper, which counts from 0 to 100, to 60.
            share = min(1.0, k / 70)
            goal = {f"{joint}.pos": (1 - share) * start[f"{joint}.pos"] for joint in JOINTS}
            goal["gripper.pos"] = start["gripper.pos"] + share * (60 - start["gripper.pos"])
            seen = robot.get_observation()
            sent = robot.send_action(goal)
            assert sent == pytest.approx(goal)
            truth.append(arm.state().q_rad)
            due_s = max(due_s + 1 / _HZ, time.perf_counter())
            time.sleep(max(0.0, due_s - time.perf_counter()))
        time.sleep(0.3)
        seen, state = robot.get_observation(), arm.state()
        np.testing.assert_allclose(state.q_rad[:5], 0, atol=0.05)
        degrees = [seen[f"{joint}.pos"] for joint in JOINTS[:5]]
        np.testing.assert_allclose(degrees, np.rad2deg(state.q_rad[:5]), atol=0.5)
        assert seen["gripper.pos"] == pytest.approx(60, abs=2)
        assert abs(np.diff(truth, axis=0)).max() < 0.2
        assert state.peaks.dq_rad_s.max() < 3.0
        assert arm.info.bad == 0
        if with_camera:
            assert seen["front"].shape == robot.observation_features["front"]
            red, _, blue = np.moveaxis(seen["front"].astype(int), 2, 0)
            assert (red - blue > 100).mean() > 0.01
        robot.disconnect()
        time.sleep(0.1)
        assert not arm.state().powered.any()
