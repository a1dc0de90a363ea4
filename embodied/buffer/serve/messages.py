"""What buffer clients and the buffer service say to each other."""

from typing import Annotated

import msgspec

from embodied.buffer.steps.schema import MAX_STEP_BYTES
from embodied.buffer.write.progress import StreamCounts

MAX_BATCH_STEPS = 4096
MAX_BATCH_BYTES = MAX_STEP_BYTES + (1 << 20)
MAX_RESUME_EPISODES = 256

_Stream = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class AppendRequest(msgspec.Struct, frozen=True, tag="append", forbid_unknown_fields=True):
    """Steps of one schema. Arrays: payloads, uint8, one encoded step after the other; lengths,
    uint32, of each."""

    schema: bytes


class AppendReply(msgspec.Struct, frozen=True, tag="appended", forbid_unknown_fields=True):
    """All steps of the request are durable: everything up to sequence number durable_seq is."""

    durable_seq: int
    num_new: int
    num_duplicate: int


class StatsRequest(msgspec.Struct, frozen=True, tag="stats?", forbid_unknown_fields=True):
    """Asks what the buffer holds."""


class StatsReply(msgspec.Struct, frozen=True, tag="stats", forbid_unknown_fields=True):
    """What the buffer holds. steps: actions; episodes: closed ones; damaged: unreadable records
    when the service began; durable_seq: last durable sequence number; num_bad: messages that
    could not be decoded."""

    steps: int
    episodes: int
    streams: dict[str, StreamCounts]
    damaged: int
    durable_seq: int
    num_bad: int


class EpisodeRequest(msgspec.Struct, frozen=True, tag="episode?", forbid_unknown_fields=True):
    """Asks for an episode number that the stream has not used."""

    stream: _Stream


class EpisodeReply(msgspec.Struct, frozen=True, tag="episode", forbid_unknown_fields=True):
    """The smallest number above all episodes of the stream."""

    episode: int


class ResumeRequest(msgspec.Struct, frozen=True, tag="resume?", forbid_unknown_fields=True):
    """Asks how far episodes, (stream, number), are durable."""

    episodes: Annotated[
        tuple[tuple[_Stream, _Count], ...],
        msgspec.Meta(min_length=1, max_length=MAX_RESUME_EPISODES),
    ]


class ResumeReply(msgspec.Struct, frozen=True, tag="resume", forbid_unknown_fields=True):
    """One value for each episode asked for. next_index: the first that is not durable, None if the
    episode was deleted. next_episode: the smallest number above all episodes of its stream."""

    next_index: tuple[int | None, ...]
    next_episode: tuple[int, ...]


REQUESTS = (AppendRequest, StatsRequest, EpisodeRequest, ResumeRequest)
REPLIES = (AppendReply, StatsReply, EpisodeReply, ResumeReply)
