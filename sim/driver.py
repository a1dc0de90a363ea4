"""Any registered simulated task as a robot's driver, for devices that an agent offers."""

from collections.abc import Callable

import msgspec
import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.frames import Observation
from embodied.core.protocols import Event, Renders, SimulatedDriver, Snapshots
from embodied.core.specs import DeviceSpec
from embodied.core.tasks import Expert
from sim import family
from sim.family import SimConfig


class Simulated:
    """The simulated robot of a task."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """task: its full name. sim: as in training."""

        task: str
        sim: SimConfig = SimConfig()

    def __init__(self, config: Config) -> None:
        found, task = family.find(config.task)
        self._driver: SimulatedDriver = found.make_driver(task, config.sim)
        self.spec = self._driver.spec

    def open(self) -> None:
        """Load the simulator."""
        self._driver.open()

    def sense(self) -> Observation:
        """Read every declared observation."""
        return self._driver.sense()

    def drive(self, action_D: np.ndarray) -> None:
        """Command one step's action."""
        self._driver.drive(action_D)

    def hold(self) -> None:
        """Command standing still."""
        self._driver.hold()

    def step_time(self) -> None:
        """Advance the simulation."""
        self._driver.step_time()

    def reset(self, seed: int) -> None:
        """Go to the start state of `seed`."""
        self._driver.reset(seed)

    def signals(self) -> dict[str, float]:
        """Privileged scalars of the present state."""
        return self._driver.signals()

    def render(self, width: int, height: int) -> np.ndarray:
        """Picture [height, width, 3], uint8."""
        if not isinstance(self._driver, Renders):
            raise ConfigError("this simulator does not draw itself")
        return self._driver.render(width, height)

    def snapshot(self, width: int, height: int) -> Callable[[], np.ndarray]:
        """The same to be drawn later, where the simulator can; else it is drawn now."""
        if isinstance(self._driver, Snapshots):
            return self._driver.snapshot(width, height)
        picture = self.render(width, height)
        return lambda: picture

    def close(self) -> None:
        """Release the simulator."""
        self._driver.close()


class ScriptedTeleoperator:
    """A task's scripted expert in a person's place, for the ticks in which it is engaged."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """task: whose expert. sim: as in training."""

        task: str | None = None
        sim: SimConfig = SimConfig()

        def __post_init__(self) -> None:
            if self.task is None:
                raise ConfigError(
                    "teleoperator=scripted moves the device by a task's script, and no task is "
                    "named: add teleoperator.task=so101/reach, or another registered task with a "
                    "script"
                )

    def __init__(self, config: Config) -> None:
        self._task = config.task or ""
        found, task = family.find(self._task)
        self._spec = found.make_driver(task, config.sim).spec
        expert = found.make_expert(task, self._spec)
        if expert is None:
            raise ConfigError(f"task '{config.task}' has no scripted expert")
        self._expert: Expert = expert
        self.engaged = True

    def open(self) -> None:
        """Begin anew."""
        self._expert.reset()

    def begin(self, spec: DeviceSpec) -> None:
        """Another episode. Raises ConfigError if the expert is for another robot."""
        observed = self._spec.observation.items() <= spec.observation.items()
        if spec.action != self._spec.action or not observed:
            raise ConfigError(f"the expert of '{self._task}' cannot move this device: specs differ")
        self._expert.reset()

    def read(self, observation: Observation) -> np.ndarray | None:
        """The expert's action while engaged."""
        return self._expert.act(observation) if self.engaged else None

    def events(self) -> list[Event]:
        """A script signals nothing."""
        return []

    def close(self) -> None:
        """Nothing to release."""
