"""A family of simulated tasks: what one adapter to one simulator provides."""

import importlib.util
import inspect
import socket
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from embodied.core import registry
from embodied.core.clock import Clock, VirtualClock
from embodied.core.errors import ConfigError, MissingDependencyError
from embodied.core.frames import Frame
from embodied.core.protocols import Operator, SimulatedDriver
from embodied.core.seeds import derive_seed
from embodied.core.specs import ArraySpec, DeviceSpec
from embodied.core.tasks import Expert, Outcome, Resettable, Task
from hal.cameras import picture_key
from hal.device import Device
from hal.health import DeviceInfo

EVALUATION_SEEDS = 1 << 20
"""Seeds below this are for evaluation; no training episode ever starts from one of them."""


_FRAMES = 4096
_FRAMES_WITH_PICTURES = 64


class SimConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tasks are simulated; the same for collection and evaluation.

    cameras: names of the simulator's cameras to observe. image_size: pixels, square.
    shadows: draw shadows and reflections (several times slower in software).
    horizon: ticks until truncation; None takes the family's. picture_ticks: from one picture to the
    next; in between the last one stays, as of a camera that is slower than its robot.
    """

    cameras: tuple[str, ...] = ()
    image_size: int = 96
    shadows: bool = False
    horizon: int | None = None
    picture_ticks: int = 1

    def __post_init__(self) -> None:
        if not 16 <= self.image_size <= 1024:
            raise ConfigError(f"sim.image_size is {self.image_size}; use 16 to 1024 pixels")
        if self.horizon is not None and self.horizon < 1:
            raise ConfigError(f"sim.horizon is {self.horizon}; it must be at least 1 tick")
        if self.picture_ticks < 1:
            raise ConfigError(f"sim.picture_ticks is {self.picture_ticks}; it must be at least 1")

    def picture_specs(self, tick_hz: float) -> dict[str, ArraySpec]:
        """Specs of the camera observations of a robot with so many ticks a second, by key."""
        shape = (self.image_size, self.image_size, 3)
        rate_hz = tick_hz / self.picture_ticks if self.picture_ticks > 1 else None
        spec = ArraySpec(shape, "uint8", rate_hz=rate_hz)
        return {picture_key(camera): spec for camera in self.cameras}


@dataclass(frozen=True)
class SimTask:
    """A task that the simulator's signals judge: success ends the episode."""

    name: str
    instruction: str
    horizon: int

    def reset(self, device: Resettable, seed: int) -> int:
        """Set the simulator to the start state of `seed`."""
        return device.reset(seed)

    def judge(self, frame: Frame, elapsed_ticks: int) -> Outcome:
        """Success terminates; the horizon truncates."""
        success = frame.signals["success"] > 0
        truncated = not success and elapsed_ticks >= self.horizon
        return Outcome(frame.signals["reward"], success, truncated, success)


class Family(Protocol):
    """One simulator's tasks. `task` is the part after the slash; "" where there is only one."""

    def names(self) -> tuple[str, ...]:
        """Full names of all tasks."""
        ...

    def make_task(self, task: str, config: SimConfig) -> Task:
        """Instruction, horizon and judge."""
        ...

    def make_driver(self, task: str, config: SimConfig) -> SimulatedDriver:
        """A simulated robot set up for the task; nothing is loaded before `open`."""
        ...

    def make_expert(self, task: str, spec: DeviceSpec) -> Expert | None:
        """The scripted supervisor, if there is one."""
        ...


def require(package: str) -> None:
    """Raise MissingDependencyError unless a simulator's package is installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"the simulator '{package}' is not installed; pip install 'embodied-stack[sim]'"
        )


def find(name: str) -> tuple[Family, str]:
    """Family and task of a name such as "metaworld/assembly"; the nearest match if unknown."""
    family_name, _, task = name.partition("/")
    if family_name not in registry.names("tasks"):
        raise registry.unknown("task", name, [*registry.names("tasks"), *task_names()])
    family: Family = registry.resolve("tasks", family_name)()
    if name not in family.names():
        raise registry.unknown("task", name, family.names())
    return family, task


def task_for(name: str, config: SimConfig, operator: Operator | None) -> Task:
    """The task of this name, with the person beside the robot where its family takes one."""
    family, task = find(name)
    takes_operator = "operator" in inspect.signature(family.make_task).parameters
    options: dict[str, Any] = {"operator": operator} if takes_operator else {}
    return family.make_task(task, config, **options)


def expert_for(name: str, spec: DeviceSpec) -> Expert | None:
    """A scripted supervisor for the task of this name, if there is one."""
    family, task = find(name)
    return family.make_expert(task, spec)


def task_names() -> list[str]:
    """Full names of all tasks of every family whose simulator is installed."""
    found: list[str] = []
    for family_name in registry.names("tasks"):
        try:
            found.extend(registry.resolve("tasks", family_name)().names())
        except MissingDependencyError:
            continue
    return found


def make_device(
    name: str, config: SimConfig, *, row: int = 0, clock: Clock | None = None
) -> Device:
    """A simulated robot as a device, not yet open. Virtual time unless another clock is given."""
    family, task = find(name)
    info = DeviceInfo(id=f"{name}:{row}", kind=name.partition("/")[0], host=socket.gethostname())
    driver = family.make_driver(task, config)
    capacity = _FRAMES_WITH_PICTURES if config.cameras else _FRAMES
    return Device(driver, info=info, clock=clock or VirtualClock(), frame_capacity=capacity)


def training_seed(root: int, *path: str | int) -> int:
    """A start state's seed for training, outside of the evaluation seeds."""
    return EVALUATION_SEEDS + derive_seed(root, *path) % ((1 << 31) - EVALUATION_SEEDS)


def enumerate_devices() -> list[dict[str, Any]]:
    """One row a family for `hal.devices()`: what could be opened here."""
    rows: list[dict[str, Any]] = []
    for family_name in registry.names("tasks"):
        try:
            count = len(registry.resolve("tasks", family_name)().names())
            tasks = f"{count} task{'s' * (count != 1)}"
            rows.append({"id": family_name, "kind": "simulator", "detail": tasks})
        except MissingDependencyError as error:
            rows.append({"id": family_name, "kind": "simulator", "fault": str(error)})
    return rows
