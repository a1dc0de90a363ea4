"""Requests whose answers take their time: a server that answers in any order."""

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
import zmq

from embodied.comms.channels import envelope_of, error_reply
from embodied.comms.codec import Types, check_types, decode, encode
from embodied.comms.sockets import Channel, open_socket, receive, send
from embodied.core.errors import CorruptDataError, EmbodiedError

Answer = tuple[msgspec.Struct, Mapping[str, np.ndarray]]
Promise = Callable[[Any, dict[str, np.ndarray]], "Future[Answer]"]

_WOKEN_BYTES = 4096


class DeferredServer(Channel):
    """Answers requests of RequestClients when their answers are there, in any order.

    handler: (header, arrays) → future of (header, arrays), called by the thread that polls; any
    thread may complete the future. An EmbodiedError from either becomes an ErrorReply, any other
    exception is a bug and is raised. How many requests wait at once is the handler's to bound.
    num_bad: messages that could not be decoded, which are answered with the reason if they bear an
    id. Binding takes a Unix socket's path over from whoever held it: lock first.
    """

    def __init__(self, address: str, types: Types, handler: Promise, max_batch: int = 256) -> None:
        check_types(types)
        super().__init__(open_socket(zmq.ROUTER, address, bind=True))
        self._types = types
        self._handler = handler
        self._max_batch = max_batch
        self._ready: deque[tuple[list[bytes], Future[Answer]]] = deque()
        self._woken, self._bell = socket.socketpair()
        self._woken.setblocking(False)
        self._bell.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        self.num_bad = 0

    def poll(self, timeout_s: float) -> int:
        """Wait up to timeout_s for requests or answers; send all answers that are there, then take
        the requests that have come. Returns how many answers were sent."""
        self._poller.poll(max(0, round(timeout_s * 1000)))
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(_WOKEN_BYTES)
        sent = self._answer()
        for _ in range(self._max_batch):
            try:
                frames = receive(self._socket, extra=2)
                if frames is None:
                    break
                envelope = envelope_of(frames)
            except CorruptDataError:
                self.num_bad += 1
                continue
            future = self._promised(frames[2:])
            future.add_done_callback(lambda done, to=envelope: self._done(to, done))
        return sent + self._answer()

    def _promised(self, frames: Sequence[memoryview]) -> "Future[Answer]":
        refused: Future[Answer] = Future()
        try:
            header, arrays = decode(frames, self._types)
        except CorruptDataError as error:
            self.num_bad += 1
            refused.set_exception(error)
            return refused
        try:
            return self._handler(header, arrays)
        except EmbodiedError as error:
            refused.set_exception(error)
            return refused

    def _done(self, envelope: list[bytes], future: "Future[Answer]") -> None:
        self._ready.append((envelope, future))
        with contextlib.suppress(OSError):  # the pipe is full, so it will wake; or closed
            self._bell.send(b"\0")

    def _answer(self) -> int:
        sent = 0
        while self._ready:
            envelope, future = self._ready.popleft()
            error = future.exception()
            if isinstance(error, EmbodiedError):
                header, arrays = error_reply(error), {}
            else:
                header, arrays = future.result()
            send(self._socket, [*envelope, *encode(header, arrays)])
            sent += 1
        return sent

    def close(self) -> None:
        """Close the socket; who still waits gets no answer. Safe to call twice."""
        super().close()
        self._woken.close()
        self._bell.close()
