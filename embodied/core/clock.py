"""Monotonic time, real or virtual. Control code never reads the wall clock."""

import time
from typing import Protocol


class Clock(Protocol):
    """Nanoseconds that never run backwards."""

    def now_ns(self) -> int:
        """Present time."""
        ...

    def sleep_until(self, t_ns: int) -> None:
        """Return at or after t_ns."""
        ...


class RealClock:
    """The host's monotonic clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep_until(self, t_ns: int) -> None:
        while (remaining_ns := t_ns - time.monotonic_ns()) > 0:
            time.sleep(remaining_ns / 1e9)


class VirtualClock:
    """Time that passes only when it is waited for.

    speed: greatest ratio of virtual to real time, 0 for as fast as possible. With speed 1 a
    simulated robot takes as long as a real one, yet never runs on while its policy thinks.
    """

    def __init__(self, speed: float = 0.0) -> None:
        if speed < 0:
            raise ValueError(f"speed is {speed}; it must be 0 (unlimited) or positive")
        self._now_ns = 0
        self._speed = speed
        self._real_ns = time.monotonic_ns()

    def now_ns(self) -> int:
        return self._now_ns

    def sleep_until(self, t_ns: int) -> None:
        step_ns = max(0, t_ns - self._now_ns)
        self._now_ns += step_ns
        if self._speed:
            # Slack that was lost to thinking is not made up for by a burst.
            due_ns = max(self._real_ns + int(step_ns / self._speed), time.monotonic_ns() - step_ns)
            RealClock().sleep_until(due_ns)
            self._real_ns = due_ns
