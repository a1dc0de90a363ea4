"""The SO-101 in virtual time: the same spec as the real arm's, without bus and servos."""

from collections.abc import Callable

import msgspec
import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.frames import Observation
from embodied.core.seeds import make_rng
from hal.drivers.so101_arm import HIGH_RAD, LOW_RAD, SPEC
from sim.family import SimConfig
from sim.pictures import Pictures
from sim.rendering import Cameras
from sim.so101.arm import QUANTUM_S, Arm, N

START_RAD = np.array([0.0, -1.1, 0.9, 0.2, 0.0, 0.4])
SPREAD_RAD = 0.25
"""Start poses: uniform around the first, clear of the floor."""

_CAMERA = "front"


class SimulatedSO101:
    """observation.state [6]: joint angles (rad). action [6]: goals (rad), one per servo step.

    `step_time` lets one servo step pass, 1 / spec.motion.servo_hz seconds: a device calls `drive`
    and `step_time` once for each of a tick's set points. `reset` starts within SPREAD_RAD of
    START_RAD, at rest.
    """

    def __init__(self, config: SimConfig | None = None) -> None:
        self._config = config or SimConfig()
        self._pictures = Pictures(self._config, self.picture)
        observation = {**SPEC.observation, **self._config.picture_specs(SPEC.tick_hz)}
        self.spec = msgspec.structs.replace(SPEC, observation=observation)
        servo_hz = SPEC.tick_hz if SPEC.motion is None else SPEC.motion.servo_hz
        self._quanta = round(1 / (servo_hz * QUANTUM_S))
        if abs(self._quanta * QUANTUM_S * servo_hz - 1) > 1e-9:
            raise ConfigError(
                f"servo_hz is {servo_hz}; a period must be a multiple of {QUANTUM_S} s"
            )
        self._arm: Arm | None = None
        self._cameras: Cameras | None = None

    def open(self) -> None:
        """Load the model."""
        self._arm = Arm()
        for camera in self._config.cameras:
            self._open_cameras().check(camera)
        self.reset(0)

    @property
    def arm(self) -> Arm:
        """The arm's physics, once open."""
        if self._arm is None:
            raise ConfigError("the simulated SO-101 is not open")
        return self._arm

    def reset(self, seed: int) -> None:
        """Go to the start pose of `seed`, at rest, holding it."""
        self._pictures.begin()
        rng = make_rng(seed, "so101", "start")
        start_rad = START_RAD + rng.uniform(-SPREAD_RAD, SPREAD_RAD, N)
        self.arm.place(np.clip(start_rad, LOW_RAD, HIGH_RAD))

    def sense(self) -> Observation:
        """Joint angles, and pictures if the configuration names cameras."""
        observation = {"observation.state": self.arm.data.qpos[:N].astype(np.float32)}
        return {**observation, **self._pictures.observe()}

    def drive(self, action_D: np.ndarray) -> None:
        """Goals for the coming servo step and until others come."""
        self.arm.drive(action_D)

    def hold(self) -> None:
        """The measured angles become the goals."""
        self.arm.drive(self.arm.data.qpos[:N])

    def step_time(self) -> None:
        """Let one servo step pass."""
        self._pictures.step()
        self.arm.advance(self._quanta)

    def signals(self) -> dict[str, float]:
        """None are declared."""
        return {}

    def render(self, width: int, height: int) -> np.ndarray:
        """Picture of the camera "front"."""
        return self.picture(_CAMERA, width, height)

    def snapshot(self, width: int, height: int) -> Callable[[], np.ndarray]:
        """The same as it is now, to be drawn later."""
        return self._open_cameras().snapshot(self.arm.data, _CAMERA, width, height)

    def picture(self, camera: str, width: int, height: int) -> np.ndarray:
        """Picture [height, width, 3], uint8; raises ConfigError for an unknown camera."""
        cameras = self._open_cameras()
        cameras.check(camera)
        return cameras.render(self.arm.data, camera, width, height)

    def _open_cameras(self) -> Cameras:
        if self._cameras is None:
            self._cameras = Cameras(self.arm.model, shadows=self._config.shadows)
        return self._cameras

    def close(self) -> None:
        """Free the pictures' OpenGL contexts."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None
        self._arm = None
