"""Steps as bytes: payloads that refer to a schema, and control records.

Payload of a step: u32 length, msgpack header, zeros to a multiple of 8, then the raw arrays as
the schema's layout says, then encoded features, each at a multiple of 8.
"""

import struct
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np

from embodied.buffer.steps import codecs
from embodied.buffer.steps.schema import (
    FLAGS,
    MAX_FEATURES,
    MAX_STEP_BYTES,
    Layout,
    Part,
    Schema,
    layout_of,
)
from embodied.comms.codec import DTYPES, raw_bytes
from embodied.core.episodes import Step
from embodied.core.errors import CorruptDataError, SpecError

SCHEMA_RECORD = 0
CONTROL_RECORD = 1
MAX_HEADER_BYTES = 1 << 14
MAX_INDEX = (1 << 24) - 1

Payload = bytes | bytearray | memoryview

_LENGTH = struct.Struct("<I")
_MAX_REWARD = float(np.finfo(np.float32).max)
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Stream = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP_BYTES)]


class StepHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything of a step but its arrays. flags: a bit per boolean field of Step. sizes: bytes of
    each encoded feature."""

    stream: _Stream
    episode: _Count
    index: Annotated[int, msgspec.Meta(ge=0, le=MAX_INDEX)]
    reward: float
    flags: Annotated[int, msgspec.Meta(ge=0, lt=1 << len(FLAGS))]
    policy_version: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]
    task: Annotated[str, msgspec.Meta(max_length=1024)]
    seed: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]
    t_ns: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] = 0
    sizes: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_FEATURES)] = ()

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


class Control(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a control record says. deleted: (stream, episode) that count as not there any more.
    retired: stream → all its episodes below this number that are not there were deleted."""

    deleted: tuple[tuple[_Stream, _Count], ...] = ()
    retired: dict[_Stream, _Count] = {}


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(StepHeader)
_control_decoder = msgspec.msgpack.Decoder(Control)


def encode_control(control: Control) -> bytes:
    """Payload of a control record."""
    return _encoder.encode(control)


def decode_control(payload: Payload) -> Control:
    """Inverse of encode_control. Raises CorruptDataError."""
    try:
        return _control_decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise CorruptDataError(f"control record cannot be decoded: {error}") from error


def encode_step(step: Step, schema: Schema) -> bytearray:
    """Payload of a step that has this schema; raw arrays are copied once.

    Raises SpecError for a header field out of range, and NaN or infinity in an array or reward.
    """
    layout = layout_of(schema)
    for name, array in (*step.observation.items(), ("action", step.action)):
        check_finite(name, array, step.key)
    blobs = [codecs.encode(step.observation[f.name], f.codec) for f in layout.encoded]
    header = _encode_header(step, tuple(len(blob) for blob in blobs))
    start = _LENGTH.size + len(header)
    start += -start % 8
    payload = bytearray(start + layout.nbytes + sum(len(b) + -len(b) % 8 for b in blobs))
    _LENGTH.pack_into(payload, 0, len(header))
    payload[_LENGTH.size : _LENGTH.size + len(header)] = header
    for part in (*layout.small, *layout.large):
        array = step.action if part.name == "action" else step.observation[part.name]
        at = start + part.start
        payload[at : at + part.nbytes] = raw_bytes(array).data
    at = start + layout.nbytes
    for blob in blobs:
        payload[at : at + len(blob)] = blob
        at += len(blob) + -len(blob) % 8
    return payload


def check_finite(name: str, array: np.ndarray, key: tuple[str, int, int]) -> None:
    """Raise SpecError if a float array holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        stream, episode, index = key
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise SpecError(
            f"{name} of stream '{stream}', episode {episode}, index {index} is "
            f"{array[tuple(bad)]} at {bad}; finite numbers are right"
        )


def _encode_header(step: Step, sizes: tuple[int, ...]) -> bytes:
    flags = sum(bool(getattr(step, name)) << bit for bit, name in enumerate(FLAGS))
    try:
        header = _encoder.encode(
            StepHeader(
                step.stream,
                int(step.episode),
                int(step.index),
                float(step.reward),
                flags,
                int(step.policy_version),
                step.task,
                int(step.seed),
                int(step.t_ns),
                sizes,
            )
        )
        _check_header(_header_decoder.decode(header), len(header))
    except (msgspec.MsgspecError, CorruptDataError, OverflowError, TypeError, ValueError) as error:
        raise SpecError(f"step {step.key} cannot be stored: {error}") from error
    return header


def _check_header(header: StepHeader, size: int) -> StepHeader:
    if size > MAX_HEADER_BYTES or not abs(header.reward) <= _MAX_REWARD:
        raise CorruptDataError(
            f"reward {header.reward} or header of {size} bytes: a finite float32 and at most "
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


def check_payload(payload: Payload, start: int, header: StepHeader, schema: Schema) -> Layout:
    """Raise CorruptDataError unless the payload has the size that header and schema say."""
    layout = layout_of(schema)
    if len(header.sizes) != len(layout.encoded):
        raise CorruptDataError(
            f"step at {header.where} has {len(header.sizes)} encoded features; its schema has "
            f"{len(layout.encoded)}"
        )
    nbytes = layout.nbytes + sum(size + -size % 8 for size in header.sizes)
    if len(payload) - start != nbytes:
        raise CorruptDataError(
            f"step record has {len(payload) - start} bytes of arrays; its header and schema "
            f"have {nbytes}"
        )
    return layout


def raw_array(payload: Payload, start: int, part: Part) -> np.ndarray:
    """A raw array as a read-only view on the payload. Raises CorruptDataError."""
    at = start + part.start
    view = memoryview(payload)[at : at + part.nbytes].toreadonly()
    if part.dtype == np.bool_ and part.nbytes and np.frombuffer(view, np.uint8).max() > 1:
        raise CorruptDataError(f"'{part.name}' of dtype bool holds bytes above 1")
    array = np.frombuffer(view, part.dtype) if part.nbytes else np.empty(0, part.dtype)
    return array.reshape(part.shape)


def decode_arrays(
    payload: Payload, start: int, header: StepHeader, schema: Schema
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Observation and action; raw ones are read-only views. Raises CorruptDataError."""
    layout = check_payload(payload, start, header, schema)
    arrays = {p.name: raw_array(payload, start, p) for p in (*layout.small, *layout.large)}
    at = start + layout.nbytes
    for feature, size in zip(layout.encoded, header.sizes, strict=True):
        blob = memoryview(payload)[at : at + size]
        dtype = DTYPES[feature.dtype]
        arrays[feature.name] = codecs.decode(blob, feature.codec, dtype, feature.shape)
        at += size + -size % 8
    action = arrays.pop("action")
    return arrays, action


def step_of(header: StepHeader, observation: Mapping[str, np.ndarray], action: np.ndarray) -> Step:
    """Put a step together."""
    return Step(
        stream=header.stream,
        episode=header.episode,
        index=header.index,
        observation=dict(observation),
        action=action,
        reward=header.reward,
        policy_version=header.policy_version,
        task=header.task,
        seed=header.seed,
        t_ns=header.t_ns,
        **{name: header.flag(name) for name in FLAGS},
    )


def decode_step(payload: Payload, schema: Schema) -> Step:
    """Inverse of encode_step. Raises CorruptDataError."""
    header, start = decode_header(payload)
    return step_of(header, *decode_arrays(payload, start, header, schema))
