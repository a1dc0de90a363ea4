"""Tasks on robots: reset by the simulator, by a motion or by a person; judged by rule or person.

The same task runs in simulation and on the robot: what is reset and judged is the robot's own
pose, or what a person or a classifier says.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.frames import Frame
from embodied.core.protocols import Event
from embodied.core.seeds import make_rng
from embodied.core.specs import DeviceSpec
from embodied.core.tasks import Outcome, Resettable
from hal.commander import Commander
from hal.safety.config import Workspace, WorkspaceConfig


class Operator(Protocol):
    """The person beside the robot."""

    def ask(self, text: str) -> None:
        """Say what to do and return when it is done."""
        ...

    def events(self) -> list[Event]:
        """What was signalled since the last call."""
        ...


class Reset(Protocol):
    """Prepares an episode."""

    def __call__(self, commander: Commander, seed: int) -> int:
        """Return the tick of the first frame."""
        ...


class Judge(Protocol):
    """Decides whether a state is a success, a failure, or neither yet."""

    def __call__(self, frame: Frame) -> bool | None:
        """True: success. False: failure. None: go on."""
        ...


class MotionReset:
    """A scripted motion to a pose that the seed varies; a simulator is set to its own start."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """pose [D] and spread (half width of the uniform variation) in the action's unit."""

        pose: tuple[float, ...]
        spread: float = 0.0
        speed: float = 0.4

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        if len(config.pose) != spec.action.size:
            raise ConfigError(
                f"task.reset.pose has {len(config.pose)} values; the device has {spec.action.size}"
            )
        self._config = config
        self._low, self._high = spec.action.bounds()

    def __call__(self, commander: Commander, seed: int) -> int:
        """Reset or move; the tick of the first frame."""
        if commander.resettable:
            return commander.reset(seed)
        rng = make_rng(seed, "reset")
        offset_D = rng.uniform(-1, 1, len(self._config.pose)) * self._config.spread
        pose_D = np.clip(np.array(self._config.pose) + offset_D, self._low, self._high)
        return commander.move_to(pose_D, self._config.speed)


class PersonReset:
    """A person prepares the scene; with a pose, the robot moves out of the way first."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """text: what the person is asked. pose [D]: where the robot waits, None for where it is."""

        text: str = "Prepare the scene, then press Enter."
        pose: tuple[float, ...] | None = None

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        if operator is None:
            raise ConfigError("task.reset=person needs a person: use a keyboard or gamepad")
        self._config = config
        self._operator = operator

    def __call__(self, commander: Commander, seed: int) -> int:
        """Wait for the person; the tick of the first frame."""
        if self._config.pose is not None:
            commander.move_to(np.array(self._config.pose))
        self._operator.ask(self._config.text)
        commander.device.advance(commander.fresh().tick + 1)
        return commander.device.latest().tick


class ReachJudge:
    """Success when a site of the robot is near a point, by forward kinematics."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """target (m, in the model's world frame) and radius (m) around it."""

        model: str
        target: tuple[float, float, float]
        radius_m: float = 0.03
        site: str = "tool"

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        low, high = (-1e3, -1e3, -1e3), (1e3, 1e3, 1e3)
        self._arm = Workspace(WorkspaceConfig(config.model, low, high, site=config.site))
        self._config = config
        if spec.motion is None:
            raise ConfigError("task.judge=reach needs a position-controlled device")
        self._measured = spec.motion.measured

    def distance_m(self, frame: Frame) -> float:
        """Distance of the site from the target."""
        tool = self._arm.tool(frame.observation[self._measured])
        return float(np.linalg.norm(tool - np.array(self._config.target)))

    def __call__(self, frame: Frame) -> bool | None:
        """Whether the site is near the target."""
        return True if self.distance_m(frame) <= self._config.radius_m else None


class KeyJudge:
    """Success or failure when a person says so."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """It has no options."""

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        if operator is None:
            raise ConfigError("task.judge=key needs a person: use a keyboard or gamepad")
        self._operator = operator

    def __call__(self, frame: Frame) -> bool | None:
        """The newest verdict, if there is one."""
        for event in self._operator.events():
            if event in ("success", "failure"):
                return event == "success"
        return None


class ClassifierJudge:
    """Success when a registered classifier of frames says so with enough confidence."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """classifier: a registered classifier's name and options. threshold: of its probability.

        in_a_row: ticks for which it must hold.
        """

        classifier: dict[str, Any]
        threshold: float = 0.8
        in_a_row: int = 3

    def __init__(self, config: Config, spec: DeviceSpec, operator: Operator | None) -> None:
        cls, options = component("classifiers", config.classifier, "task.judge.classifier")
        self._probability: Callable[[Frame], float] = cls(options)
        self._config = config
        self._count = 0

    def __call__(self, frame: Frame) -> bool | None:
        """Whether the classifier has been sure for long enough."""
        sure = self._probability(frame) >= self._config.threshold
        self._count = self._count + 1 if sure else 0
        return True if self._count >= self._config.in_a_row else None


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A task on a robot. reset, judge: registered ones with their options."""

    name: str
    instruction: str
    horizon_s: float
    reset: dict[str, Any]
    judge: dict[str, Any]


@dataclass
class RobotTask:
    """A task with a reset and a judge; reward 1 with success, 0 otherwise."""

    name: str
    instruction: str
    horizon: int
    resetting: Reset
    judging: Judge
    prepare: Callable[[], None] = field(default=lambda: None)

    def reset(self, device: Resettable, seed: int) -> int:
        """Prepare an episode; the tick of its first frame."""
        assert isinstance(device, Commander)
        tick = self.resetting(device, seed)
        self.prepare()
        return tick

    def judge(self, frame: Frame, elapsed_ticks: int) -> Outcome:
        """A judgement ends the episode; the horizon truncates it."""
        verdict = self.judging(frame)
        truncated = verdict is None and elapsed_ticks >= self.horizon
        return Outcome(float(verdict is True), verdict is not None, truncated, verdict is True)


def make_task(config: TaskConfig, spec: DeviceSpec, operator: Operator | None) -> RobotTask:
    """The configured task on a device of this spec."""
    if not config.horizon_s > 0:
        raise ConfigError(f"task.horizon_s is {config.horizon_s}; it must be positive")
    reset, reset_options = component("resets", config.reset, "task.reset")
    judge, judge_options = component("judges", config.judge, "task.judge")
    return RobotTask(
        config.name,
        config.instruction,
        max(1, round(config.horizon_s * spec.tick_hz)),
        reset(reset_options, spec, operator),
        judge(judge_options, spec, operator),
        prepare=(lambda: None) if operator is None else lambda: _forget(operator),
    )


def _forget(operator: Operator) -> None:
    """Keys pressed before an episode began say nothing about it."""
    operator.events()


def model_path(name: str) -> str:
    """Path of a robot model that comes with the drivers, such as "so101.xml"."""
    path = Path(__file__).parent / "drivers" / name
    if not path.is_file():
        raise ConfigError(f"there is no robot model '{name}'")
    return str(path)
