"""The tasks of a run: one, or several that one policy learns together."""

from collections.abc import Sequence

from embodied.core.errors import ConfigError
from embodied.core.specs import DeviceSpec
from embodied.run.actors_options import ActorsConfig
from sim import family
from sim.family import SimConfig

Tasks = str | tuple[str, ...]
"""A registered task, or several, as a configuration names them."""


def names_of(tasks: Tasks) -> tuple[str, ...]:
    """Their names; ConfigError for none, and for one that is there twice."""
    names = (tasks,) if isinstance(tasks, str) else tasks
    if not names or len({*names}) < len(names):
        raise ConfigError(f"task is [{', '.join(names)}]; name one task or more, each once")
    return names


def label_of(tasks: Tasks) -> str:
    """What stands for them in a title."""
    return ", ".join(names_of(tasks))


def robot_task(tasks: Sequence[str], actor: int, row: int, rows: int) -> str:
    """The task of an actor's robot: the run's robots take the tasks in turn."""
    return tasks[(actor * rows + row) % len(tasks)]


def device_of(tasks: Sequence[str], sim: SimConfig) -> DeviceSpec:
    """Spec of the tasks' robots, without opening one; ConfigError if they differ."""
    specs: list[DeviceSpec] = []
    for name in tasks:
        found, task = family.find(name)
        specs.append(found.make_driver(task, sim).spec)
    for name, spec in zip(tasks, specs, strict=True):
        if spec != specs[0]:
            raise ConfigError(
                f"the robots of '{tasks[0]}' and '{name}' differ, in what they observe, how they "
                "move, or their rate: tasks that one policy learns need equal robots"
            )
    return specs[0]


def check_robots(tasks: Sequence[str], actors: ActorsConfig) -> None:
    """ConfigError unless each of several tasks has as many of the actors' robots."""
    if len(tasks) == 1:
        return
    if actors.devices is not None:
        raise ConfigError(
            f"actors.devices leases robots for one task, and the run has {len(tasks)}: several "
            "tasks are learned on simulated robots, with actors.devices=null"
        )
    if actors.count * actors.rows % len(tasks):
        raise ConfigError(
            f"actors.count={actors.count} times actors.rows={actors.rows} robots cannot share "
            f"{len(tasks)} tasks evenly: let their product be a multiple, such as actors.count=1 "
            f"actors.rows={len(tasks)}"
        )
