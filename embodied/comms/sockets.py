"""ZeroMQ sockets with every option set before connect or bind, and addresses inside one host."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import zmq

from embodied.comms.codec import MAX_ARRAY_BYTES, MAX_ARRAYS, Frame
from embodied.core.errors import ConfigError, CorruptDataError

MAX_IPC_PATH = 107
_LOOPBACK = re.compile(r"tcp://127\.0\.0\.1:(\d{1,5}|\*)")


def check_address(address: str) -> str:
    """Return the address if it stays inside this host; raise ConfigError that says why if not."""
    kind, _, rest = address.partition("://")
    if kind == "inproc" and rest:
        return address
    if kind == "ipc" and rest.startswith("/"):
        if len(rest.encode()) > MAX_IPC_PATH:
            raise ConfigError(
                f"address '{address}' has a path of {len(rest.encode())} bytes; Unix sockets "
                f"allow {MAX_IPC_PATH}: choose a shorter run directory"
            )
        return address
    if _LOOPBACK.fullmatch(address):
        return address
    if kind == "tcp":
        raise ConfigError(
            f"address '{address}' is not tcp://127.0.0.1:PORT: these channels are not encrypted "
            "and stay inside one host; links between hosts need mTLS"
        )
    raise ConfigError(
        f"address '{address}' is unknown; use ipc:///absolute/path, tcp://127.0.0.1:PORT or "
        "inproc://name"
    )


def open_socket(
    kind: int, address: str, *, bind: bool, options: Mapping[Any, int] | None = None
) -> zmq.Socket[bytes]:
    """A bound or connected socket of the process's context; `options` add to the common ones."""
    check_address(address)
    socket = zmq.Context.instance().socket(kind)
    common: dict[Any, int] = {
        zmq.LINGER: 0,
        zmq.SNDHWM: 1000,
        zmq.RCVHWM: 1000,
        zmq.IMMEDIATE: 1,
        zmq.MAXMSGSIZE: MAX_ARRAY_BYTES,
        zmq.RECONNECT_IVL: 20,
        zmq.RECONNECT_IVL_MAX: 500,
    }
    try:
        for option, value in (common | dict(options or {})).items():
            socket.setsockopt(option, value)
        if bind:
            socket.bind(address)
        else:
            socket.connect(address)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(
            f"cannot {'bind' if bind else 'connect to'} '{address}': {error}"
        ) from error
    return socket


def receive(socket: zmq.Socket[bytes], extra: int = 0) -> list[memoryview] | None:
    """The next message's frames, or None if there is none now.

    extra: frames allowed beside the codec's. Raises CorruptDataError, after reading it away, for
    a message of too many frames.
    """
    frames: list[memoryview] = []
    limit = 1 + MAX_ARRAYS + extra
    dropped = 0
    try:
        while True:
            frame = socket.recv(zmq.DONTWAIT, copy=False)
            if len(frames) < limit:
                frames.append(frame.buffer)
            else:
                dropped += 1
            if not frame.more:
                break
    except zmq.Again:
        return None
    if dropped:
        raise CorruptDataError(f"message of {limit + dropped} frames; at most {limit} are right")
    return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> bool:
    """Send a copy of the frames without waiting; False if the queue is full or nobody is there."""
    try:
        socket.send_multipart(frames, zmq.DONTWAIT)
    except zmq.Again:
        return False
    return True


class Channel:
    """What all channels share: an owned socket, its address, close. One thread may use it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.address = cast(bytes, socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def wait(self, timeout_s: float, events: int = zmq.POLLIN) -> bool:
        """Whether the socket becomes ready within timeout_s (negative counts as 0)."""
        return bool(self._socket.poll(max(0, round(timeout_s * 1000)), events))

    def close(self) -> None:
        """Close the socket; what was not sent is dropped. Safe to call twice."""
        self._socket.close(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
