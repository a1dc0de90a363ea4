"""A position-controlled arm that follows its set points with a lag, and remembers them."""

import numpy as np

from embodied.core.frames import Observation
from embodied.core.protocols import Condition
from embodied.core.specs import ArraySpec, DeviceSpec, MotionSpec

FOLLOWER_SPEC = DeviceSpec(
    observation={"observation.state": ArraySpec((3,), unit="rad")},
    action=ArraySpec((3,), low=(-1.5, -1.0, 0.0), high=(1.5, 1.0, 2.0), unit="rad"),
    tick_hz=50.0,
    motion=MotionSpec(
        velocity=(2.0, 3.0, 1.0),
        acceleration=(15.0, 20.0, 10.0),
        jerk=(300.0, 500.0, 200.0),
        servo_hz=100.0,
    ),
)


class Follower:
    """Simulated: time is stepped. lag: share of the distance to the set point left after a step."""

    def __init__(self, start=(0.0, 0.0, 1.0), lag=0.2, spec=FOLLOWER_SPEC) -> None:
        self.spec = spec
        self.start = np.array(start, np.float64)
        self.lag = lag
        self.setpoints: list[np.ndarray] = []
        self.failing: Exception | None = None
        self.stuck = False
        self.unreadable = 0
        self.faulty = ""
        self.opened = 0

    def open(self) -> None:
        if self.failing is not None:
            raise self.failing
        if not self.opened:
            self.reset(0)
        self.opened += 1

    def reset(self, seed: int) -> None:
        self.position = self.start.copy()
        self.goal = self.position.copy()

    def sense(self) -> Observation:
        if self.unreadable:
            self.unreadable -= 1
            raise OSError("no answer")
        return {"observation.state": self.position.astype(np.float32)}

    def drive(self, action_D: np.ndarray) -> None:
        if self.failing is not None:
            raise self.failing
        self.setpoints.append(action_D.copy())
        self.goal = action_D

    def hold(self) -> None:
        self.goal = self.position.copy()

    def step_time(self) -> None:
        if not self.stuck:
            self.position = self.goal + self.lag * (self.position - self.goal)

    def condition(self) -> Condition:
        return Condition(fault=self.faulty)

    def signals(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing to release."""
