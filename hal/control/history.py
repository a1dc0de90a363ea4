"""The frames that a device has closed, kept for those who read between decisions."""

from collections import deque

from embodied.core.errors import DeviceLostError
from embodied.core.frames import Frame


class History:
    """Closed frames in order of tick, the newest `capacity` of them, from first_tick on."""

    def __init__(self, capacity: int, name: str, first_tick: int = 0) -> None:
        self._closed: deque[Frame] = deque(maxlen=capacity)
        self._evicted_tick = first_tick - 1
        self._name = name

    def append(self, frame: Frame) -> None:
        """Keep a closed frame."""
        if len(self._closed) == self._closed.maxlen:
            self._evicted_tick = self._closed[0].tick
        self._closed.append(frame)

    def since(self, tick: int, newest: Frame) -> list[Frame]:
        """Frames from a tick on, with the open one. Raises DeviceLostError if some are gone."""
        if tick <= self._evicted_tick and self._evicted_tick >= 0:
            raise DeviceLostError(
                f"{self._name}: frames up to tick {self._evicted_tick} are gone "
                f"(asked for {tick}); read more often or raise frame_capacity"
            )
        kept: list[Frame] = []
        for frame in reversed(self._closed):
            if frame.tick < tick:
                break
            kept.append(frame)
        return [*reversed(kept), newest] if newest.tick >= tick else []
