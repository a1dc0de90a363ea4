"""Tasks on robots: reset by the simulator, by a motion or by a person; judged by their reward.

The same task runs in simulation and on the robot: what is reset and judged is the robot's own
pose, or what a person or a classifier says.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.frames import Frame
from embodied.core.protocols import Operator
from embodied.core.seeds import make_rng
from embodied.core.specs import DeviceSpec
from embodied.core.tasks import Outcome, Resettable, Reward, judged
from hal.commander import Commander
from hal.rewards import make_reward


class Reset(Protocol):
    """Prepares an episode."""

    def __call__(self, commander: Commander, seed: int) -> int:
        """Return the tick of the first frame."""
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


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A task on a robot. reset, reward: registered ones with their options."""

    name: str
    instruction: str
    horizon_s: float
    reset: dict[str, Any]
    reward: dict[str, Any]


@dataclass
class RobotTask:
    """A task with a reset and a reward of its own."""

    name: str
    instruction: str
    horizon: int
    resetting: Reset
    reward: Reward

    def reset(self, device: Resettable, seed: int) -> int:
        """Prepare an episode; the tick of its first frame."""
        assert isinstance(device, Commander)
        tick = self.resetting(device, seed)
        self.reward.begin(device.device.latest())
        return tick

    def judge(self, frame: Frame, elapsed_ticks: int) -> Outcome:
        """As the reward says."""
        return judged(self.reward(frame), elapsed_ticks, self.horizon)


def make_task(config: TaskConfig, spec: DeviceSpec, operator: Operator | None) -> RobotTask:
    """The configured task on a device of this spec."""
    if not config.horizon_s > 0:
        raise ConfigError(f"task.horizon_s is {config.horizon_s}; it must be positive")
    reset, reset_options = component("resets", config.reset, "task.reset")
    return RobotTask(
        config.name,
        config.instruction,
        max(1, round(config.horizon_s * spec.tick_hz)),
        reset(reset_options, spec, operator),
        make_reward(config.reward, spec, operator, "task.reward"),
    )
