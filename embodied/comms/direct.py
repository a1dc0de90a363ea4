"""Requests with replies over a plain Unix socket, for loops in which every wake-up counts.

The same calls as RequestServer and RequestClient. ZeroMQ hands a message from the caller to a
thread of its own and back at either end; here the only threads that wake are the two that talk.
"""

import errno
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

import msgspec
import numpy as np

from embodied.comms.channels import ErrorReply, Handler, error_reply
from embodied.comms.codec import (
    Message,
    Types,
    check_types,
    decode,
    encode,
    members_of,
)
from embodied.comms.framing import PIECE, Stream, pack, unpack
from embodied.comms.sockets import check_address
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError, LinkError

MAX_REQUEST_BYTES = 16 << 20
MAX_REPLY_BYTES = 1 << 30
MAX_CLIENTS = 64
_CONNECT_S = 0.005


class _Client:
    """A client as the server sees it. outgoing: what could not be sent yet."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.stream = Stream(MAX_REQUEST_BYTES)
        self.outgoing = memoryview(b"")


class DirectServer:
    """Answers requests of many clients, one at a time; one thread may use it.

    handler: as RequestServer's. A client gets no further answer before it has taken the last one,
    so a slow one delays and fills nothing. A message that cannot be decoded is answered with the
    reason; one whose size cannot be right ends its connection. num_bad: how many there were.
    Binding takes the socket's path over from whoever held it.
    """

    def __init__(self, address: str, types: Types, handler: Handler) -> None:
        check_types(types)
        self.address = address
        self.num_bad = 0
        self._types = members_of(types)  # a union's hash is slow
        self._handler = handler
        self._clients: dict[int, _Client] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        path = _path(address)
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._listener.bind(path)
            self._listener.listen(MAX_CLIENTS)
        except OSError as error:
            self._listener.close()
            raise ConfigError(f"cannot bind '{address}': {error}") from error
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)

    def poll(self, timeout_s: float) -> int:
        """Wait up to timeout_s, then answer what has come; returns how many requests."""
        answered = 0
        for handle, event in self._poll.poll(max(0, round(timeout_s * 1000))):
            client = self._clients.get(handle)
            if client is None:
                self._accept()
                continue
            try:
                answered += self._serve(client, event)
            except CorruptDataError:
                self.num_bad += 1
                self._drop(client)
            except OSError:
                self._drop(client)
        return answered

    def close(self) -> None:
        """Close all connections; safe to call twice."""
        for client in list(self._clients.values()):
            self._drop(client)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        if len(self._clients) >= MAX_CLIENTS:
            link.close()
            return
        link.setblocking(False)
        self._clients[link.fileno()] = _Client(link)
        self._poll.register(link, select.POLLIN)

    def _drop(self, client: _Client) -> None:
        handle = client.link.fileno()
        if self._clients.pop(handle, None) is not None:
            self._poll.unregister(handle)
        client.link.close()

    def _serve(self, client: _Client, event: int) -> int:
        if event & select.POLLOUT:
            self._send(client, client.outgoing)
        else:
            data = client.link.recv(PIECE)
            if not data:
                raise OSError(errno.EPIPE, "closed by the client")
            client.stream.feed(data)
        answered = 0
        if not client.outgoing:
            for message in client.stream.messages():
                self._send(client, memoryview(self._answer(message)))
                answered += 1
                if client.outgoing:
                    break
        return answered

    def _answer(self, message: bytes) -> bytes:
        header: msgspec.Struct
        number, frames = unpack(message)
        try:
            header, arrays = self._handler(*decode(frames, self._types))
        except EmbodiedError as error:
            self.num_bad += isinstance(error, CorruptDataError)
            header, arrays = error_reply(error), {}
        return pack(number, encode(header, arrays))

    def _send(self, client: _Client, data: memoryview) -> None:
        waited = bool(client.outgoing)
        try:
            sent = client.link.send(data)
        except BlockingIOError:
            sent = 0
        client.outgoing = data[sent:]
        if waited != bool(client.outgoing):
            self._poll.modify(client.link, select.POLLOUT if client.outgoing else select.POLLIN)


class DirectClient:
    """Asks a DirectServer, one request at a time; one thread may use it.

    The server may come later, and restart: a request is sent anew only if it cannot have arrived.
    num_late: replies that came after their request was given up.
    """

    def __init__(self, address: str, types: Types) -> None:
        self._types = (*members_of(types), ErrorReply)
        check_types(self._types)
        self.address = address
        self.num_late = 0
        self._path = _path(address)
        self._ids = itertools.count()
        self._link: socket.socket | None = None
        self._stream = Stream(MAX_REPLY_BYTES)
        self._timeout_s = 0.0

    def request(
        self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray], timeout_s: float
    ) -> Message:
        """Send, wait, return (header, arrays). Raises LinkError after timeout_s, or as soon as
        the server ends over it, or the error with which it refused."""
        number = next(self._ids)
        message = pack(number, encode(header, arrays))
        deadline_s = time.monotonic() + timeout_s
        try:
            reply = self._exchange(message, number, deadline_s, timeout_s)
        except BlockingIOError:
            raise self._silent(timeout_s) from None
        except (OSError, CorruptDataError) as error:
            self.close()
            raise LinkError(f"{self.address} broke off: {error}") from error
        if isinstance(reply[0], ErrorReply):
            raise reply[0].exception()
        return reply

    def close(self) -> None:
        """Disconnect; the next request connects anew. Safe to call twice."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(
        self, message: bytes, number: int, deadline_s: float, timeout_s: float
    ) -> Message:
        """Send and receive; over a new connection if the last one's server has gone before.

        Linux resets a connection whose server ends with a message unread, and only then.
        """
        while True:
            link = self._link or self._connect(deadline_s, timeout_s)
            if timeout_s != self._timeout_s:
                self._limit(link, timeout_s)
            try:
                self._send(link, message)
                return self._receive(link, number, deadline_s)
            except (BrokenPipeError, ConnectionResetError):
                self.close()
                if time.monotonic() >= deadline_s:
                    raise self._silent(timeout_s) from None
                time.sleep(_CONNECT_S)

    def _send(self, link: socket.socket, message: bytes) -> None:
        try:
            link.sendall(message)
        except BlockingIOError:  # a part of it may be on its way
            self.close()
            raise

    def _connect(self, deadline_s: float, timeout_s: float) -> socket.socket:
        while True:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._limit(link, timeout_s)
                link.connect(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                link.close()
            except BaseException:
                link.close()
                raise
            else:
                self._link, self._stream = link, Stream(MAX_REPLY_BYTES)
                return link
            if time.monotonic() >= deadline_s:
                raise self._silent(timeout_s)
            time.sleep(_CONNECT_S)

    def _limit(self, link: socket.socket, timeout_s: float) -> None:
        """Let the kernel end the waiting: one call where a poll and a read would be two."""
        limit = struct.pack("ll", *divmod(max(1, round(timeout_s * 1e6)), 1_000_000))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._timeout_s = timeout_s

    def _receive(self, link: socket.socket, number: int, deadline_s: float) -> Message:
        while True:
            for message in self._stream.messages():
                found, frames = unpack(message)
                if found == number:
                    return decode(frames, self._types)
                self.num_late += 1
            if time.monotonic() >= deadline_s:
                raise BlockingIOError
            data = link.recv(PIECE)
            if not data:
                raise OSError(errno.EIO, "its process ended before it answered")
            self._stream.feed(data)

    def _silent(self, timeout_s: float) -> LinkError:
        return LinkError(
            f"no answer from {self.address} in {timeout_s:g} s; is its process running?"
        )


def _path(address: str) -> str:
    kind, _, path = check_address(address).partition("://")
    if kind != "ipc":
        raise ConfigError(f"address '{address}' is no Unix socket; ipc:///absolute/path is right")
    return path
