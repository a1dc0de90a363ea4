"""A point in the plane that moves to its goal: the smallest whole task family.

It has everything a family needs and nothing else, steps in microseconds, and so serves as the
model for new ones and for tests of whole runs.
"""

from collections.abc import Mapping

import msgspec
import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.frames import Observation
from embodied.core.seeds import make_rng
from embodied.core.specs import ArraySpec, DeviceSpec
from embodied.core.tasks import Expert
from sim.family import SimConfig, SimTask
from sim.pictures import Pictures

_TICK_HZ = 20.0
_HORIZON = 80
_STEP_M = 0.05
_REACHED_M = 0.05
_CAMERA = "top"


class PointMassFamily:
    """The one task "pointmass"."""

    def names(self) -> tuple[str, ...]:
        return ("pointmass",)

    def make_task(self, task: str, config: SimConfig) -> SimTask:
        return SimTask("pointmass", "move to the goal", config.horizon or _HORIZON)

    def make_driver(self, task: str, config: SimConfig) -> "PointMassDriver":
        if set(config.cameras) - {_CAMERA}:
            cameras = list(config.cameras)
            raise ConfigError(f"sim.cameras is {cameras}; pointmass has only '{_CAMERA}'")
        return PointMassDriver(config)

    def make_expert(self, task: str, spec: DeviceSpec) -> Expert:
        return PointMassExpert()


class PointMassDriver:
    """observation.state [2]: position (m); observation.environment_state [2]: goal (m); the camera
    "top" sees both.

    action [2]: displacement in units of 5 cm, once per tick at 20 Hz. Reward: minus the distance
    to the goal (m). Success: within 5 cm of it.
    """

    spec = DeviceSpec(
        observation={
            "observation.state": ArraySpec((2,), unit="m", names=("x", "y")),
            "observation.environment_state": ArraySpec((2,), unit="m", names=("goal_x", "goal_y")),
        },
        action=ArraySpec((2,), low=(-1.0,), high=(1.0,), names=("dx", "dy")),
        tick_hz=_TICK_HZ,
        signals=("reward", "success"),
    )

    def __init__(self, config: SimConfig) -> None:
        self._pictures = Pictures(config, lambda _, width, height: self.render(width, height))
        pictures = config.picture_specs(_TICK_HZ)
        self.spec = msgspec.structs.replace(
            self.spec, observation={**self.spec.observation, **pictures}
        )

    def open(self) -> None:
        self.reset(0)

    def reset(self, seed: int) -> None:
        self._pictures.begin()
        rng = make_rng(seed, "pointmass")
        self._position, self._goal = rng.uniform(-1, 1, (2, 2))
        self._action_D = np.zeros(2)

    def sense(self) -> Observation:
        return {
            "observation.state": self._position.astype(np.float32),
            "observation.environment_state": self._goal.astype(np.float32),
            **self._pictures.observe(),
        }

    def drive(self, action_D: np.ndarray) -> None:
        self._action_D = action_D.astype(np.float64)

    def hold(self) -> None:
        self._action_D = np.zeros(2)

    def step_time(self) -> None:
        self._pictures.step()
        self._position = self._position + _STEP_M * self._action_D

    def signals(self) -> dict[str, float]:
        distance_m = float(np.linalg.norm(self._goal - self._position))
        return {"reward": -distance_m, "success": float(distance_m < _REACHED_M)}

    def render(self, width: int, height: int) -> np.ndarray:
        picture = np.full((height, width, 3), 255, np.uint8)
        for (x, y), colour in ((self._goal, (120, 200, 120)), (self._position, (60, 90, 200))):
            column, row = ((np.array([x, -y]) + 1.5) / 3 * [width, height]).astype(int)
            reach = max(2, width // 24)
            rows = slice(max(0, row - reach), row + reach)
            picture[rows, max(0, column - reach) : column + reach] = colour
        return picture

    def close(self) -> None:
        """Nothing to release."""


class PointMassExpert:
    """Straight to the goal, slower near it."""

    def reset(self) -> None:
        """It has no state."""

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        offset_m = observation["observation.environment_state"] - observation["observation.state"]
        return np.clip(offset_m / _STEP_M, -1.0, 1.0).astype(np.float32)
