"""What a device observes in a tick: its driver's reading and the cameras' newest pictures."""

import numpy as np

from embodied.core.clock import Clock
from embodied.core.errors import DeviceLostError
from embodied.core.frames import Frame, Observation
from embodied.core.protocols import Condition, Driver, Monitored, SimulatedDriver
from embodied.core.specs import DeviceSpec
from hal.cameras import Cameras


class Senses:
    """Reads a driver; a few failed reads in a row are bridged by the last observation.

    failed: reads that have failed in a row. error: what the last one of them said.
    """

    def __init__(
        self, driver: Driver, cameras: Cameras, spec: DeviceSpec, clock: Clock, lost_after: int
    ) -> None:
        self._driver = driver
        self._cameras = cameras
        self._spec = spec
        self._clock = clock
        self._lost_after = lost_after
        # isinstance of a protocol costs more than the rest of a tick: once.
        self._signals = driver.signals if isinstance(driver, SimulatedDriver) else None
        self._condition = driver.condition if isinstance(driver, Monitored) else None
        self._last: Observation = {}
        self._last_ns = 0
        self.failed = 0
        self.error = ""

    def begin(self) -> Observation:
        """The first reading; whatever it raises is passed on."""
        self.failed = 0
        self._sense()
        return self._last

    def _sense(self) -> None:
        observation = self._driver.sense()
        for key, value in observation.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise DeviceLostError(f"{key} is not finite: {value}")
        self._last, self._last_ns = observation, self._clock.now_ns()

    def read(self) -> Observation:
        """A new reading, or the last one, whose age its time tells. Raises what the driver raised
        when that has happened too often."""
        try:
            self._sense()
        except Exception as error:
            self.failed += 1
            self.error = f"{type(error).__name__}: {error}"
            if self.failed >= self._lost_after:
                raise
        else:
            self.failed = 0
        return self._last

    def condition(self) -> Condition | None:
        """How the robot is, if its driver knows."""
        return None if self._condition is None else self._condition()

    def frame(self, tick: int, observation: Observation) -> Frame:
        """An open frame. Raises SpecError if it is not as declared."""
        observation = observation.copy()
        times_ns = dict.fromkeys(observation, self._last_ns)
        if self._cameras:
            pictures, taken_ns = self._cameras.latest()
            observation.update(pictures)
            times_ns.update(taken_ns)
        self._spec.check(observation)
        signals = {} if self._signals is None else self._signals()
        return Frame(tick, observation, times_ns, signals=signals)
