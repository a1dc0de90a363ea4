"""A person beside whoever acts on one robot: the rollout that they share, and what is signalled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from embodied.core.episodes import Step
from embodied.core.protocols import Operator
from embodied.core.tasks import Expert, Task
from embodied.run.rollout import Rollout, Start
from hal.commander import Refreshes
from hal.group import DeviceGroup
from hal.rewards import make_reward
from hal.teleop.asking import PersonStopped
from hal.teleop.session import Session


def shared_rollout(
    group: DeviceGroup,
    session: Session,
    *,
    make_task: Callable[[Operator | None], Task],
    next_start: Callable[[int], Start | None],
    on_step: Callable[[int, Step], None],
    reward: Mapping[str, Any] | None,
    meanwhile: Callable[[], None],
    experts: Sequence[Expert | None] | None = None,
) -> Rollout:
    """A rollout on one robot in which the person of an open session takes over and gives back.

    make_task: given who can answer, None if nobody can. reward: a registered one and its options,
    in the task's place; null for the task's own. meanwhile: called again and again while an answer
    is waited for, which may raise. Other arguments as of Rollout.
    """
    device = group.devices[0]
    operator = session if session.can_ask else None

    def keep_up() -> None:
        if isinstance(device, Refreshes):
            device.refresh()  # notices that the device is lost
        meanwhile()

    def begin(row: int) -> Start | None:
        start = next_start(row)
        if start is not None:
            session.begin(group.spec)
        return start

    session.meanwhile = keep_up
    return Rollout(
        group,
        make_task(operator),
        next_start=begin,
        experts=experts,
        teleoperators=[session],
        on_step=on_step,
        rewards=None if reward is None else [make_reward(reward, group.spec, operator)],
    )


def obey(session: Session, rollout: Rollout | None) -> int:
    """Do what the person has signalled; how many episodes were left open, to be recorded anew.

    rollout: None while there is no robot. Raises PersonStopped.
    """
    abandoned = 0
    for event in session.controls():
        if event in ("stop", "estop"):
            raise PersonStopped(event)
        if event == "rerecord" and rollout is not None and not rollout.idle:
            rollout.abandon(0)
            abandoned += 1
    return abandoned
