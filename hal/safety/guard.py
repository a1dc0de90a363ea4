"""What ends a robot's motion whatever its holder says: silence, missed deadlines, the latch."""

from pathlib import Path

from hal.safety.config import SafetyConfig
from hal.safety.latch import Latch


class Guard:
    """Watches one device. halted: why it is latched, "" if it is not."""

    def __init__(self, safety: SafetyConfig, latches: Path | None, device_id: str) -> None:
        self._safety = safety
        self._latch = Latch(latches, device_id)
        self._heard_ns = 0
        self._late_score = 0

    @property
    def halted(self) -> str:
        """Why the device is halted, "" if it is not."""
        return self._latch.reason

    def look(self) -> None:
        """Look whether a person has set or removed a latch."""
        self._latch.look()

    def halt(self, reason: str) -> None:
        """Latch the device's own halt."""
        self._latch.set(reason)

    def clear(self) -> None:
        """Release the device's own halt."""
        self._latch.clear()
        self._late_score = 0

    def heard(self, now_ns: int) -> None:
        """The holder has given a sign of life."""
        self._heard_ns = now_ns

    def silence(self, now_ns: int, stood_still_s: float) -> str:
        """Why the holder counts as gone, "" if it does not.

        stood_still_s: for how long this device itself has just made no step; signs of life that
        waited meanwhile say nothing.
        """
        limit_s = self._safety.heartbeat_s
        if limit_s is None:
            return ""
        if stood_still_s > limit_s:
            return f"this host stood still for {stood_still_s:.2f} s"
        silent_s = (now_ns - self._heard_ns) / 1e9
        return f"holder silent for {silent_s:.2f} s" if silent_s > limit_s else ""

    def tick(self, *, late: bool) -> str:
        """Why the deadlines are missed too often, "" if they are not.

        `overruns` late ticks in a row are too many, and twice as many of which two thirds are.
        """
        self._late_score = self._late_score + 2 if late else max(0, self._late_score - 1)
        if self._safety.overruns and self._late_score >= 2 * self._safety.overruns:
            return f"deadlines missed in {self._late_score // 2} ticks and more"
        return ""
