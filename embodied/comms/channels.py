"""Channels inside one host: requests with replies, the newest value, and bounded telemetry."""

import itertools
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import zmq

from embodied.comms.codec import (
    Message,
    Types,
    check_types,
    decode,
    encode,
    members_of,
)
from embodied.comms.sockets import Channel, open_socket, receive, send
from embodied.core import errors
from embodied.core.errors import CorruptDataError, EmbodiedError, LinkError

Handler = Callable[[Any, dict[str, np.ndarray]], tuple[msgspec.Struct, Mapping[str, np.ndarray]]]

_ID = struct.Struct("<Q")
_MAX_ERROR_CHARS = 4096
_GLANCE_S = 0.1


class ErrorReply(msgspec.Struct, frozen=True, tag="error", forbid_unknown_fields=True):
    """A handler refused. kind: name of the error's class; message: its text."""

    kind: str
    message: str

    def exception(self) -> EmbodiedError:
        """The error as raised by the handler, or its base if this end does not know the class."""
        known = getattr(errors, self.kind, EmbodiedError)
        usable = isinstance(known, type) and issubclass(known, EmbodiedError)
        return (known if usable else EmbodiedError)(self.message)


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to the request `id`; header may be an ErrorReply."""

    id: int
    header: Any
    arrays: dict[str, np.ndarray]


class Requests(Protocol):
    """A client's end of requests with replies, whatever carries them; one thread may use it.

    RequestClient inside a host; links between hosts have the same.
    """

    address: str

    def send(self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> int | None:
        """Send without waiting; the request's id, or None if nobody is connected or it is full."""
        ...

    def receive_ready(self) -> list[Reply]:
        """All replies that have come to requests made by `send`, without waiting."""
        ...

    def forget(self, number: int) -> None:
        """Discard the reply to this request if it still comes."""
        ...

    def lost(self, number: int) -> bool | None:
        """Whether no reply to this request will come; None if that cannot be known."""
        ...

    def request(
        self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray], timeout_s: float
    ) -> Message:
        """Send, wait, return (header, arrays). Raises LinkError after timeout_s or once it is over,
        or the error with which the server refused."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Whether a reply comes within timeout_s."""
        ...

    def close(self) -> None:
        """Take no more replies. Safe to call twice."""
        ...


class RequestServer(Channel):
    """Answers requests of many clients, one at a time.

    handler: (header, arrays) → (header, arrays); an EmbodiedError from it becomes an ErrorReply,
    any other exception is a bug and is raised. commit: called once per poll after the handlers
    and before any reply leaves, so that many requests share one fsync; if it raises an
    EmbodiedError, that is what all of them get. num_bad: messages that could not be decoded, which
    are answered with the reason if they bear an id. Binding takes a Unix socket's path over from
    whoever held it: lock first.
    """

    def __init__(
        self,
        address: str,
        types: Types,
        handler: Handler,
        commit: Callable[[], None] | None = None,
        max_batch: int = 256,
    ) -> None:
        check_types(types)
        super().__init__(open_socket(zmq.ROUTER, address, bind=True))
        self._types = types
        self._handler = handler
        self._commit = commit
        self._max_batch = max_batch
        self.num_bad = 0

    def poll(self, timeout_s: float) -> int:
        """Wait up to timeout_s, then answer all pending requests; returns how many."""
        if not self.wait(timeout_s):
            return 0
        replies: list[tuple[list[bytes], msgspec.Struct, Mapping[str, np.ndarray]]] = []
        for _ in range(self._max_batch):
            try:
                frames = receive(self._socket, extra=2)
                if frames is None:
                    break
                envelope = envelope_of(frames)
            except CorruptDataError:
                self.num_bad += 1
                continue
            try:
                header, arrays = decode(frames[2:], self._types)
            except CorruptDataError as error:
                self.num_bad += 1
                replies.append((envelope, error_reply(error), {}))
                continue
            try:
                replies.append((envelope, *self._handler(header, arrays)))
            except EmbodiedError as error:
                replies.append((envelope, error_reply(error), {}))
        refusal: ErrorReply | None = None
        if replies and self._commit is not None:
            try:
                self._commit()
            except EmbodiedError as error:
                refusal = error_reply(error)
        for envelope, header, arrays in replies:
            if refusal is not None and not isinstance(header, ErrorReply):
                header, arrays = refusal, {}
            send(self._socket, [*envelope, *encode(header, arrays)])
        return len(replies)


def envelope_of(frames: Sequence[memoryview]) -> list[bytes]:
    """What leads the answer to a request's sender. CorruptDataError if it bears no id."""
    if len(frames) < 3 or frames[1].nbytes != _ID.size:
        raise CorruptDataError(f"request of {len(frames)} frames without an id")
    return [bytes(frame) for frame in frames[:2]]


def error_reply(error: EmbodiedError) -> ErrorReply:
    """What a client is told of a handler's refusal."""
    return ErrorReply(type(error).__name__, str(error)[:_MAX_ERROR_CHARS])


class RequestClient(Channel):
    """Asks a RequestServer: one request at a time, or several in flight.

    The server may restart; requests that it did not answer are then lost and must be sent again.
    over: whether nobody will answer ever more; then `request` does not wait any longer.
    num_late: replies nobody waited for any more. num_bad: replies that could not be decoded.
    """

    def __init__(
        self, address: str, types: Types, over: Callable[[], bool] = lambda: False
    ) -> None:
        self._types = (*members_of(types), ErrorReply)
        check_types(self._types)
        super().__init__(open_socket(zmq.DEALER, address, bind=False))
        self._over = over
        self._ids = itertools.count()
        self._waiting: set[int] = set()
        self._ready: deque[Reply] = deque()
        self.num_late = 0
        self.num_bad = 0

    def send(self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> int | None:
        """Send without waiting; the request's id, or None if nobody is connected or it is full."""
        number = next(self._ids)
        if not send(self._socket, [_ID.pack(number), *encode(header, arrays)]):
            return None
        self._waiting.add(number)
        return number

    def receive_ready(self) -> list[Reply]:
        """All replies that have come to requests made by `send`, without waiting."""
        self._drain()
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def forget(self, number: int) -> None:
        """Discard the reply to this request if it still comes."""
        self._waiting.discard(number)

    def lost(self, number: int) -> bool | None:
        """None: a server that was started anew does not tell what it had not answered."""
        return None

    def request(
        self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray], timeout_s: float
    ) -> Message:
        """Send, wait, return (header, arrays). Raises LinkError after timeout_s or once it is over,
        or the error with which the server refused."""
        deadline = time.monotonic() + timeout_s
        while (number := self.send(header, arrays)) is None:
            self._wait(deadline, timeout_s, zmq.POLLOUT)
        try:
            while (reply := self._take(number)) is None:
                self._wait(deadline, timeout_s, zmq.POLLIN)
        finally:
            self.forget(number)
        if isinstance(reply.header, ErrorReply):
            raise reply.header.exception()
        return reply.header, reply.arrays

    def _wait(self, deadline: float, timeout_s: float, events: int) -> None:
        remaining_s = deadline - time.monotonic()
        if self.wait(min(remaining_s, _GLANCE_S), events):
            return
        if self._over():
            raise LinkError(f"no answer from {self.address}, and none will come: it has ended")
        if remaining_s <= 0:
            raise LinkError(
                f"no answer from {self.address} in {timeout_s:g} s; is its process running?"
            )

    def _take(self, number: int) -> Reply | None:
        self._drain()
        for reply in self._ready:
            if reply.id == number:
                self._ready.remove(reply)
                return reply
        return None

    def _drain(self) -> None:
        while True:
            try:
                frames = receive(self._socket, extra=1)
                if frames is None:
                    return
                if len(frames) < 2 or frames[0].nbytes != _ID.size:
                    raise CorruptDataError(f"reply of {len(frames)} frames without an id")
                number = _ID.unpack(frames[0])[0]
                if number not in self._waiting:
                    self.num_late += 1
                    continue
                self._ready.append(Reply(number, *decode(frames[1:], self._types)))
                self._waiting.remove(number)
            except CorruptDataError:
                self.num_bad += 1


class PushChannel(Channel):
    """Sends telemetry, never waits. num_dropped: messages given up because the queue was full."""

    def __init__(self, address: str, max_queued: int = 1000) -> None:
        options = {zmq.SNDHWM: max_queued}
        super().__init__(open_socket(zmq.PUSH, address, bind=False, options=options))
        self.num_dropped = 0

    def send(self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> bool:
        """Send or drop; whether it was sent."""
        sent = send(self._socket, encode(header, arrays))
        self.num_dropped += not sent
        return sent


class PullChannel(Channel):
    """Collects what PushChannels send. num_bad: messages that could not be decoded."""

    def __init__(self, address: str, types: Types, max_queued: int = 1000) -> None:
        check_types(types)
        options = {zmq.RCVHWM: max_queued}
        super().__init__(open_socket(zmq.PULL, address, bind=True, options=options))
        self._types = types
        self.num_bad = 0

    def receive_ready(self, max_messages: int = 1000) -> Iterator[Message]:
        """Messages that have come, oldest first, without waiting."""
        for _ in range(max_messages):
            try:
                frames = receive(self._socket)
                if frames is None:
                    return
                yield decode(frames, self._types)
            except CorruptDataError:
                self.num_bad += 1
