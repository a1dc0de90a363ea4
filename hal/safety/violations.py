"""Measured motion against the limits: what a robot does, whatever it was told."""

import numpy as np

from embodied.core.specs import DeviceSpec
from hal.safety.config import Envelope, SafetyConfig


class Violations:
    """Counts ticks in a row in which the measured position, velocity or error is out of bounds."""

    def __init__(self, spec: DeviceSpec, safety: SafetyConfig) -> None:
        self._safety = safety
        self._tick_s = 1.0 / spec.tick_hz
        self._names = spec.action.names or tuple(map(str, range(spec.action.size)))
        self._last: list[float] | None = None
        self._in_a_row = 0
        self._margin = safety.position_margin
        self._envelope: Envelope | None = None
        self._limits: list[tuple[str, float, float, float]] = []

    def clear(self) -> None:
        """Begin to count anew."""
        self._in_a_row = 0
        self._last = None

    def begin(self, measured_D: np.ndarray, envelope: Envelope) -> None:
        """Begin to count anew where the robot is: from outside of its limits it may come in."""
        self.clear()
        beyond_D = np.maximum(envelope.low - measured_D, measured_D - envelope.high)
        excess = max(0.0, float(beyond_D.max()))
        self._margin = self._safety.position_margin + excess

    def check(self, measured_D: np.ndarray, commanded_D: np.ndarray, envelope: Envelope) -> str:
        """Take one tick's measurement; the violation once it has lasted, "" otherwise."""
        fault = self._fault(measured_D, commanded_D, envelope)
        self._in_a_row = self._in_a_row + 1 if fault else 0
        return fault if self._in_a_row >= self._safety.violations else ""

    def _fault(self, measured_D: np.ndarray, commanded_D: np.ndarray, envelope: Envelope) -> str:
        if envelope is not self._envelope:
            self._take(envelope)
        margin, most_error = self._margin, self._safety.tracking_error
        measured = measured_D.tolist()
        last = measured if self._last is None else self._last
        self._last = measured
        joints = zip(self._limits, measured, last, commanded_D.tolist(), strict=True)
        for (name, low, high, fastest), at, before, commanded in joints:
            if not low - margin <= at <= high + margin:
                return f"{name} measured at {at:.3f}, beyond its limits"
            speed = abs(at - before) / self._tick_s
            if speed > fastest:
                return f"{name} measured at {speed:.2f} per s, too fast"
            if most_error is not None and abs(at - commanded) > most_error:
                return f"{name} is {abs(at - commanded):.3f} from where it was commanded"
        return ""

    def _take(self, envelope: Envelope) -> None:
        """Name, lowest, highest and greatest speed of every joint: plain numbers are faster."""
        self._envelope = envelope
        fastest_D = self._safety.velocity_factor * envelope["velocity"]
        bounds = (envelope.low.tolist(), envelope.high.tolist(), fastest_D.tolist())
        self._limits = list(zip(self._names, *bounds, strict=True))
