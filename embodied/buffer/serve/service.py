"""The buffer service: the one process that writes a replay, for actors in other processes."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from embodied.buffer.log.append import SEGMENT_BYTES
from embodied.buffer.serve.client import BufferClient
from embodied.buffer.serve.messages import (
    MAX_BATCH_BYTES,
    MAX_BATCH_STEPS,
    REQUESTS,
    AppendReply,
    AppendRequest,
    EpisodeReply,
    EpisodeRequest,
    ResumeReply,
    ResumeRequest,
    StatsReply,
)
from embodied.buffer.serve.sink import LocalBuffer, StepSink
from embodied.buffer.steps.schema import decode_schema
from embodied.buffer.write.retention import Retention
from embodied.buffer.write.writer import ReplayWriter
from embodied.comms.channels import RequestServer
from embodied.core.errors import CorruptDataError

__all__ = ["BufferClient", "BufferService", "LocalBuffer", "StepSink"]

_decode_schema = lru_cache(maxsize=64)(decode_schema)


class BufferService:
    """Writes what clients send; acknowledges after fdatasync, once for all requests pending.

    Opening takes the writer's lock before it binds, so a second service cannot take the address
    over. Errors of a request (a full disk) go back to the client and the service goes on; an
    I/O error of the disk ends it.
    """

    def __init__(
        self,
        path: Path,
        address: str,
        segment_bytes: int = SEGMENT_BYTES,
        retention: Retention | None = None,
    ) -> None:
        self._writer = ReplayWriter(path, segment_bytes, retention=retention)
        try:
            self._server = RequestServer(address, REQUESTS, self._handle, self._commit)
        except BaseException:
            self._writer.close()
            raise
        self._durable_seq = self._writer.flush()
        self._given: dict[str, int] = {}

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._server.address

    def poll(self, timeout_s: float) -> int:
        """Wait up to timeout_s for requests and answer all pending ones; returns how many."""
        return self._server.poll(timeout_s)

    def serve(self, should_stop: Callable[[], bool], poll_s: float = 0.1) -> None:
        """Serve until should_stop() is true; it is asked at least every poll_s seconds or so."""
        while not should_stop():
            self.poll(poll_s)

    def _commit(self) -> None:
        self._durable_seq = self._writer.flush()

    def _handle(
        self, header: Any, arrays: Mapping[str, np.ndarray]
    ) -> tuple[msgspec.Struct, Mapping[str, np.ndarray]]:
        if isinstance(header, AppendRequest):
            return self._append(header, arrays), {}
        if isinstance(header, EpisodeRequest):
            return EpisodeReply(self._next_episode(header.stream)), {}
        if isinstance(header, ResumeRequest):
            return self._resume(header), {}
        counts = self._writer.counts()
        return (
            StatsReply(
                counts.steps,
                counts.episodes,
                counts.streams,
                counts.damaged,
                self._durable_seq,
                self._server.num_bad,
            ),
            {},
        )

    def _next_episode(self, stream: str) -> int:
        """A number is given out once, so that two clients of one stream do not get the same."""
        number = max(self._writer.next_episode(stream), self._given.get(stream, 0))
        self._given[stream] = number + 1
        return number

    def _resume(self, header: ResumeRequest) -> ResumeReply:
        # What was appended is durable before the reply leaves.
        above = {stream: self._writer.next_episode(stream) for stream, _ in header.episodes}
        return ResumeReply(
            tuple(self._writer.next_index(*episode) for episode in header.episodes),
            tuple(above[stream] for stream, _ in header.episodes),
        )

    def _append(self, header: AppendRequest, arrays: Mapping[str, np.ndarray]) -> AppendReply:
        payloads, lengths = arrays.get("payloads"), arrays.get("lengths")
        if payloads is None or lengths is None or len(arrays) != 2:
            raise CorruptDataError(
                f"append request with arrays {sorted(arrays)}; 'lengths' and 'payloads' are right"
            )
        if (
            payloads.dtype != np.uint8
            or lengths.dtype != np.uint32
            or payloads.ndim != 1
            or lengths.ndim != 1
            or not 0 < lengths.size <= MAX_BATCH_STEPS
            or payloads.size > MAX_BATCH_BYTES
            or int(lengths.sum(dtype=np.uint64)) != payloads.size
        ):
            raise CorruptDataError(
                f"append request with payloads {payloads.dtype} {payloads.shape} and lengths "
                f"{lengths.dtype} {lengths.shape}: uint8 and uint32 vectors are right, of at most "
                f"{MAX_BATCH_BYTES} and {MAX_BATCH_STEPS}, the lengths adding up to the payloads"
            )
        schema = _decode_schema(header.schema)
        data, start, num_new = payloads.data, 0, 0
        for length in lengths.tolist():
            num_new += self._writer.append_encoded(data[start : start + length], schema) is not None
            start += length
        # The reply leaves after the commit, which makes durable what is appended now.
        return AppendReply(self._writer.next_seq - 1, num_new, lengths.size - num_new)

    def close(self) -> None:
        """Stop listening, flush, give the directory up; safe to call twice."""
        self._server.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
