"""A smooth beginning: from where the robot stands to where the person's arm is."""

import numpy as np

from embodied.core.frames import Observation
from embodied.core.specs import DeviceSpec
from hal.teleop.jog import standing_at

_PEAK = 1.875
"""Greatest speed of a minimum-jerk profile, in units of its mean speed."""


class Alignment:
    """Turns targets that may lie anywhere into ones that begin where the robot stands.

    The difference at the takeover is taken off with a minimum-jerk profile (Flash and Hogan,
    1985), as long as `speed`, a share of the velocity limits, demands. Devices that are not
    position-controlled get the targets as they are.
    """

    def __init__(self, spec: DeviceSpec, speed: float) -> None:
        self._spec = spec
        self._speed = speed
        self.begin()

    def begin(self) -> None:
        """Forget where the robot was sent: the next target begins at its measured pose."""
        self._last_D: np.ndarray | None = None
        self.let_go()

    def let_go(self) -> None:
        """The person does not take part any more."""
        self._offset_D: np.ndarray | None = None
        self._ticks = 0
        self._done = 0

    @property
    def running(self) -> bool:
        """Whether the robot is still on its way to the person's pose."""
        return self._offset_D is not None and self._done <= self._ticks

    def target(self, wanted_D: np.ndarray, observation: Observation) -> np.ndarray:
        """The target [D] of the coming tick, given the person's pose [D]."""
        motion = self._spec.motion
        if motion is None:
            return wanted_D
        if self._offset_D is None:
            start_D = standing_at(self._last_D, observation[motion.measured], self._spec)
            self._offset_D = start_D - wanted_D
            allowed_D = self._speed * np.asarray(motion.velocity)
            time_s = _PEAK * float((np.abs(self._offset_D) / allowed_D).max())
            self._ticks, self._done = int(np.ceil(time_s * self._spec.tick_hz)), 0
        left = 0.0
        if self._done < self._ticks:
            s = self._done / self._ticks
            left = 1 - (10 * s**3 - 15 * s**4 + 6 * s**5)
        self._done += 1
        self._last_D = wanted_D + left * self._offset_D
        return self._last_D.astype(wanted_D.dtype)
