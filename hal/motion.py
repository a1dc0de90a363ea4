"""Jerk-limited set points between the targets of successive ticks, always able to stop in time.

D: joints. Each tick's trajectory is solved by ruckig (Berscheid and Kröger, RSS 2021) relative
to a frame that moves with the target, so that a steadily moving target is met, not chased. It is
taken only if a full stop from its end stays inside the limits; otherwise the stop that was proven
in the tick before is executed. By induction there is always a stop inside the limits.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import ruckig  # pyright: ignore[reportMissingTypeStubs]

from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.specs import DeviceSpec
from hal.safety import Envelope, Workspace

_ruckig: Any = ruckig
_State = tuple[np.ndarray, np.ndarray, np.ndarray]

_SOLVED = (_ruckig.Result.Working, _ruckig.Result.Finished)
_TARGET_SPEED = 0.8
_WINDOW = 2
_SLACK = 1e-6


class Motion:
    """Commanded position, velocity and acceleration [D] of one device, stepped at servo_hz."""

    def __init__(self, spec: DeviceSpec, envelope: Envelope, workspace: Workspace | None) -> None:
        assert spec.motion is not None
        self._dofs = spec.action.size
        self.steps = round(spec.motion.servo_hz / spec.tick_hz)
        self._tick_s = 1.0 / spec.tick_hz
        self._step_s = 1.0 / spec.motion.servo_hz
        self._workspace = workspace
        self._solver = _ruckig.Ruckig(self._dofs)
        self._path = _ruckig.Trajectory(self._dofs)
        self._stop = _ruckig.Trajectory(self._dofs)
        self._proof = _ruckig.Trajectory(self._dofs)
        self._follow_input = _ruckig.InputParameter(self._dofs)
        self._follow_input.synchronization = _ruckig.Synchronization.No
        self._follow_input.target_position = [0.0] * self._dofs
        self._stop_input = _ruckig.InputParameter(self._dofs)
        self._stop_input.control_interface = _ruckig.ControlInterface.Velocity
        self._stop_input.synchronization = _ruckig.Synchronization.No
        self._past: deque[np.ndarray] = deque(maxlen=_WINDOW)
        self.limit(envelope)
        self.position_D = np.zeros(self._dofs)
        self.velocity_D = np.zeros(self._dofs)
        self.acceleration_D = np.zeros(self._dofs)
        self._plan: list[_State] = []
        self.guarded = ""

    def limit(self, envelope: Envelope) -> None:
        """Use these limits from the next tick on."""
        self._low, self._high = envelope.low, envelope.high
        self._velocity = envelope["velocity"]
        for given in (self._follow_input, self._stop_input):
            given.max_acceleration = envelope["acceleration"].tolist()
            given.max_jerk = envelope["jerk"].tolist()
        self._stop_input.max_velocity = self._velocity.tolist()
        longest = self._velocity / envelope["acceleration"]
        longest = longest + 2 * envelope["acceleration"] / envelope["jerk"]
        self.stopping_s = float(longest.max())
        """Longest time from any state to standstill."""

    def start(self, position_D: np.ndarray) -> None:
        """Stand still at a position; where it is beyond a limit, it may only move inwards."""
        self.position_D = position_D.astype(np.float64)
        self.velocity_D = np.zeros(self._dofs)
        self.acceleration_D = np.zeros(self._dofs)
        self._past.clear()
        self._plan = []
        self._prove_stop()

    @property
    def still(self) -> bool:
        """Whether the commanded position does not move."""
        return not self.velocity_D.any() and not self.acceleration_D.any()

    def follow(self, target_D: np.ndarray, coming: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Plan one tick towards its target, given the next ones if known; the end point [D].

        guarded is set to the reason if the proven stop is taken instead.
        """
        self.guarded = ""
        target_D = np.clip(target_D.astype(np.float64), self._low, self._high)
        speed_D = self._target_velocity(target_D, coming[:_WINDOW])
        self._past.append(target_D)
        origin_D = target_D - speed_D * self._tick_s
        given = self._follow_input
        given.current_position = (self.position_D - origin_D).tolist()
        given.current_velocity = (self.velocity_D - speed_D).tolist()
        given.current_acceleration = self.acceleration_D.tolist()
        given.max_velocity = (self._velocity - speed_D).tolist()
        given.min_velocity = (-self._velocity - speed_D).tolist()
        if self._solver.calculate(given, self._path) not in _SOLVED:
            self.guarded = "no trajectory"
            return self._take_stop()
        plan: list[_State] = []
        for k in range(1, self.steps + 1):
            t_s = k * self._step_s
            position, velocity, acceleration = _arrays(self._path.at_time(t_s))
            plan.append((origin_D + speed_D * t_s + position, velocity + speed_D, acceleration))
        self.guarded = self._fault(plan)
        if self.guarded:
            return self._take_stop()
        self._plan = plan
        return plan[-1][0]

    def brake(self) -> np.ndarray:
        """Plan one tick of the fastest stop; the end point [D]."""
        self.guarded = ""
        return self._take_stop()

    def _take_stop(self) -> np.ndarray:
        self._past.clear()
        self._plan = [
            _arrays(self._stop.at_time(k * self._step_s)) for k in range(1, self.steps + 1)
        ]
        return self._plan[-1][0]

    def step(self) -> np.ndarray:
        """The next set point [D]; without a plan the present one."""
        if self._plan:
            self.position_D, self.velocity_D, self.acceleration_D = self._plan.pop(0)
            if not self._plan:
                self._prove_stop()
        return self.position_D

    def _target_velocity(self, target_D: np.ndarray, coming: Sequence[np.ndarray]) -> np.ndarray:
        """Slope of a line through the targets around this tick, kept below the limit."""
        points = [*self._past, target_D, *coming]
        if len(points) == 1:
            return np.zeros(self._dofs)
        offsets = np.arange(len(points)) - len(self._past)
        weights = offsets - offsets.mean()
        slope = weights @ np.asarray(points) / (weights @ weights) / self._tick_s
        most = _TARGET_SPEED * self._velocity
        return np.clip(slope, -most, most)

    def _fault(self, plan: list[_State]) -> str:
        points = [point for point, _, _ in plan]
        self._solve_stop(*plan[-1], self._proof)
        ends = np.array([(e.min, e.max) for e in self._proof.position_extrema])
        low = np.minimum(self._low, self.position_D) - _SLACK
        high = np.maximum(self._high, self.position_D) + _SLACK
        reached = np.asarray(points)
        if (reached < low).any() or (reached > high).any():
            return "position limit"
        if (ends[:, 0] < low).any() or (ends[:, 1] > high).any():
            return "position limit"
        if self._workspace is None:
            return ""
        stop_steps = int(np.ceil(self._proof.duration / self._step_s))
        for k in range(1, stop_steps + 1):
            points.append(np.array(self._proof.at_time(k * self._step_s)[0]))
        for point in points:
            if fault := self._workspace.fault(point):
                return fault
        return ""

    def _prove_stop(self) -> None:
        self._solve_stop(self.position_D, self.velocity_D, self.acceleration_D, self._stop)

    def _solve_stop(
        self, position: np.ndarray, velocity: np.ndarray, acceleration: np.ndarray, to: Any
    ) -> None:
        given = self._stop_input
        given.current_position = position.tolist()
        given.current_velocity = velocity.tolist()
        given.current_acceleration = acceleration.tolist()
        given.target_velocity = [0.0] * self._dofs
        given.target_acceleration = [0.0] * self._dofs
        result = self._solver.calculate(given, to)
        if result not in _SOLVED:
            raise EmbodiedError(f"no stop from velocity {velocity}: {result}")


def _arrays(state: tuple[list[float], list[float], list[float]]) -> _State:
    position, velocity, acceleration = map(np.array, state)
    return position, velocity, acceleration


def check_envelope(envelope: Envelope, position_D: np.ndarray, where: str) -> None:
    """Raise ConfigError if a robot that stands at a position is outside of the limits."""
    outside = (position_D < envelope.low) | (position_D > envelope.high)
    if outside.any():
        k = int(np.argmax(outside))
        raise ConfigError(
            f"{where}: element {k} is at {position_D[k]:.3f}, outside of "
            f"[{envelope.low[k]:g}, {envelope.high[k]:g}]: move it inside first"
        )
