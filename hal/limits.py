"""What a device checks before it lets a command through."""

from dataclasses import dataclass

import numpy as np

from embodied.core.frames import Chunk, Rejection
from embodied.core.specs import DeviceSpec


@dataclass(frozen=True, slots=True)
class Checked:
    """Rows of a chunk that may be executed, from first_tick on, and why the others may not."""

    first_tick: int
    actions_HD: np.ndarray
    clipped: int
    late_ticks: int
    rejections: tuple[Rejection, ...]


class Limits:
    """Bounds, finiteness and freshness of commands; owned by the device, never by a policy."""

    def __init__(self, spec: DeviceSpec, max_obs_age_ticks: int) -> None:
        self._spec = spec.action
        self._low, self._high = spec.action.bounds()
        self._max_step = None if spec.max_step is None else np.asarray(spec.max_step, np.float64)
        self._max_obs_age_ticks = max_obs_age_ticks

    def check(self, chunk: Chunk, tick: int) -> Checked:
        """Clip what can be clipped, reject the rest. tick: the earliest still to be executed."""
        end = chunk.start_tick + len(chunk.actions_HD)
        fault = self._fault(chunk, tick)
        if fault is not None:
            return Checked(tick, self._none(), 0, 0, (Rejection(chunk.start_tick, end, fault),))
        rejections: list[Rejection] = []
        first = max(tick, chunk.start_tick)
        last = min(end, chunk.valid_until_tick + 1)
        if chunk.start_tick < tick:
            rejections.append(Rejection(chunk.start_tick, min(tick, end), "late: tick has passed"))
        if last < end:
            rejections.append(Rejection(last, end, f"valid only to tick {chunk.valid_until_tick}"))
        rows = chunk.actions_HD[first - chunk.start_tick : max(first, last) - chunk.start_tick]
        clipped = np.clip(rows, self._low, self._high).astype(self._spec.dtype)
        late = max(0, min(tick, end) - chunk.start_tick)
        count = int((clipped != rows).sum())
        return Checked(first, clipped, count, late, tuple(rejections))

    def slew(self, action_D: np.ndarray, previous_D: np.ndarray | None) -> np.ndarray:
        """Limit the change from the action executed one tick before (max_step of the spec)."""
        if self._max_step is None or previous_D is None:
            return action_D
        step = np.clip(action_D - previous_D, -self._max_step, self._max_step)
        return (previous_D + step).astype(self._spec.dtype)

    def _fault(self, chunk: Chunk, tick: int) -> str | None:
        actions = chunk.actions_HD
        if actions.ndim != 2 or actions.shape[1:] != self._spec.shape or not len(actions):
            return f"actions have shape {actions.shape}; [H, {self._spec.shape[0]}] is accepted"
        if not np.issubdtype(actions.dtype, np.floating):
            return f"actions have dtype {actions.dtype}; floating point is accepted"
        if not np.isfinite(actions).all():
            return "actions hold NaN or infinity"
        if chunk.valid_until_tick < tick:
            return f"stale: valid until tick {chunk.valid_until_tick}, now {tick}"
        if tick - chunk.obs_tick > self._max_obs_age_ticks:
            age = tick - chunk.obs_tick
            return f"stale: observation is {age} ticks old, {self._max_obs_age_ticks} are allowed"
        if chunk.obs_tick > tick:
            return f"observation tick {chunk.obs_tick} lies in the future (now {tick})"
        return None

    def _none(self) -> np.ndarray:
        return np.zeros((0, *self._spec.shape), self._spec.dtype)
