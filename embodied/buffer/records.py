"""Steps as bytes: a schema, written once per segment, and payloads that refer to it.

Payload of a step: u32 length, msgpack header, zeros to a multiple of 8, then the raw arrays of
the observation (by name) and the action, each at a multiple of 8. Payload of a schema: msgpack.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import msgspec
import numpy as np

from embodied.comms.codec import DTYPES, MAX_DIMS, raw_bytes
from embodied.core.episodes import Step
from embodied.core.errors import CorruptDataError, SpecError

MAX_FEATURES = 64
MAX_STEP_BYTES = 1 << 26
MAX_HEADER_BYTES = 1 << 14
MAX_INDEX = (1 << 24) - 1

Payload = bytes | bytearray | memoryview

_LENGTH = struct.Struct("<I")
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Dim = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP_BYTES)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]

FLAGS = ("terminated", "truncated", "success", "intervention", "held", "final")
RESERVED = frozenset(("action", "reward", "policy_version", *FLAGS))
"""Names of a step's other columns; no observation may have them."""


class Feature(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Name, dtype and shape of one array of a step."""

    name: _Name
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[_Dim, ...], msgspec.Meta(max_length=MAX_DIMS)]

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Schema(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every step of a log consists of; observation features are sorted by name."""

    observation: Annotated[tuple[Feature, ...], msgspec.Meta(max_length=MAX_FEATURES)]
    action: Feature

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.observation]
        if names != sorted(set(names)):
            raise ValueError(f"observation names {names} must be sorted and unique")
        if reserved := RESERVED.intersection(names):
            raise ValueError(f"observation names {sorted(reserved)} are reserved")
        for feature in (*self.observation, self.action):
            if feature.dtype not in DTYPES:
                raise ValueError(
                    f"'{feature.name}' has dtype '{feature.dtype}'; allowed: {', '.join(DTYPES)}"
                )
        if sum(feature.nbytes for feature in (*self.observation, self.action)) > MAX_STEP_BYTES:
            raise ValueError(f"a step has more than {MAX_STEP_BYTES} bytes")

    def check_equal(self, other: "Schema", where: str) -> None:
        """Raise SpecError that names the first difference to `other`, the schema of `where`."""
        mine = {feature.name: feature for feature in self.observation}
        theirs = {feature.name: feature for feature in other.observation}
        if mine.keys() != theirs.keys():
            raise SpecError(
                f"{where} has observation keys {sorted(theirs)}; the log has {sorted(mine)}"
            )
        for name, feature in (*mine.items(), ("action", self.action)):
            found = theirs.get(name, other.action)
            if (found.dtype, found.shape) != (feature.dtype, feature.shape):
                raise SpecError(
                    f"{name} of {where} is {found.dtype} {found.shape}; the log has "
                    f"{feature.dtype} {feature.shape}"
                )


class StepHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything of a step but its arrays. flags: a bit per boolean field of Step."""

    stream: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    episode: _Count
    index: Annotated[int, msgspec.Meta(ge=0, le=MAX_INDEX)]
    reward: float
    flags: Annotated[int, msgspec.Meta(ge=0, lt=1 << len(FLAGS))]
    policy_version: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]
    task: Annotated[str, msgspec.Meta(max_length=1024)]
    seed: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]

    def flag(self, name: str) -> bool:
        """Value of a boolean field of Step."""
        return bool(self.flags >> FLAGS.index(name) & 1)

    @property
    def final(self) -> bool:
        """Whether this is the last observation of its episode."""
        return self.flag("final")

    @property
    def where(self) -> str:
        """The step's key, for messages."""
        return f"stream '{self.stream}', episode {self.episode}, index {self.index}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the arrays of a schema lie, counted from the end of the padded header."""

    parts: tuple[tuple[str, np.dtype, tuple[int, ...], int, int], ...]
    nbytes: int


@lru_cache(maxsize=64)
def layout_of(schema: Schema) -> Layout:
    """(name, dtype, shape, start, size in bytes) of every array; the action comes last."""
    parts = []
    offset = 0
    for feature in (*schema.observation, schema.action):
        parts.append((feature.name, DTYPES[feature.dtype], feature.shape, offset, feature.nbytes))
        offset += feature.nbytes + -feature.nbytes % 8
    return Layout(tuple(parts), offset)


_header_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(StepHeader)
_schema_decoder = msgspec.msgpack.Decoder(Schema)


@lru_cache(maxsize=64)
def _schema(parts: tuple[tuple[str, np.dtype, tuple[int, ...]], ...]) -> Schema:
    features = [Feature(name, dtype.name, shape) for name, dtype, shape in parts]
    if not all(dtype.isnative for _, dtype, _ in parts):
        raise SpecError(f"arrays {[part[0] for part in parts]} must have native byte order")
    try:  # through bytes, so that the limits of decoding hold here as well
        schema = Schema(tuple(sorted(features[:-1], key=lambda f: f.name)), features[-1])
        return _schema_decoder.decode(_header_encoder.encode(schema))
    except (msgspec.MsgspecError, ValueError) as error:
        raise SpecError(f"a step with these arrays cannot be stored: {error}") from error


def schema_of(step: Step) -> Schema:
    """The schema of a step. Raises SpecError for arrays that cannot be stored."""
    parts = [(name, array.dtype, array.shape) for name, array in step.observation.items()]
    return _schema((*parts, ("action", step.action.dtype, step.action.shape)))


def encode_schema(schema: Schema) -> bytes:
    """Payload of the schema's own record."""
    return _header_encoder.encode(schema)


def decode_schema(payload: Payload) -> Schema:
    """Inverse of encode_schema. Raises CorruptDataError."""
    try:
        return _schema_decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise CorruptDataError(f"schema record cannot be decoded: {error}") from error


def schema_id(payload: Payload) -> int:
    """A schema's id, never 0: a function of its payload, so that it is the same in all segments."""
    return zlib.crc32(payload) or 1


def encode_step(step: Step, schema: Schema) -> bytearray:
    """Payload of a step that has this schema; the arrays are copied once.

    Raises SpecError for a header field out of range or a reward that is not finite.
    """
    flags = sum(bool(getattr(step, name)) << bit for bit, name in enumerate(FLAGS))
    header = _header_encoder.encode(
        StepHeader(
            step.stream,
            int(step.episode),
            int(step.index),
            float(step.reward),
            flags,
            int(step.policy_version),
            step.task,
            int(step.seed),
        )
    )
    try:
        _check_header(_header_decoder.decode(header), len(header))
    except (msgspec.MsgspecError, CorruptDataError) as error:
        raise SpecError(f"step {step.key} cannot be stored: {error}") from error
    layout = layout_of(schema)
    start = _LENGTH.size + len(header)
    start += -start % 8
    payload = bytearray(start + layout.nbytes)
    _LENGTH.pack_into(payload, 0, len(header))
    payload[_LENGTH.size : _LENGTH.size + len(header)] = header
    for name, _, _, offset, size in layout.parts[:-1]:
        payload[start + offset : start + offset + size] = raw_bytes(step.observation[name]).data
    _, _, _, offset, size = layout.parts[-1]
    payload[start + offset : start + offset + size] = raw_bytes(step.action).data
    return payload


def _check_header(header: StepHeader, size: int) -> StepHeader:
    if size > MAX_HEADER_BYTES or not math.isfinite(header.reward):
        raise CorruptDataError(
            f"reward {header.reward} or header of {size} bytes: a finite reward and at most "
            f"{MAX_HEADER_BYTES} bytes are right"
        )
    return header


def decode_header(payload: Payload) -> tuple[StepHeader, int]:
    """A step's header and the offset at which its arrays begin. Raises CorruptDataError."""
    if len(payload) < _LENGTH.size:
        raise CorruptDataError(f"step record of {len(payload)} bytes is too short")
    size = _LENGTH.unpack_from(payload)[0]
    end = _LENGTH.size + size
    if not 0 < size <= MAX_HEADER_BYTES or end > len(payload):
        raise CorruptDataError(f"step record of {len(payload)} bytes claims a header of {size}")
    try:
        header = _header_decoder.decode(payload[_LENGTH.size : end])
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise CorruptDataError(f"step header cannot be decoded: {error}") from error
    return _check_header(header, size), end + -end % 8


def decode_arrays(
    payload: Payload, start: int, schema: Schema
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Observation and action as read-only views on the payload. Raises CorruptDataError."""
    layout = layout_of(schema)
    if len(payload) - start != layout.nbytes:
        raise CorruptDataError(
            f"step record has {len(payload) - start} bytes of arrays; its schema has "
            f"{layout.nbytes}"
        )
    arrays: list[np.ndarray] = []
    for name, dtype, shape, offset, size in layout.parts:
        view = memoryview(payload)[start + offset : start + offset + size].toreadonly()
        if dtype == np.bool_ and size and np.frombuffer(view, np.uint8).max() > 1:
            raise CorruptDataError(f"'{name}' of dtype bool holds bytes above 1")
        array = np.frombuffer(view, dtype) if size else np.empty(0, dtype)
        arrays.append(array.reshape(shape))
    names = (part[0] for part in layout.parts[:-1])
    return dict(zip(names, arrays[:-1], strict=True)), arrays[-1]


def decode_step(payload: Payload, schema: Schema) -> Step:
    """Inverse of encode_step. Raises CorruptDataError."""
    header, start = decode_header(payload)
    observation, action = decode_arrays(payload, start, schema)
    return Step(
        stream=header.stream,
        episode=header.episode,
        index=header.index,
        observation=observation,
        action=action,
        reward=header.reward,
        policy_version=header.policy_version,
        task=header.task,
        seed=header.seed,
        **{name: header.flag(name) for name in FLAGS},
    )
