"""How a task is judged on a robot: by a rule on what is sensed, by its pose, or by a person.

A reward says of each state whether it is a success, a failure, or neither yet; it remembers the
running episode, so every robot has one of its own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.frames import Frame
from embodied.core.protocols import Operator
from embodied.core.registry import unknown
from embodied.core.specs import DeviceSpec
from embodied.core.tasks import Reward
from hal.safety.config import Workspace, WorkspaceConfig


def make_reward(
    data: Mapping[str, Any], spec: DeviceSpec, operator: Operator | None, where: str = "reward"
) -> Reward:
    """The registered reward that `data` names, for one device of this spec.

    ConfigError if its options, the device, or the want of a person (operator None) rule it out.
    """
    cls, options = component("rewards", data, where)
    return cls(options, spec, operator)


def make_rewards(
    data: Mapping[str, Any] | None, spec: DeviceSpec, rows: int
) -> list[Reward] | None:
    """One reward for each of several like devices with nobody beside them; None for the task's."""
    return None if data is None else [make_reward(data, spec, None) for _ in range(rows)]


@runtime_checkable
class Prepares(Protocol):
    """A class of rewards that takes its time to be ready, longer than a leased robot waits."""

    def prepare(self) -> None:
        """Do, once in a process, what can be done without a robot; called on the class."""
        ...


def prepare_reward(data: Mapping[str, Any] | None) -> None:
    """To be called before a robot is leased for what this reward shall judge, if there is one."""
    if data is not None:
        cls, _ = component("rewards", data, "reward")
        if isinstance(cls, Prepares):
            cls.prepare()


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Holds while low ≤ value ≤ high, in the value's own unit.

    key: an observation key or the name of a signal. index: number, in flattened order, or name of
    an observation's element; null if it has only one.
    """

    key: str
    index: int | str | None = None
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        """Raise ConfigError for bounds that say nothing, or nothing can meet."""
        if math.isinf(self.low) and math.isinf(self.high):
            raise ConfigError(f"a rule on '{self.key}' has neither low nor high: give one")
        if not self.low <= self.high:
            raise ConfigError(
                f"a rule on '{self.key}' asks for at least {self.low:g} and at most {self.high:g}"
            )

    def element(self, spec: DeviceSpec) -> int | None:
        """Place in the flattened observation, None for a signal; ConfigError if there is none."""
        if self.key in spec.signals:
            if self.index is not None:
                raise ConfigError(
                    f"a rule on '{self.key}': a signal is one number, leave out index"
                )
            return None
        if self.key not in spec.observation:
            raise unknown("key of a rule", self.key, [*spec.observation, *spec.signals])
        array = spec.observation[self.key]
        if isinstance(self.index, str):
            if self.index not in array.names:
                raise unknown(f"element of {self.key}", self.index, array.names)
            if array.size > len(array.names):
                raise ConfigError(f"a rule on '{self.key}', shape {array.shape}: give a number")
            return array.names.index(self.index)
        if (self.index is None and array.size > 1) or not 0 <= (self.index or 0) < array.size:
            raise ConfigError(
                f"a rule on '{self.key}' has index {self.index}; 0 to {array.size - 1} is right"
            )
        return self.index or 0

    def holds(self, frame: Frame, element: int | None) -> bool:
        """Whether it does in this frame; never for a value that is not a number."""
        if element is None:
            value = frame.signals[self.key]
        else:
            value = float(frame.observation[self.key].reshape(-1)[element])
        return self.low <= value <= self.high


class Rule:
    """Success, or failure, while conditions on observations and signals hold long enough."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """success: conditions that must all hold, for held_ticks ticks in a row. failure: as well;
        none for no failure. If both hold it is a failure."""

        success: Annotated[tuple[Condition, ...], msgspec.Meta(min_length=1)]
        failure: tuple[Condition, ...] = ()
        held_ticks: Annotated[int, msgspec.Meta(ge=1)] = 1

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        self._held_ticks = config.held_ticks
        self._failure = [(condition, condition.element(spec)) for condition in config.failure]
        self._success = [(condition, condition.element(spec)) for condition in config.success]
        self._counts = {False: 0, True: 0}

    def begin(self, frame: Frame) -> None:
        """Forget how long anything has held."""
        self._counts = {False: 0, True: 0}

    def __call__(self, frame: Frame) -> bool | None:
        """See Rule."""
        found: bool | None = None
        for verdict, conditions in ((True, self._success), (False, self._failure)):
            hold = bool(conditions) and all(c.holds(frame, element) for c, element in conditions)
            self._counts[verdict] = self._counts[verdict] + 1 if hold else 0
            if self._counts[verdict] >= self._held_ticks:
                found = verdict
        return found


class Reach:
    """Success when a site of the robot is near a point, by forward kinematics."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """target (m, in the model's world frame) and radius_m around it. model: an MJCF file, or
        the name of one that comes with a driver, such as so101.xml."""

        model: str
        target: tuple[float, float, float]
        radius_m: float = 0.03
        site: str = "tool"

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        low, high = (-1e3, -1e3, -1e3), (1e3, 1e3, 1e3)
        if spec.motion is None:
            raise ConfigError("reward=reach needs a position-controlled device")
        model = _model(config.model)
        self._arm = Workspace(WorkspaceConfig(str(model), low, high, site=config.site))
        self._config = config
        self._measured = spec.motion.measured

    def begin(self, frame: Frame) -> None:
        """It remembers nothing."""

    def distance_m(self, frame: Frame) -> float:
        """Distance of the site from the target."""
        tool = self._arm.tool(frame.observation[self._measured])
        return float(np.linalg.norm(tool - np.array(self._config.target)))

    def __call__(self, frame: Frame) -> bool | None:
        """Whether the site is near the target."""
        return True if self.distance_m(frame) <= self._config.radius_m else None


def _model(name: str) -> Path:
    for path in (Path(name), Path(__file__).parent / "drivers" / name):
        if path.is_file():
            return path
    raise ConfigError(f"reward.model: there is no file {name}, and no driver has a model so named")


class SuccessKey:
    """Success or failure when a person says so: Enter or x, or a gamepad's buttons."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """It has no options."""

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        if operator is None:
            raise ConfigError(
                "reward=success_key needs a person with a keyboard or gamepad: run `embodied "
                "record`, or train with actors.teleoperator, in a terminal"
            )
        self._operator = operator

    def begin(self, frame: Frame) -> None:
        """Keys pressed before an episode began say nothing about it."""
        self._operator.events()

    def __call__(self, frame: Frame) -> bool | None:
        """The first verdict since the last frame, if there is one."""
        for event in self._operator.events():
            if event in ("success", "failure"):
                return event == "success"
        return None
