"""Measured motion against the limits: what a robot does, whatever it was told."""

import numpy as np

from embodied.core.specs import DeviceSpec
from hal.safety import Envelope, SafetyConfig


class Violations:
    """Counts ticks in a row in which the measured position, velocity or error is out of bounds."""

    def __init__(self, spec: DeviceSpec, safety: SafetyConfig) -> None:
        self._safety = safety
        self._tick_s = 1.0 / spec.tick_hz
        self._names = spec.action.names or tuple(map(str, range(spec.action.size)))
        self._last_D: np.ndarray | None = None
        self._in_a_row = 0

    def clear(self) -> None:
        """Begin to count anew."""
        self._in_a_row = 0
        self._last_D = None

    def check(self, measured_D: np.ndarray, commanded_D: np.ndarray, envelope: Envelope) -> str:
        """Take one tick's measurement; the violation once it has lasted, "" otherwise."""
        fault = self._fault(measured_D, commanded_D, envelope)
        self._last_D = measured_D
        self._in_a_row = self._in_a_row + 1 if fault else 0
        return fault if self._in_a_row >= self._safety.violations else ""

    def _fault(self, measured_D: np.ndarray, commanded_D: np.ndarray, envelope: Envelope) -> str:
        margin = self._safety.position_margin
        beyond = np.maximum(envelope.low - margin - measured_D, measured_D - envelope.high - margin)
        if (beyond > 0).any():
            k = int(np.argmax(beyond))
            return f"{self._names[k]} measured at {measured_D[k]:.3f}, beyond its limits"
        if self._last_D is not None:
            velocity_D = np.abs(measured_D - self._last_D) / self._tick_s
            excess = velocity_D - self._safety.velocity_factor * envelope["velocity"]
            if (excess > 0).any():
                k = int(np.argmax(excess))
                return f"{self._names[k]} measured at {velocity_D[k]:.2f} per s, too fast"
        limit = self._safety.tracking_error
        if limit is not None:
            error_D = np.abs(measured_D - commanded_D)
            if (error_D > limit).any():
                k = int(np.argmax(error_D))
                return f"{self._names[k]} is {error_D[k]:.3f} from where it was commanded"
        return ""
