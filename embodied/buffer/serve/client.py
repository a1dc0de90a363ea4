"""The actor's end of the buffer service: keeps every step until the service has it durably."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import msgspec
import numpy as np

from embodied.buffer.serve.messages import (
    MAX_BATCH_STEPS,
    REPLIES,
    AppendReply,
    AppendRequest,
    EpisodeReply,
    EpisodeRequest,
    StatsReply,
    StatsRequest,
)
from embodied.buffer.serve.patience import Patience
from embodied.buffer.steps.records import encode_step
from embodied.buffer.steps.schema import Codecs, Schema, encode_schema
from embodied.buffer.write.progress import StepOrderError
from embodied.comms.channels import ErrorReply, RequestClient, Requests
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, EmbodiedError, LinkError

_T = TypeVar("_T")
_WINDOW = 4
_POLL_S = 0.02
_SOFT_BATCH_BYTES = 8 << 20
_LINK_SILENCE_S = 60.0
_LAST_S = 0.5
# A lost predecessor and a full disk pass; any other refusal would come again.
_TRANSIENT = ("StepOrderError", "StorageFullError")


@dataclass(slots=True, eq=False)
class _Batch:
    schema: Schema
    payloads: list[bytearray] = field(default_factory=list)
    nbytes: int = 0
    sealed: bool = False
    request: int | None = None
    sent_s: float = 0.0
    resent: bool = False


@dataclass(frozen=True, slots=True)
class _Newest:
    episode: int
    index: int
    t_ns: int


class BufferClient:
    """Sends steps to a BufferService without waiting for it, a few batches in flight.

    Unacknowledged steps are kept, at most max_pending, and sent again in order once an answer is
    lost: the service may be killed and restarted at any time. A link tells when that is; where
    nobody can, it is when none comes for resend_s, or for longer where answers take longer.
    service: its address inside this host, or requests (of types REPLIES) over a link.
    It works while one of its methods is called: call flush at the end of an episode.
    over: whether the service has gone for good; no method then waits longer than a moment.
    last_error: the latest refusal that will be tried again (full disk).
    """

    def __init__(
        self,
        service: str | Requests,
        stream: str,
        *,
        batch_steps: int = 256,
        max_pending: int = 10_000,
        block_s: float = 10.0,
        resend_s: float = 2.0,
        codecs: Mapping[str, str] | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        if not 1 <= batch_steps <= MAX_BATCH_STEPS or max_pending < 1:
            raise ConfigError(
                f"batch_steps is {batch_steps} and max_pending {max_pending}; they must lie in "
                f"1..{MAX_BATCH_STEPS} and be at least 1"
            )
        self._codecs = Codecs(dict(codecs or {}))
        self._client: Requests = (
            RequestClient(service, REPLIES, over) if isinstance(service, str) else service
        )
        self._stream = stream
        self._batch_steps = batch_steps
        self._max_pending = max_pending
        self._block_s = block_s
        self._resend_s = resend_s
        self._over = over
        self._over_until_s: float | None = None
        self._patience = Patience(resend_s)
        self._heard_s = time.monotonic()
        self._queue: deque[_Batch] = deque()
        self._schemas: dict[str, Schema] = {}
        self._hold_until_s = 0.0
        self._refusal: EmbodiedError | None = None
        self._newest: dict[str, _Newest] = {}
        self._ends: dict[tuple[str, int], int] = {}
        self.unacknowledged = 0
        self.num_resent = 0
        self.last_error: EmbodiedError | None = None

    def add(self, step: Step) -> None:
        """Take a step and send what can be sent; waits only while max_pending are unacknowledged.

        Raises SpecError or StepOrderError for a wrong step, and after block_s of waiting
        LinkError or the service's own error; the step is not taken then.
        """
        schema = self._codecs.schema_of(step)
        known = self._schemas.get(step.stream)
        if known is not None and known is not schema:
            known.check_same_arrays(schema, f"step {step.key}", f"stream '{step.stream}'")
        self._check_order(step)
        payload = encode_step(step, schema)
        deadline = time.monotonic() + self._block_s
        while self.unacknowledged >= self._max_pending:
            self._wait(deadline, self._block_s)
        self._schemas[step.stream] = schema
        newest = self._newest.get(step.stream)
        if newest is None or newest.episode != step.episode or newest.index < step.index:
            self._newest[step.stream] = _Newest(step.episode, step.index, step.t_ns)
        if step.final:
            self._ends[step.stream, step.episode] = step.index
        tail = self._queue[-1] if self._queue else None
        full = tail is not None and (
            len(tail.payloads) >= self._batch_steps
            or tail.nbytes + len(payload) > _SOFT_BATCH_BYTES
        )
        if tail is None or tail.sealed or full or tail.schema is not schema:
            tail = _Batch(schema)
            self._queue.append(tail)
        tail.payloads.append(payload)
        tail.nbytes += len(payload)
        self.unacknowledged += 1
        self.pump()

    def _check_order(self, step: Step) -> None:
        end = self._ends.get((step.stream, step.episode))
        if end is not None and step.index > end:
            raise StepOrderError(
                f"step {step.key} does not continue its episode, which the final observation at "
                f"index {end} closed; it belongs to a new episode"
            )
        newest = self._newest.get(step.stream)
        if newest is None or newest.episode != step.episode or step.index <= newest.index:
            return
        if step.index > newest.index + 1:
            raise StepOrderError(
                f"step {step.key} does not continue its episode, whose last step has index "
                f"{newest.index}"
            )
        if step.t_ns < newest.t_ns:
            raise StepOrderError(
                f"step {step.key}: time goes backwards: t_ns is {step.t_ns}, of the step before "
                f"it {newest.t_ns}"
            )

    def pump(self) -> None:
        """Take in acknowledgements and send what can be sent, without waiting.

        Raises the service's error if it refused a step for good, now and ever after.
        """
        for reply in self._client.receive_ready():
            batch = next((b for b in self._queue if b.request == reply.id), None)
            if batch is not None:
                self._take_reply(batch, reply.header)
        if self._refusal is not None:
            raise self._refusal
        now_s = time.monotonic()
        flying = [batch for batch in self._queue if batch.request is not None]
        if flying and self._lost(flying, now_s):
            self._rewind()
            flying = []
        if now_s >= self._hold_until_s:
            self._send(len(flying), now_s)

    def _lost(self, flying: list[_Batch], now_s: float) -> bool:
        """Whether what is under way must be sent again."""
        known = [self._client.lost(batch.request) for batch in flying if batch.request is not None]
        if any(known):
            return True
        silence_s = now_s - self._heard_s
        if None not in known:
            return silence_s > _LINK_SILENCE_S
        if silence_s <= self._patience.timeout_s:
            return False
        self._patience.ran_out()
        return True

    def _take_reply(self, batch: _Batch, header: Any) -> None:
        self._heard_s = time.monotonic()
        if isinstance(header, AppendReply):
            self._queue.remove(batch)
            if not batch.resent:
                self._patience.measured(self._heard_s - batch.sent_s)
            self.unacknowledged -= len(batch.payloads)
            self.last_error = None
        elif isinstance(header, ErrorReply):
            gap = header.kind == StepOrderError.__name__
            error = StepOrderError(header.message) if gap else header.exception()
            if header.kind in _TRANSIENT:
                self.last_error = error
                self._rewind()
                self._hold_until_s = time.monotonic() + self._resend_s / 4
            else:
                self._refusal = error

    def _rewind(self) -> None:
        for batch in self._queue:
            if batch.request is not None:
                self._client.forget(batch.request)
                batch.request, batch.resent = None, True
                self.num_resent += 1

    def _send(self, num_flying: int, now_s: float) -> None:
        for batch in self._queue:
            if num_flying >= _WINDOW:
                return
            if batch.request is not None:
                continue
            # While others are under way, a batch that could still grow waits for their answer.
            if num_flying and batch is self._queue[-1] and not batch.sealed:
                full = len(batch.payloads) >= self._batch_steps
                if not full and batch.nbytes < _SOFT_BATCH_BYTES:
                    return
            arrays = {
                "payloads": np.frombuffer(b"".join(batch.payloads), np.uint8),
                "lengths": np.array([len(payload) for payload in batch.payloads], np.uint32),
            }
            request = AppendRequest(encode_schema(batch.schema))
            batch.request = self._client.send(request, arrays)
            if batch.request is None:
                return
            if not num_flying:  # silence is counted from here
                self._heard_s = now_s
            batch.sealed, batch.sent_s = True, now_s
            num_flying += 1

    def _wait(self, deadline: float, timeout_s: float) -> None:
        """Wait for the service to say something, and take it in."""
        if self._over_until_s is None and self._over():
            self._over_until_s = time.monotonic() + _LAST_S
        if self._over_until_s is not None:
            deadline = min(deadline, self._over_until_s)
        remaining_s = max(0.0, deadline - time.monotonic())
        before = self.unacknowledged
        self._client.wait(min(remaining_s, _POLL_S))
        self.pump()
        if (
            remaining_s > 0 or self.unacknowledged < before
        ):  # it came while this process stood still
            return
        if self.last_error is not None:
            raise self.last_error
        why = f"within {timeout_s:g} s; they are kept. Is the buffer service running?"
        if self._over_until_s is not None:
            why = "before it ended"
        raise LinkError(
            f"{self.unacknowledged} steps were not acknowledged by {self._client.address} {why}"
        )

    def flush(self, timeout_s: float = 10.0) -> None:
        """Return when all steps are durable; LinkError, or why the service refuses, if not."""
        deadline = time.monotonic() + timeout_s
        self.pump()
        while self.unacknowledged:
            self._wait(deadline, timeout_s)

    def next_episode(self, stream: str | None = None, timeout_s: float = 10.0) -> int:
        """Smallest number above all episodes of the stream (None: the client's own), those not
        yet sent included. Raises LinkError."""
        stream = self._stream if stream is None else stream
        reply = self._ask(EpisodeRequest(stream), EpisodeReply, timeout_s)
        newest = self._newest.get(stream)
        return max(reply.episode, newest.episode + 1 if newest else 0)

    def stats(self, timeout_s: float = 10.0) -> StatsReply:
        """What the service's buffer holds. Raises LinkError."""
        return self._ask(StatsRequest(), StatsReply, timeout_s)

    def _ask(self, request: msgspec.Struct, expected: type[_T], timeout_s: float) -> _T:
        header, _ = self._client.request(request, {}, timeout_s)
        if not isinstance(header, expected):
            raise LinkError(f"the buffer service answered with {type(header).__name__}")
        return header

    def close(self) -> None:
        """Close the link; unacknowledged steps are given up: flush before."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
