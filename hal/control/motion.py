"""Jerk-limited set points between the targets of successive ticks, always able to stop in time.

Each tick's trajectory is solved by ruckig (Berscheid and Kröger, RSS 2021) relative to a frame
that moves with the target, so that a steadily moving target is met, not chased. It is taken only
if a full stop from its end stays inside the limits; otherwise the stop that was proven in the tick
before is executed. By induction there is always a stop inside the limits.

Joints are few and come one tick at a time: plain lists are several times faster here than arrays.
"""

from collections import deque
from collections.abc import Sequence
from operator import add, sub
from typing import Any

import numpy as np
import ruckig  # pyright: ignore[reportMissingTypeStubs]

from embodied.core.errors import ConfigError, DeviceLostError, EmbodiedError
from embodied.core.specs import DeviceSpec
from hal.safety.config import Envelope, Workspace

_ruckig: Any = ruckig
_SOLVED = (_ruckig.Result.Working, _ruckig.Result.Finished)
_TARGET_SPEED = 0.8
_WINDOW = 2
_SLACK = 1e-6

_State = tuple[list[float], list[float], list[float]]
"""Position, velocity and acceleration of every joint."""


def _slope_weights(n: int) -> list[float]:
    """Weights of n equally spaced points for the slope of their regression line."""
    offsets = [k - (n - 1) / 2 for k in range(n)]
    return [offset / max(1e-9, sum(o * o for o in offsets)) for offset in offsets]


_SLOPES = {n: _slope_weights(n) for n in range(1, 2 * _WINDOW + 2)}


class Motion:
    """Commanded motion of one device's joints, stepped at servo_hz."""

    def __init__(self, spec: DeviceSpec, envelope: Envelope, workspace: Workspace | None) -> None:
        assert spec.motion is not None
        dofs = spec.action.size
        self.steps = round(spec.motion.servo_hz / spec.tick_hz)
        self._tick_s = 1.0 / spec.tick_hz
        self._step_s = 1.0 / spec.motion.servo_hz
        self._workspace = workspace
        self._solver = _ruckig.Ruckig(dofs)
        self._path = _ruckig.Trajectory(dofs)
        self._stop = _ruckig.Trajectory(dofs)
        self._proof = _ruckig.Trajectory(dofs)
        self._follow_input = _ruckig.InputParameter(dofs)
        self._follow_input.synchronization = _ruckig.Synchronization.No
        self._follow_input.target_position = [0.0] * dofs
        self._stop_input = _ruckig.InputParameter(dofs)
        self._stop_input.control_interface = _ruckig.ControlInterface.Velocity
        self._stop_input.synchronization = _ruckig.Synchronization.No
        self._past: deque[list[float]] = deque(maxlen=_WINDOW)
        self._zeros = [0.0] * dofs
        self._state: _State = (self._zeros, self._zeros, self._zeros)
        self._plan: deque[_State] = deque()
        self.guarded = ""
        self.limit(envelope)

    def limit(self, envelope: Envelope) -> None:
        """Use these limits from the next tick on; only for a standing robot, whose stop is proven
        under the old ones."""
        self._low: list[float] = envelope.low.tolist()
        self._high: list[float] = envelope.high.tolist()
        self._velocity: list[float] = envelope["velocity"].tolist()
        self._backward = [-v for v in self._velocity]
        self._target_most = [v * _TARGET_SPEED for v in self._velocity]
        for given in (self._follow_input, self._stop_input):
            given.max_acceleration = envelope["acceleration"].tolist()
            given.max_jerk = envelope["jerk"].tolist()
        self._stop_input.max_velocity = self._velocity
        longest = envelope["velocity"] / envelope["acceleration"]
        longest = longest + 2 * envelope["acceleration"] / envelope["jerk"]
        self.stopping_s = float(longest.max())
        """Longest time from any state to standstill."""

    @property
    def rest_D(self) -> np.ndarray:
        """Where the proven stop ends [D]."""
        return np.array(self._stop.at_time(self._stop.duration)[0])

    @property
    def position_D(self) -> np.ndarray:
        """Commanded position [D]."""
        return np.array(self._state[0])

    @property
    def still(self) -> bool:
        """Whether the commanded position does not move."""
        _, velocity, acceleration = self._state
        return not any(velocity) and not any(acceleration)

    def start(self, position_D: np.ndarray) -> None:
        """Stand still at a position; where it is beyond a limit, it may only move inwards."""
        if not np.isfinite(position_D).all():
            raise DeviceLostError(f"the measured position is {position_D}")
        self._state = (position_D.astype(np.float64).tolist(), self._zeros, self._zeros)
        self._past.clear()
        self._plan.clear()
        self._solve_stop(self._state, self._stop)

    def follow(self, target_D: np.ndarray, coming: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Plan one tick towards its target, given the next ones if known; the end point [D].

        guarded is set to the reason if the proven stop is taken instead.
        """
        self.guarded = ""
        target = self._inside(target_D)
        speed = self._target_speed(target, [c.tolist() for c in coming[:_WINDOW]])
        self._past.append(target)
        origin = [g - v * self._tick_s for g, v in zip(target, speed, strict=True)]
        position, velocity, acceleration = self._state
        given = self._follow_input
        given.current_position = list(map(sub, position, origin))
        given.current_velocity = list(map(sub, velocity, speed))
        given.current_acceleration = acceleration
        given.max_velocity = list(map(sub, self._velocity, speed))
        given.min_velocity = list(map(sub, self._backward, speed))
        if not self._solved(given, self._path):
            self.guarded = "no trajectory"
            return self._take_stop()
        plan: list[_State] = []
        for k in range(1, self.steps + 1):
            t_s = k * self._step_s
            relative = self._path.at_time(t_s)
            plan.append(
                (
                    [o + v * t_s + p for o, v, p in zip(origin, speed, relative[0], strict=True)],
                    list(map(add, speed, relative[1])),
                    relative[2],
                )
            )
        self.guarded = self._fault(plan)
        if self.guarded:
            return self._take_stop()
        self._plan = deque(plan)
        return np.array(plan[-1][0])

    def brake(self) -> np.ndarray:
        """Plan one tick of the fastest stop; the end point [D]."""
        self.guarded = ""
        return self._take_stop()

    def step(self) -> np.ndarray:
        """The next set point [D]; without a plan the present one."""
        if self._plan:
            self._state = self._plan.popleft()
            if not self._plan:
                self._stop, self._proof = self._proof, self._stop
        return np.array(self._state[0])

    def _inside(self, target_D: np.ndarray) -> list[float]:
        return list(map(min, map(max, target_D.tolist(), self._low), self._high))

    def _take_stop(self) -> np.ndarray:
        self._past.clear()
        self._plan = deque(self._stop.at_time(k * self._step_s) for k in range(1, self.steps + 1))
        self._solve_stop(self._plan[-1], self._proof)
        return np.array(self._plan[-1][0])

    def _target_speed(self, target: list[float], coming: list[list[float]]) -> list[float]:
        """Slope of a line through the targets around this tick, kept below the limit."""
        points = [*self._past, target, *coming]
        slope = self._zeros
        for weight, point in zip(_SLOPES[len(points)], points, strict=True):
            slope = [s + weight * x for s, x in zip(slope, point, strict=True)]
        speed: list[float] = []
        for most, s in zip(self._target_most, slope, strict=True):
            speed.append(min(max(s / self._tick_s, -most), most))
        return speed

    def _fault(self, plan: list[_State]) -> str:
        """Why the plan and a stop at its end are not allowed; proves that stop."""
        self._solve_stop(plan[-1], self._proof)
        extrema = self._proof.position_extrema
        lowest: list[float] = [e.min for e in extrema]
        highest: list[float] = [e.max for e in extrema]
        for point, _, _ in plan:
            lowest, highest = list(map(min, lowest, point)), list(map(max, highest, point))
        joints = zip(self._state[0], self._low, self._high, lowest, highest, strict=True)
        for at, low, high, least, most in joints:
            if least < min(low, at) - _SLACK or most > max(high, at) + _SLACK:
                return "position limit"
        if self._workspace is None:
            return ""
        allowed_m = self._workspace.outside_m(np.array(self._state[0]))
        points = [point for point, _, _ in plan]
        for k in range(1, int(np.ceil(self._proof.duration / self._step_s)) + 1):
            points.append(self._proof.at_time(k * self._step_s)[0])
        for point in points:
            if fault := self._workspace.fault(np.array(point), allowed_m):
                return fault
        return ""

    def _solve_stop(self, state: _State, to: Any) -> None:
        given = self._stop_input
        given.current_position, given.current_velocity, given.current_acceleration = state
        given.target_velocity = self._zeros
        given.target_acceleration = self._zeros
        if not self._solved(given, to):
            raise EmbodiedError(f"no stop from velocity {state[1]}, acceleration {state[2]}")

    def _solved(self, given: Any, to: Any) -> bool:
        try:
            return self._solver.calculate(given, to) in _SOLVED
        except _ruckig.RuckigError:
            return False


def check_envelope(envelope: Envelope, position_D: np.ndarray, where: str) -> None:
    """Raise ConfigError if a robot that stands at a position is outside of the limits."""
    outside = (position_D < envelope.low) | (position_D > envelope.high)
    if outside.any():
        k = int(np.argmax(outside))
        raise ConfigError(
            f"{where}: element {k} is at {position_D[k]:.3f}, outside of "
            f"[{envelope.low[k]:g}, {envelope.high[k]:g}]: move it inside first"
        )
