"""How each port of `ports.PORTS` is attacked, and asked by the honest."""

import contextlib
import socket
import struct
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zmq
from linking import KIND, RawHost, wait_for
from ports import Port

from embodied.comms.channels import ErrorReply, PushChannel, RequestClient
from embodied.comms.codec import decode
from embodied.comms.direct import MAX_REPLY_BYTES, DirectClient
from embodied.comms.framing import Stream, pack, unpack
from embodied.comms.links import wire
from embodied.comms.links.client import Link
from embodied.core.errors import EmbodiedError
from embodied.run.telemetry import Beat

HONEST = wire.Hello("honest", "", "")
_TIMEOUT_S = 20.0
_ID = struct.Struct("<Q")
_AT_ONCE = 16

Messages = Mapping[str, list[bytes]]
Answers = dict[str, str | None]
"""Name → the port's refusal; None: it said nothing, or closed the connection."""


def _refusal(frames) -> str:
    header, _ = decode(frames, ErrorReply)
    return f"{header.kind}: {header.message}"


def requests(address: str, messages: Messages) -> Answers:
    """Over ZeroMQ, with an id before each."""
    link = zmq.Context.instance().socket(zmq.DEALER)
    link.setsockopt(zmq.LINGER, 0)
    link.setsockopt(zmq.RCVTIMEO, round(1000 * _TIMEOUT_S))
    link.connect(address)
    answers: Answers = {}
    with contextlib.closing(link):
        for number, (name, frames) in enumerate(messages.items()):
            link.send_multipart([_ID.pack(number), *frames])
            echoed, *reply = link.recv_multipart()
            assert echoed == _ID.pack(number)
            answers[name] = _refusal(reply)
    return answers


def push(address: str, messages: Messages) -> Answers:
    """Over ZeroMQ, without answers."""
    link = zmq.Context.instance().socket(zmq.PUSH)
    link.setsockopt(zmq.LINGER, round(1000 * _TIMEOUT_S))
    link.connect(address)
    with contextlib.closing(link):
        for frames in messages.values():
            link.send_multipart(frames)
    return dict.fromkeys(messages)


def direct(address: str, messages: Messages) -> Answers:
    """Over a Unix socket, a connection for each."""
    answers: Answers = {}
    for number, (name, frames) in enumerate(messages.items()):
        stream = Stream(MAX_REPLY_BYTES)
        with dial(address) as link:
            link.sendall(pack(number, frames))
            found: list[bytes] = []
            while not found and (data := link.recv(1 << 16)):
                stream.feed(data)
                found = list(stream.messages())
        answers[name] = _refusal(unpack(found[0])[1]) if found else None
    return answers


def link(address: str, kind: str, messages: Messages) -> Answers:
    """As a robot host's requests of a kind, several in each session."""
    answers: Answers = {}
    names = [name for name, frames in messages.items() if sum(map(len, frames)) < 900_000]
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        with RawHost(address) as host:
            assert host.hello(HONEST).version == 1
            for number, name in enumerate(some, 1):
                whole = pack(number, messages[name])
                host.send(wire.part_piece(KIND[kind].id, number, 0, len(whole), [whole]))
            for _ in some:
                number, frames = unpack(host.until("part").data)
                answers[some[number - 1]] = _refusal(frames)
    return answers


def strike(port: Port, address: str, messages: Messages) -> Answers:
    """Send all messages as the port is spoken to."""
    match port.wire:
        case "requests":
            return requests(address, messages)
        case "direct":
            return direct(address, messages)
        case "push":
            return push(address, messages)
        case "link":
            return link(address, port.kind, messages)
        case "http" | "bytes":
            raw(address, {name: b"".join(frames) for name, frames in messages.items()})
            return {}


def raw(address: str, streams: Mapping[str, bytes]) -> None:
    """Send bytes to the socket itself, each over a connection that then ends."""
    for data in streams.values():
        with dial(address) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


def dial(address: str) -> socket.socket:
    """A connection to the socket itself."""
    path = address.removeprefix("ipc://")
    if path == address:
        host, _, port = address.rpartition(":")
        made = socket.create_connection((host, int(port)))
    else:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.connect(path)
    made.settimeout(0.5)
    return made


def serves(port: Port, address: str, folder: Path, number: int) -> bool:
    """Whether an honest client is served. number: another one at each call."""
    match port.wire:
        case "push":
            return _beats(address, folder / "beats", number)
        case "http" | "bytes":
            return _answers(address)
        case _:
            return _asked(port, address) == port.answer


def _asked(port: Port, address: str) -> str:
    assert port.honest is not None
    with contextlib.ExitStack() as stack:
        client: Any
        if port.wire == "link":
            honest = stack.enter_context(Link(address, HONEST, None))
            client = honest.requests(port.kind, port.types)
        else:
            kind: Any = DirectClient if port.wire == "direct" else RequestClient
            client = stack.enter_context(kind(address, port.types))
        try:
            header, _ = client.request(port.honest, {}, _TIMEOUT_S)
        except EmbodiedError as error:
            return type(error).__name__
        return type(header).__name__


def _beats(address: str, told: Path, number: int) -> bool:
    with PushChannel(address) as channel:

        def arrived() -> bool:
            channel.send(Beat("honest", number, {}), {})
            return told.exists() and told.read_text() == str(number)

        wait_for(arrived)
    return True


def _answers(address: str) -> bool:
    """Prometheus has the page, virtual cameras say that they have not."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as page:
            return page.status == 200
    except urllib.error.HTTPError as error:
        return error.code == 404
