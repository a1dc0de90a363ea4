"""The typed configuration of `embodied imagine`."""

from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]


class PlannerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A planning policy to be made of the checkpoint (policies/world/planning.py). scorer: a
    registered scorer and its options. proposals: for a decision. policy: a run or a policy's folder
    that proposes; None: the checkpoint does. critic: one whose critic the scorer `critic` asks."""

    scorer: dict[str, Any]
    proposals: Count = 16
    policy: str | None = None
    critic: str | None = None


class ImagineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Predictions of recorded episodes by a world model.

    checkpoint: a run's directory or a policy's folder. buffer: a buffer's folder or a run's, null
    for the one of the checkpoint's run. task: of which to take the episodes; null for all.
    episodes: the newest so many that are long enough, or names, stream/number. keys: which of the
    predicted ones are looked at; null for all. start: the tick at which rolling on begins. stride:
    ticks from one window to the next, of the predictions one chunk ahead and the actions inferred.
    actions: whether recorded ones are given and compared with; false for another robot's, and as if
    false where there are none, as in videos.
    planner: if given, the checkpoint with it is kept as OUTPUT/policy. output: a folder.
    """

    checkpoint: str
    buffer: str | None
    task: str | None
    episodes: Count | tuple[str, ...]
    keys: tuple[str, ...] | None
    start: Annotated[int, msgspec.Meta(ge=0)]
    stride: Count
    actions: bool
    planner: PlannerConfig | None
    batch_size: Count
    threads: Count
    seed: int
    output: str
