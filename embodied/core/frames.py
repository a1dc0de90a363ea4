"""What passes between an actor and a device: frames up, chunks of actions down."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Observation = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Frame:
    """One tick of a device.

    The observation was sensed at the start of the tick, each key at its own monotonic time in
    t_ns. action is what the device executed during the tick; None while the tick is still open,
    and in a tick in which it held for want of a command (held is then True). signals were
    sensed with the observation, so the reward of tick k's action stands in frame k + 1.
    seq: number of the chunk that the action came from, -1 if none.
    """

    tick: int
    observation: Observation
    t_ns: dict[str, int]
    action: np.ndarray | None = None
    held: bool = False
    signals: dict[str, float] = field(default_factory=dict[str, float])
    seq: int = -1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Actions [H, D] addressed by absolute tick: actions_HD[k] is for tick start_tick + k.

    obs_tick: tick of the observation they were computed from. No action is executed after
    valid_until_tick. (epoch, seq) must grow. lease_token fences former lease holders.
    """

    start_tick: int
    actions_HD: np.ndarray
    obs_tick: int
    valid_until_tick: int
    seq: int
    epoch: int = 0
    lease_token: int = 0
    policy_version: int = 0


RejectionCode = Literal[
    "late", "stale", "expired", "future", "far", "shape", "dtype", "nonfinite",
    "halted", "held", "token", "order", "start", "workspace",
]  # fmt: skip
"""Kinds of rejection: those of time, of form, of right, and of place."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why the actions of a chunk for [first_tick, end_tick) will not be executed."""

    first_tick: int
    end_tick: int
    code: RejectionCode
    reason: str


@dataclass(frozen=True, slots=True)
class Ticket:
    """A device's answer to a chunk.

    accepted_HD: the actions that will be executed, after limits; first_tick is that of row 0.
    clipped: how many elements a limit changed. late_ticks: how many actions came too late.
    """

    seq: int
    first_tick: int
    accepted_HD: np.ndarray
    clipped: int = 0
    late_ticks: int = 0
    rejections: tuple[Rejection, ...] = ()
