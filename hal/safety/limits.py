"""What a device checks before it lets a command through."""

from dataclasses import dataclass

import numpy as np

from embodied.core.frames import Chunk, Rejection, RejectionCode
from embodied.core.specs import DeviceSpec
from hal.safety.config import Envelope, SafetyConfig, Workspace

_TINY = float(np.finfo(np.float32).tiny)
"""Subnormal numbers are commanded as zero."""


def end_tick(chunk: Chunk) -> int:
    """The tick after a chunk's last action."""
    return chunk.start_tick + (len(chunk.actions_HD) if chunk.actions_HD.ndim else 0)


@dataclass(frozen=True, slots=True)
class Checked:
    """Rows of a chunk that may be executed, from first_tick on, and why the others may not."""

    first_tick: int
    actions_HD: np.ndarray
    clipped: int
    late_ticks: int
    rejections: tuple[Rejection, ...]


class Limits:
    """Form, freshness, bounds and place of commands; owned by the device, never by a policy."""

    def __init__(self, spec: DeviceSpec, safety: SafetyConfig, workspace: Workspace | None) -> None:
        self._spec = spec.action
        self._dtype = np.dtype(spec.action.dtype)
        self._envelope: Envelope | None = None
        self._low = self._high = np.zeros(0, self._dtype)
        self._workspace = workspace
        self._max_step = None if spec.max_step is None else np.asarray(spec.max_step, np.float64)
        self._max_obs_age_ticks = round(safety.max_obs_age_s * spec.tick_hz)
        self._max_ahead_ticks = round(safety.max_ahead_s * spec.tick_hz)
        self._tolerance = safety.start_tolerance

    def check(
        self, chunk: Chunk, tick: int, envelope: Envelope, places: tuple[np.ndarray, ...]
    ) -> Checked:
        """Clip what can be clipped, reject the rest. tick: the earliest still to be executed.

        places: where the robot is; from outside of its workspace it may only come nearer.
        """
        end = end_tick(chunk)
        fault = self._fault(chunk, tick)
        if fault is not None:
            rejection = Rejection(chunk.start_tick, end, *fault)
            return Checked(tick, self._none(), 0, 0, (rejection,))
        rejections: list[Rejection] = []
        first = max(tick, chunk.start_tick)
        last = min(end, chunk.valid_until_tick + 1)
        if chunk.start_tick < tick:
            late_end = min(tick, end)
            rejections.append(
                Rejection(chunk.start_tick, late_end, "late", "late: tick has passed")
            )
        if last < end:
            reason = f"valid only to tick {chunk.valid_until_tick}"
            rejections.append(Rejection(last, end, "expired", reason))
        rows = chunk.actions_HD[first - chunk.start_tick : max(first, last) - chunk.start_tick]
        inside = self._clipped(rows, envelope)
        count = int(np.count_nonzero(inside != rows))
        inside[np.abs(inside) < _TINY] = 0.0
        if self._workspace is not None:
            allowed_m = max((self._workspace.outside_m(place) for place in places), default=0.0)
            for k, row in enumerate(inside):
                if outside := self._workspace.fault(row, allowed_m):
                    rejections.append(Rejection(first + k, last, "workspace", outside))
                    inside = inside[:k]
                    break
        late = max(0, min(tick, end) - chunk.start_tick)
        return Checked(first, inside, count, late, tuple(rejections))

    def _clipped(self, rows: np.ndarray, envelope: Envelope) -> np.ndarray:
        """A copy within the bounds, in the action's dtype; in one kind of numbers if it has that
        already, which gives the same and takes half the time."""
        if rows.dtype != self._dtype:
            inside = np.minimum(np.maximum(rows, envelope.low), envelope.high)
            return inside.astype(self._dtype)
        if envelope is not self._envelope:
            self._envelope = envelope
            self._low, self._high = (x.astype(self._dtype) for x in (envelope.low, envelope.high))
        inside = np.maximum(rows, self._low)
        return np.minimum(inside, self._high, out=inside)

    def start_fault(self, first_D: np.ndarray, *places_D: np.ndarray) -> str:
        """Why a first command is too far from where the robot is; "" if it is not."""
        if self._tolerance is None:
            return ""
        distance = min(float(np.abs(first_D - place).max()) for place in places_D)
        if distance <= self._tolerance:
            return ""
        return (
            f"first command is {distance:.3f} from where the robot is; {self._tolerance:g} is "
            "allowed: begin with its measured position"
        )

    def slew(self, action_D: np.ndarray, previous_D: np.ndarray | None) -> np.ndarray:
        """Limit the change from the action executed one tick before (max_step of the spec)."""
        if self._max_step is None or previous_D is None:
            return action_D
        step = np.clip(action_D - previous_D, -self._max_step, self._max_step)
        return (previous_D + step).astype(self._spec.dtype)

    def _fault(self, chunk: Chunk, tick: int) -> tuple[RejectionCode, str] | None:
        actions = chunk.actions_HD
        if actions.ndim != 2 or actions.shape[1:] != self._spec.shape or not len(actions):
            size = self._spec.shape[0]
            return "shape", f"actions have shape {actions.shape}; [H, {size}] is accepted"
        if actions.dtype.kind != "f":
            return "dtype", f"actions have dtype {actions.dtype}; floating point is accepted"
        if np.count_nonzero(np.isfinite(actions)) < actions.size:
            return "nonfinite", "actions hold NaN or infinity"
        if chunk.valid_until_tick < tick:
            return "expired", f"stale: valid until tick {chunk.valid_until_tick}, now {tick}"
        age = tick - chunk.obs_tick
        if age > self._max_obs_age_ticks:
            limit = self._max_obs_age_ticks
            return "stale", f"stale: observation is {age} ticks old, {limit} are allowed"
        if chunk.obs_tick > tick:
            return "future", f"observation tick {chunk.obs_tick} lies in the future (now {tick})"
        ahead = chunk.start_tick + len(actions) - tick
        if ahead > self._max_ahead_ticks:
            return "far", f"reaches {ahead} ticks ahead; {self._max_ahead_ticks} are allowed"
        return None

    def _none(self) -> np.ndarray:
        return np.zeros((0, *self._spec.shape), self._spec.dtype)
