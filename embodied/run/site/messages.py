"""What a robot host and a run's gateway say to each other about the run itself."""

from typing import Annotated

import msgspec

from hal.listing import DeviceRow

MAX_CONFIG_BYTES = 512 << 10
MAX_DEVICES = 256
MAX_RESULTS = 1024
MAX_REASON_CHARS = 512

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"
"""Of what a run is called on its way to other hosts: it becomes the name of a folder there."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Join(msgspec.Struct, frozen=True, tag="join", forbid_unknown_fields=True):
    """Asks for the run that the link's Hello named."""


class Assignment(msgspec.Struct, frozen=True, tag="assignment", forbid_unknown_fields=True):
    """The run. id: no other run ever has it. config: its TrainConfig as JSON."""

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    name: Annotated[str, msgspec.Meta(pattern=RUN_NAME)]
    config: Annotated[bytes, msgspec.Meta(max_length=MAX_CONFIG_BYTES)]


class EpisodeResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an episode ended in which one version of the weights alone acted."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    success: bool


class HostReport(msgspec.Struct, frozen=True, tag="host", forbid_unknown_fields=True):
    """What a host tells about once a second.

    version: of the weights that are here. episodes: of its actors so far. spool_steps,
    spool_bytes, oldest_s: what is not yet durable at the learner's site, and how long the oldest of
    it has waited. drained: nothing is left and no actor acts. devices: of its pool.
    first_result: number of results[0] among all that the host has; told again until answered.
    history: what they are numbered in; another one where the host's folder was made anew.
    weights_age_s: since the learner's site confirmed these weights, None for not yet. waits: why no
    episode begins, "" if any may.
    """

    version: _Count | None
    episodes: _Count
    spool_steps: _Count
    spool_bytes: _Count
    oldest_s: _Seconds
    drained: bool
    devices: Annotated[tuple[DeviceRow, ...], msgspec.Meta(max_length=MAX_DEVICES)]
    first_result: _Count
    results: Annotated[tuple[EpisodeResult, ...], msgspec.Meta(max_length=MAX_RESULTS)]
    history: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    weights_age_s: _Seconds | None
    waits: Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARS)]


class Standing(msgspec.Struct, frozen=True, tag="standing", forbid_unknown_fields=True):
    """The gateway's answer. over: the run has its last weights: stop acting, send what is left.
    results: how many of the host's are counted."""

    over: bool
    results: _Count


REQUESTS = (Join, HostReport)
REPLIES = (Assignment, Standing)
