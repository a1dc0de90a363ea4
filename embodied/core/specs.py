"""Declared shapes, units and bounds of everything that crosses a boundary."""

import functools
import math
from collections.abc import Mapping

import msgspec
import numpy as np

from embodied.core.errors import SpecError

MAX_ELEMENTS = 1 << 31

_dtype = functools.cache(np.dtype)
"""np.dtype parses its name anew each time."""


class ArraySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape, dtype, bounds and meaning of one array.

    low, high: bounds per element in the array's flattened order, or one value for all; None means
    unbounded. unit: SI symbol, "" if dimensionless. names: one per element of the last axis.
    rate_hz: how often a new value is produced; None means every tick.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    unit: str = ""
    names: tuple[str, ...] = ()
    rate_hz: float | None = None

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.shape) or self.size > MAX_ELEMENTS:
            raise SpecError(f"shape {self.shape}: every axis must be at least 1")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and len(bound) not in (1, self.size):
                raise SpecError(
                    f"{name} has {len(bound)} values; shape {self.shape} needs 1 or {self.size}"
                )
        if self.names and len(self.names) != self.shape[-1]:
            raise SpecError(f"{len(self.names)} names for a last axis of {self.shape[-1]}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bounded(self) -> bool:
        """Whether every element has a finite lower and upper bound."""
        low, high = self.bounds()
        return bool(np.isfinite(low).all() and np.isfinite(high).all())

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound as float64 arrays of this shape (infinite where unbounded)."""
        low = np.full(self.shape, -np.inf) if self.low is None else self._expand(self.low)
        high = np.full(self.shape, np.inf) if self.high is None else self._expand(self.high)
        return low, high

    def _expand(self, bound: tuple[float, ...]) -> np.ndarray:
        values = np.asarray(bound, np.float64)
        return (
            np.broadcast_to(values, self.shape) if values.size == 1 else values.reshape(self.shape)
        )

    def check(self, value: np.ndarray, where: str) -> np.ndarray:
        """Return `value` if shape and dtype fit; raise SpecError that names `where` if not."""
        if value.shape != self.shape:
            raise SpecError(f"{where} has shape {value.shape}; its spec says {self.shape}")
        if value.dtype != _dtype(self.dtype):
            raise SpecError(f"{where} has dtype {value.dtype}; its spec says {self.dtype}")
        return value


class MotionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a position-controlled device moves: its action is a position target for the tick's end.

    velocity, acceleration, jerk: greatest magnitude per action element, in the action's unit per
    s, s² and s³. servo_hz: rate of the set points that lead to the target, a whole multiple of
    tick_hz. measured: observation key with the measured positions, in the action's order.
    """

    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    jerk: tuple[float, ...]
    servo_hz: float
    measured: str = "observation.state"

    def __post_init__(self) -> None:
        for name in ("velocity", "acceleration", "jerk"):
            values: tuple[float, ...] = getattr(self, name)
            if not values or not all(math.isfinite(v) and v > 0 for v in values):
                raise SpecError(f"motion.{name} is {values}; every value must be positive")
            if len(values) != len(self.velocity):
                raise SpecError(f"motion.{name} has {len(values)} values, velocity another number")


class DeviceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device senses and accepts; readable before the device is opened.

    observation: keys follow LeRobot ("observation.state", "observation.images.front").
    signals: names of privileged scalars that accompany an observation (reward, success).
    max_step: largest change of each action element between two ticks; None means no limit.
    motion: for position-controlled devices, the limits of the trajectory between two targets;
    other devices get each action as it is.
    """

    observation: dict[str, ArraySpec]
    action: ArraySpec
    tick_hz: float
    signals: tuple[str, ...] = ()
    max_step: tuple[float, ...] | None = None
    motion: MotionSpec | None = None

    def __post_init__(self) -> None:
        if self.motion is None:
            return
        motion, size = self.motion, self.action.size
        if len(motion.velocity) != size or not self.action.bounded:
            raise SpecError(
                f"motion has {len(motion.velocity)} velocities for an action of {size} elements; "
                "it needs one each, and an action with finite bounds"
            )
        measured = self.observation.get(motion.measured)
        if measured is None or measured.shape != self.action.shape:
            raise SpecError(
                f"motion.measured '{motion.measured}' is no observation like the action"
            )
        if round(motion.servo_hz / self.tick_hz) * self.tick_hz != motion.servo_hz:
            raise SpecError(
                f"motion.servo_hz is {motion.servo_hz}; it must be a whole multiple of "
                f"tick_hz={self.tick_hz}"
            )

    def check(self, observation: Mapping[str, np.ndarray]) -> None:
        """Raise SpecError unless `observation` has exactly the declared keys, shapes and dtypes."""
        if observation.keys() != self.observation.keys():
            raise SpecError(
                f"observation has keys {sorted(observation)}; "
                f"the device declares {sorted(self.observation)}"
            )
        for key, spec in self.observation.items():
            spec.check(observation[key], key)


class PolicySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a policy reads and produces.

    n_obs_steps: history length To, in ticks. horizon: predicted chunk length H.
    n_action_steps: how many of those are executed before the next decision.
    """

    observation: dict[str, ArraySpec]
    action: ArraySpec
    n_obs_steps: int
    horizon: int
    n_action_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.n_action_steps <= self.horizon:
            raise SpecError(
                f"n_action_steps is {self.n_action_steps}; it must lie in 1..horizon={self.horizon}"
            )
        if self.n_obs_steps < 1:
            raise SpecError(f"n_obs_steps is {self.n_obs_steps}; it must be at least 1")
