"""From "this joint, that way" to actions: what a keyboard and a gamepad have in common."""

import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.frames import Observation
from embodied.core.specs import DeviceSpec

_LEAD_S = 0.2
_STANDING_S = 0.03


def standing_at(last_D: np.ndarray | None, measured_D: np.ndarray, spec: DeviceSpec) -> np.ndarray:
    """Where a position-controlled robot stands: its last target, if it still is there.

    Under gravity the measured pose lies a little below its target; beginning with it each time
    would let the arm sink.
    """
    assert spec.motion is not None
    near_D = _STANDING_S * np.asarray(spec.motion.velocity)
    if last_D is not None and (np.abs(last_D - measured_D) <= near_D).all():
        return last_D
    return measured_D.astype(np.float64)


class Jog:
    """Moves the action's elements [D] at rates of -1 to 1.

    Position-controlled devices: the target moves by rate × step_D a tick, from the measured pose
    on, and never gets far ahead of the robot. Others: the rate itself is the action, `push` of
    half its range at most.
    """

    def __init__(self, spec: DeviceSpec, step_D: np.ndarray, push: float) -> None:
        if not spec.action.bounded:
            raise ConfigError("the device's action has no bounds: it cannot be moved by hand")
        self._spec = spec
        self._low_D, self._high_D = spec.action.bounds()
        self._push = push
        self._step_D = step_D
        self._target_D: np.ndarray | None = None
        self._moving = False

    def begin(self) -> None:
        """Forget where it was: the next action is the measured pose."""
        self._target_D = None
        self._moving = False

    def rest(self) -> None:
        """Note that nobody moves it now."""
        self._moving = False

    def act(self, rates_D: np.ndarray, observation: Observation) -> np.ndarray:
        """The action [D] of the coming tick; the first one is where the robot stands."""
        spec, motion = self._spec, self._spec.motion
        dtype = spec.action.dtype
        if motion is None:
            middle_D, half_D = (self._low_D + self._high_D) / 2, (self._high_D - self._low_D) / 2
            return (middle_D + self._push * rates_D * half_D).astype(dtype)
        measured_D = observation[motion.measured].astype(np.float64)
        if not self._moving or self._target_D is None:
            target_D = standing_at(self._target_D, measured_D, spec)
            self._moving = True
        else:
            lead_D = _LEAD_S * np.asarray(motion.velocity)
            ahead_D = self._target_D + rates_D * self._step_D
            kept_D = np.clip(ahead_D, measured_D - lead_D, measured_D + lead_D)
            target_D = np.where(rates_D == 0, self._target_D, kept_D)
        self._target_D = np.clip(target_D, self._low_D, self._high_D)
        return self._target_D.astype(dtype)
