"""The point mass with a memory of what it was told, and ways to fail."""

import numpy as np

from embodied.core.frames import Observation
from embodied.core.specs import DeviceSpec
from sim.family import SimConfig
from sim.pointmass import PointMassDriver

POINT_SPEC = PointMassDriver.spec


class PointDriver(PointMassDriver):
    """Remembers commands; fails at a tick if asked to."""

    def __init__(self, spec: DeviceSpec = POINT_SPEC) -> None:
        super().__init__(SimConfig())
        self.spec = spec
        self.driven: list[np.ndarray] = []
        self.held = 0
        self.fail_at_tick: int | None = None
        self._ticks = 0

    def drive(self, action_D: np.ndarray) -> None:
        if self.fail_at_tick is not None and self._ticks >= self.fail_at_tick:
            raise OSError("bus timed out")
        super().drive(action_D)
        self.driven.append(action_D.copy())

    def hold(self) -> None:
        super().hold()
        self.held += 1

    def step_time(self) -> None:
        super().step_time()
        self._ticks += 1


class RealPointDriver:
    """The same point as a robot whose time cannot be stepped."""

    spec = POINT_SPEC

    def __init__(self) -> None:
        self._point = PointDriver()
        self.driven = self._point.driven

    def open(self) -> None:
        self._point.open()

    def sense(self) -> Observation:
        return self._point.sense()

    def drive(self, action_D: np.ndarray) -> None:
        self._point.drive(action_D)
        self._point.step_time()

    def hold(self) -> None:
        self._point.hold()

    def close(self) -> None:
        self._point.close()
