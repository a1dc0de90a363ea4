"""Strict wire codec: a typed header and named arrays to frames and back. Data is never code.

Frame 0 is b"EMB", one byte of protocol version, then msgpack [header, [[name, dtype, shape], …]];
each array follows as one raw frame, little-endian, C order. Every size is checked before
anything is allocated for it.
"""

import math
import sys
import types as python_types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Union, cast, get_args

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, CorruptDataError, SpecError

PROTOCOL = 1
MAX_ARRAYS = 256
MAX_DIMS = 8
MAX_HEADER_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 30
DTYPES = {
    name: np.dtype(name)
    for name in (
        "bool",
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
        *(f"float{bits}" for bits in (16, 32, 64)),
    )
}
"""The only dtypes that cross a boundary."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

if sys.byteorder != "little":
    raise ImportError("embodied.comms.codec writes native arrays and needs a little-endian machine")

Frame = bytes | bytearray | memoryview
Message = tuple[Any, dict[str, np.ndarray]]
Types = type[msgspec.Struct] | tuple[type[msgspec.Struct], ...] | python_types.UnionType

_MAGIC = b"EMB"
_PREFIX = len(_MAGIC) + 1
_BEGIN = _MAGIC + bytes([PROTOCOL])
_SMALL_BYTES = 1 << 10
"""Arrays up to this size are copied: faster than three views of them."""

_encoder = msgspec.msgpack.Encoder()


class _Entry(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_ARRAY_BYTES)], ...],
        msgspec.Meta(max_length=MAX_DIMS),
    ]


class _Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    header: msgspec.Raw
    arrays: Annotated[list[_Entry], msgspec.Meta(max_length=MAX_ARRAYS)]


_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """The array's bytes as uint8 [n] in C order: a view if it is contiguous, else of a copy."""
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    return array.reshape(-1).view(np.uint8)


def extent(shape: Sequence[int], item_bytes: int) -> int:
    """Bytes of an array if its sides of 0 were 1: numpy makes no array, not even an empty one, of
    which these are too many."""
    return math.prod(max(side, 1) for side in shape) * item_bytes


def encode(header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    """Frames of one message. Contiguous arrays are not copied: leave them until it is sent.

    Raises SpecError for a dtype, name or size that decode would refuse.
    """
    if len(arrays) > MAX_ARRAYS:
        raise SpecError(f"a message with {len(arrays)} arrays; at most {MAX_ARRAYS} are sent")
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    frames: list[bytes | memoryview] = [b""]
    for name, array in arrays.items():
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise SpecError(
                f"array '{name}' has dtype {array.dtype.str}; native ones of {', '.join(DTYPES)} "
                "can be sent"
            )
        span = extent(array.shape, array.itemsize)
        if span > MAX_ARRAY_BYTES or array.ndim > MAX_DIMS or not 0 < len(name) <= 256:
            raise SpecError(
                f"array '{name[:256]}' has shape {array.shape} and {array.nbytes} bytes; at most "
                f"{MAX_DIMS} axes, {MAX_ARRAY_BYTES} bytes and a name of 1 to 256 characters"
            )
        entries.append((name, dtype, array.shape))
        small = array.nbytes <= _SMALL_BYTES
        frames.append(array.tobytes() if small else raw_bytes(array).data)
    envelope = _encoder.encode((header, entries))
    if _PREFIX + len(envelope) > MAX_HEADER_BYTES:
        raise SpecError(f"a header of {len(envelope)} bytes; at most {MAX_HEADER_BYTES} are sent")
    frames[0] = _BEGIN + envelope
    return frames


def members_of(types: Types) -> tuple[type[msgspec.Struct], ...]:
    """The Structs of a tuple, a union or a single type."""
    return types if isinstance(types, tuple) else get_args(types) or (cast(Any, types),)


@cache
def _header_decoder(types: Types) -> msgspec.msgpack.Decoder[Any]:
    members = members_of(types)
    for member in members:
        config = member.__struct_config__
        if config.tag is None or not config.forbid_unknown_fields:
            raise ConfigError(
                f"message type {member.__name__} must be a Struct with a tag and "
                "forbid_unknown_fields=True"
            )
    return msgspec.msgpack.Decoder(Union[members])  # noqa: UP007 - built at run time


def check_types(types: Types) -> None:
    """Raise ConfigError unless every type is a tagged Struct that forbids unknown fields."""
    _header_decoder(types)


def _header(frame: Frame) -> _Envelope:
    size = memoryview(frame).nbytes
    if not _PREFIX < size <= MAX_HEADER_BYTES:
        raise CorruptDataError(
            f"message header of {size} bytes; {_PREFIX + 1} to {MAX_HEADER_BYTES} are right"
        )
    prefix = bytes(frame[:_PREFIX])
    if prefix[:3] != _MAGIC:
        raise CorruptDataError(f"message begins with {prefix!r}; {_MAGIC!r} is right")
    if prefix[3] != PROTOCOL:
        raise CorruptDataError(
            f"message of protocol version {prefix[3]}; this end speaks version {PROTOCOL}: "
            "install the same release at both ends"
        )
    return _envelope_decoder.decode(frame[_PREFIX:])


def _array(entry: _Entry, frame: Frame) -> np.ndarray:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise CorruptDataError(
            f"array '{entry.name}' has dtype '{entry.dtype}'; allowed: {', '.join(DTYPES)}"
        )
    view = memoryview(frame)
    expected = math.prod(entry.shape) * dtype.itemsize  # Python integers: no overflow
    if extent(entry.shape, dtype.itemsize) > MAX_ARRAY_BYTES or view.nbytes != expected:
        raise CorruptDataError(
            f"array '{entry.name}' of dtype {entry.dtype} and shape {entry.shape} in a frame of "
            f"{view.nbytes} bytes; {expected} bytes are right, and at most {MAX_ARRAY_BYTES} with "
            "sides of 0 counted as 1"
        )
    if expected == 0:
        array = np.empty(entry.shape, dtype)
    else:
        array = np.frombuffer(view, dtype).reshape(entry.shape)
        if not array.flags.aligned:
            array = array.copy()
        if dtype == np.bool_ and array.view(np.uint8).max() > 1:
            raise CorruptDataError(f"array '{entry.name}' of dtype bool holds bytes above 1")
    array.flags.writeable = False
    return array


def decode(frames: Sequence[Frame], types: Types) -> Message:
    """Header (one of `types`) and arrays by name, read-only and without a copy if aligned.

    Raises CorruptDataError for anything that encode does not produce.
    """
    if not 1 <= len(frames) <= 1 + MAX_ARRAYS:
        raise CorruptDataError(f"message of {len(frames)} frames; 1 to {1 + MAX_ARRAYS} are right")
    try:
        envelope = _header(frames[0])
        header = _header_decoder(types).decode(envelope.header)
    except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError) as error:
        raise CorruptDataError(f"message header cannot be decoded: {error}") from error
    if len(envelope.arrays) != len(frames) - 1:
        raise CorruptDataError(
            f"message lists {len(envelope.arrays)} arrays but brings {len(frames) - 1} frames"
        )
    arrays: dict[str, np.ndarray] = {}
    for entry, frame in zip(envelope.arrays, frames[1:], strict=True):
        if entry.name in arrays:
            raise CorruptDataError(f"message lists array '{entry.name}' twice")
        arrays[entry.name] = _array(entry, frame)
    return header, arrays
