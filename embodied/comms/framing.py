"""Messages on a stream of bytes.

A message is its size, an id, the number of the codec's frames and their sizes, then the frames,
each at a multiple of 8 bytes so that arrays need not be copied.
"""

import struct
from collections.abc import Iterator, Sequence

from embodied.comms.codec import MAX_ARRAYS, Frame
from embodied.core.errors import CorruptDataError

PIECE = 1 << 18
"""Bytes to read at a time."""

_HEAD = struct.Struct("<IIQ")
_SIZES = [struct.Struct(f"<{n}I") for n in range(MAX_ARRAYS + 2)]
_ALIGNMENT = 8


def parts(number: int, frames: Sequence[Frame]) -> list[Frame]:
    """The message with this id and these frames of the codec, in parts that follow one another:
    the frames themselves and what goes between them."""
    sizes = [memoryview(frame).nbytes for frame in frames]
    table = _SIZES[len(sizes)].pack(*sizes)
    found: list[Frame] = [b"", table]
    place = _HEAD.size + len(table)
    for frame, size in zip(frames, sizes, strict=True):
        if gap := -place % _ALIGNMENT:
            found.append(bytes(gap))
        found.append(frame)
        place += gap + size
    found[0] = _HEAD.pack(place, len(sizes), number)
    return found


def pack(number: int, frames: Sequence[Frame]) -> bytes:
    """The message with this id and these frames of the codec."""
    return b"".join(parts(number, frames))


def unpack(message: Frame) -> tuple[int, list[memoryview]]:
    """The id and the frames; CorruptDataError if they do not fill the message."""
    view = memoryview(message)
    if view.nbytes < _HEAD.size:
        raise CorruptDataError(f"message of {view.nbytes} bytes; at least {_HEAD.size} are right")
    total, count, number = _HEAD.unpack_from(message)
    if total != view.nbytes:
        raise CorruptDataError(f"message of {view.nbytes} bytes that says it has {total}")
    if not 1 <= count <= 1 + MAX_ARRAYS:
        raise CorruptDataError(f"message of {count} frames; 1 to {1 + MAX_ARRAYS} are right")
    place = _HEAD.size + _SIZES[count].size
    if place > total:
        raise CorruptDataError(f"message of {total} bytes is too short for {count} frames")
    frames: list[memoryview] = []
    for size in _SIZES[count].unpack_from(message, _HEAD.size):
        place += -place % _ALIGNMENT
        frames.append(view[place : place + size])
        place += size
    if place != total:
        raise CorruptDataError(f"frames of {place} bytes in a message of {total}")
    return number, frames


class Stream:
    """Cuts what comes over a socket into messages of at most `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._rest = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        self._rest += data

    def messages(self) -> Iterator[bytes]:
        """Whole messages, oldest first. CorruptDataError for a size that cannot be right: what
        follows cannot be read either."""
        rest = self._rest
        while len(rest) >= _HEAD.size:
            [total] = struct.unpack_from("<I", rest)
            if not _HEAD.size <= total <= self._most:
                raise CorruptDataError(f"message of {total} bytes; at most {self._most} are right")
            if len(rest) < total:
                return
            message = bytes(memoryview(rest)[:total])
            del rest[:total]
            yield message
