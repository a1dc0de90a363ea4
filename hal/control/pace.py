"""Keeping time: when the next servo step is due, and whether it came too late."""

from embodied.core.clock import Clock

_TOLERANCE = 0.5
_LEAST_TOLERANCE_NS = 2_000_000


class Pace:
    """Ticks of equal steps on a clock. A step is late by more than half of its period (at
    least 2 ms); time then starts anew, so that no two set points follow each other in haste."""

    def __init__(self, clock: Clock, tick_hz: float, steps: int, *, realtime: bool) -> None:
        self._clock = clock
        self._period_ns = round(1e9 / (tick_hz * steps))
        self._tolerance_ns = max(_LEAST_TOLERANCE_NS, round(_TOLERANCE * self._period_ns))
        self._steps = steps
        self._realtime = realtime
        self._next_ns = 0
        self._step = 0
        self._late = False

    def begin(self) -> None:
        """Now is the start of a tick."""
        self._next_ns = self._clock.now_ns()
        self._step = 0
        self._late = False

    @property
    def first(self) -> bool:
        """Whether the coming step is its tick's first."""
        return self._step == 0

    @property
    def last(self) -> bool:
        """Whether the coming step is its tick's last."""
        return self._step == self._steps - 1

    def wait(self) -> float:
        """Return when the step is due: 0, or how late it is in seconds."""
        self._next_ns += self._period_ns
        if self._realtime:
            late_ns = self._clock.now_ns() - self._next_ns
            if late_ns > self._tolerance_ns:
                self._next_ns += late_ns
                self._late = True
                return late_ns / 1e9
        self._clock.sleep_until(self._next_ns)
        return 0.0

    def stepped(self) -> None:
        """The step is done."""
        self._step = (self._step + 1) % self._steps

    def turn(self) -> bool:
        """The tick is over; whether a step of it was late."""
        late, self._late = self._late, False
        return late
