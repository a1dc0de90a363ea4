"""Which of a device's observations are read, and whether a policy's can be had from it, the
instruction among them."""

from collections.abc import Iterable

import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK, encode_instruction
from embodied.core.protocols import Composite, Policy
from embodied.core.registry import unknown
from embodied.core.specs import ArraySpec, DeviceSpec, PolicySpec
from embodied.core.tasks import Task


def read_keys(device: DeviceSpec, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The device's observation keys that `wanted` names, in the device's order; see TrainConfig.

    Raises ConfigError for a name or pattern that fits none.
    """
    return matching_keys(device.observation, wanted)


def matching_keys(keys: Iterable[str], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of the keys that `wanted` names, in their order; see TrainConfig.observations."""
    keys = tuple(keys)
    if wanted is None:
        return keys
    for name in wanted:
        if not any(_matches(key, name) for key in keys):
            raise unknown("observation key", name, keys)
    return tuple(k for k in keys if any(_matches(k, name) for name in wanted))


def _matches(key: str, name: str) -> bool:
    return key.startswith(name[:-1]) if name.endswith("*") else key == name


def check_robot(label: str, policy: Policy, device: DeviceSpec, task: Task, *, goals: bool) -> None:
    """ConfigError that says which policy reads or commands what the task's robot does not have.

    Of a composed policy it names the part. goals: whether somebody gives them.
    """
    if isinstance(policy, Composite):
        for part, member in policy.parts().items():
            check_robot(part, member, device, task, goals=goals)
    check_readable(label, policy.spec, device, task, goals=goals)
    if policy.spec.action.shape != device.action.shape:
        raise ConfigError(
            f"policy '{label}' produces actions of shape {policy.spec.action.shape}; task "
            f"'{task.name}' takes {device.action.shape}"
        )


def check_readable(
    label: str, policy: PolicySpec, device: DeviceSpec, task: Task, *, goals: bool
) -> np.ndarray | None:
    """The task's instruction as the policy reads it, uint8 [L]; None if it does not.

    goals: whether somebody gives them. Raises ConfigError if the policy reads an observation that
    the device does not have, or has in another shape, and SpecError if the instruction is too long.
    """
    for key, wanted in policy.observation.items():
        if key == TASK:
            continue
        if key.startswith(GOAL) and not goals:
            raise ConfigError(
                f"policy '{label}' reads '{key}', and nobody gives goals for '{task.name}' here: "
                "policies with policy.goals act in simulated tasks with a scripted expert"
            )
        _check(label, key.removeprefix(GOAL), wanted, device, task.name)
    text = policy.observation.get(TASK)
    return None if text is None else encode_instruction(task.instruction, text.size)


def _check(label: str, key: str, wanted: ArraySpec, device: DeviceSpec, task: str) -> None:
    found = device.observation.get(key)
    if found is None:
        what = "camera" if ".images." in key else "observation"
        raise ConfigError(
            f"policy '{label}' reads {what} '{key}', which the device of task '{task}' does not "
            f"have; it has {', '.join(device.observation)}. sim.cameras says which cameras a "
            "simulator observes, device selectors such as arm[camera.wrist] those of a robot; what "
            "a critic alone reads is left out by inference.critic=false"
        )
    if found.shape != wanted.shape or (found.dtype == "uint8") != (wanted.dtype == "uint8"):
        raise ConfigError(
            f"policy '{label}' reads '{key}' as {wanted.dtype} {wanted.shape}, the device of task "
            f"'{task}' has {found.dtype} {found.shape}; sim.image_size sets the size of a "
            "simulator's pictures"
        )
