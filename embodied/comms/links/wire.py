"""Pieces to bytes and back: the generated code, and for parts the same bytes with fewer copies.

The generated code copies a part's data three times each way, which halves the throughput. Here
data are copied once when sent, and read where gRPC put them.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import crc32c
from google.protobuf.message import DecodeError

from embodied.comms.codec import Frame
from embodied.comms.links import link_pb2 as pb
from embodied.core.errors import CorruptDataError

# Else gRPC's threads are stopped and begun anew around every fork, in the child too; a child here
# only starts another program, such as a film's encoder, which then may not start.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

METHOD = "/embodied.link.v1.Link/Session"
SERVICE, _, RPC = METHOD[1:].partition("/")
VERSION = 1
"""Of the protocol; this release speaks no other."""
MAX_PIECE_BYTES = 1 << 20
MAX_REASON_CHARS = 4096
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_PIECE_BYTES + 4096),
    ("grpc.max_send_message_length", MAX_PIECE_BYTES + 4096),
)

_PART = 3 << 3 | 2
_DATA = 6 << 3 | 2
_CRC = 5 << 3 | 5
_VARINTS = (1 << 3, 2 << 3, 3 << 3, 4 << 3)
_MAX_HEAD = 80
"""A part's fields before data, and the two tags and sizes, take less however they are written."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who dials: name of the robot host, the run it wants ('' for none), its release."""

    host: str
    run: str
    software: str


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message: fields as in link.proto."""

    kind: int
    message: int
    offset: int
    total: int
    crc32c: int
    data: Frame


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def part_piece(kind: int, message: int, offset: int, total: int, views: Sequence[Frame]) -> bytes:
    """The piece of a part whose data are these views, one after the other."""
    checksum = size = 0
    for view in views:
        checksum = crc32c.crc32c(view, checksum)
        size += len(view)
    head = b"".join(
        bytes([tag]) + _varint(value)
        for tag, value in zip(_VARINTS, (kind, message, offset, total), strict=True)
        if value
    )
    if checksum:
        head += bytes([_CRC]) + checksum.to_bytes(4, "little")
    head += bytes([_DATA]) + _varint(size)
    return b"".join((bytes([_PART]), _varint(len(head) + size), head, *views))


def parse(raw: bytes) -> Part | pb.Piece:
    """A part, or another piece; CorruptDataError for what is none."""
    part = _part(raw) if len(raw) > _MAX_HEAD and raw[0] == _PART else None
    if part is not None:
        return part
    try:
        piece = pb.Piece.FromString(raw)
    except DecodeError as error:
        raise CorruptDataError(f"{len(raw)} bytes are no Piece of link.proto: {error}") from error
    body = piece.WhichOneof("body")
    if body is None:
        raise CorruptDataError("a piece without a body that this end knows")
    if body != "part":
        return piece
    found = piece.part
    return Part(found.kind, found.message, found.offset, found.total, found.crc32c, found.data)


def _part(raw: bytes) -> Part | None:
    """A part as `part_piece` writes it; None for any other encoding, right or wrong."""
    size, place = _read_varint(raw, 1)
    if place + size != len(raw):
        return None
    values = [0, 0, 0, 0]
    for number, tag in enumerate(_VARINTS):
        if raw[place] == tag:
            values[number], place = _read_varint(raw, place + 1)
    if min(values) < 0 or values[0] >= 1 << 32:
        return None
    checksum = 0
    if raw[place] == _CRC:
        checksum = int.from_bytes(raw[place + 1 : place + 5], "little")
        place += 5
    if raw[place] != _DATA:
        return None
    size, place = _read_varint(raw, place + 1)
    if size == 0 or place + size != len(raw):
        return None
    return Part(values[0], values[1], values[2], values[3], checksum, memoryview(raw)[place:])


def _read_varint(raw: bytes, place: int) -> tuple[int, int]:
    """Value and end of a number of at most 9 bytes; a longer one comes back negative."""
    value = 0
    for shift in range(0, 63, 7):
        byte = raw[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    return -1, place


def hello_piece(hello: Hello) -> bytes:
    """The first piece of a robot host."""
    return pb.Piece(
        hello=pb.Hello(
            min_version=VERSION,
            max_version=VERSION,
            host=hello.host,
            run=hello.run,
            software=hello.software,
        )
    ).SerializeToString()


def parse_hello(raw: bytes) -> Hello:
    """What a host says of itself; CorruptDataError unless it is a Hello of a version and with
    names that this end takes."""
    piece = parse(raw)
    if isinstance(piece, Part) or piece.WhichOneof("body") != "hello":
        raise CorruptDataError("the first piece of a session is no Hello")
    hello = piece.hello
    if not hello.min_version <= VERSION <= hello.max_version:
        raise CorruptDataError(
            f"the host speaks versions {hello.min_version} to {hello.max_version} of the link's "
            f"protocol and this gateway version {VERSION}: install the same release at both ends"
        )
    found = Hello(hello.host, hello.run, hello.software)
    if problem := problem_of(found):
        raise CorruptDataError(problem)
    return found


def problem_of(hello: Hello) -> str:
    """What is wrong with its names; '' if nothing is."""
    for what, name in (("host", hello.host), ("run", hello.run)):
        if not _NAME.fullmatch(name) and not (what == "run" and not name):
            return f"{what} {name[:80]!r} is no name: 1 to 64 letters, digits, '.', '_', '-' are"
    if len(hello.software) > 64 or not hello.software.isascii():
        return "the software's release must be at most 64 ASCII characters"
    return ""


def welcome_piece(software: str, refusal: str = "") -> bytes:
    """The first piece of a gateway."""
    version = 0 if refusal else VERSION
    welcome = pb.Welcome(version=version, software=software, refusal=refusal[:MAX_REASON_CHARS])
    return pb.Piece(welcome=welcome).SerializeToString()


def parse_welcome(raw: bytes) -> str:
    """Why the gateway refuses, '' if it does not; CorruptDataError for anything but a Welcome."""
    piece = parse(raw)
    if isinstance(piece, Part) or piece.WhichOneof("body") != "welcome":
        raise CorruptDataError("the gateway's first piece is no Welcome")
    welcome = piece.welcome
    if not welcome.version:
        return welcome.refusal[:MAX_REASON_CHARS] or "the gateway refused without a reason"
    if welcome.version != VERSION:
        raise CorruptDataError(
            f"the gateway chose version {welcome.version} of the protocol, which was not offered"
        )
    return ""


def goodbye_piece(reason: str) -> bytes:
    """Ends a session."""
    return pb.Piece(goodbye=pb.Goodbye(reason=reason[:MAX_REASON_CHARS])).SerializeToString()
