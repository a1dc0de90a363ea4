"""What the steps of a recording consist of, and where their arrays lie in a record."""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import msgspec
import numpy as np

from embodied.buffer.steps import codecs
from embodied.comms.codec import DTYPES, MAX_DIMS, extent
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError, SpecError

MAX_FEATURES = 64
MAX_STEP_BYTES = 1 << 26
SMALL_BYTES = 4096
"""Raw features up to this size are kept in columns; larger ones are read from the records."""

FLAGS = ("terminated", "truncated", "success", "intervention", "held", "final")
RESERVED = frozenset(("action", "reward", "policy_version", "t_ns", *FLAGS))
"""Names of a step's other columns; no observation may have them."""

_FIRST_ID = 16
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Dim = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP_BYTES)]


class Feature(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Name, dtype and shape of one array of a step, and the codec under which it is stored."""

    name: _Name
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[_Dim, ...], msgspec.Meta(max_length=MAX_DIMS)]
    codec: Annotated[str, msgspec.Meta(max_length=16)] = "raw"

    @property
    def nbytes(self) -> int:
        """Size of the array itself."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def span(self) -> int:
        """Its size if sides of 0 were 1, which bounds what numpy can be asked for."""
        return extent(self.shape, DTYPES[self.dtype].itemsize)

    @property
    def small(self) -> bool:
        """Whether it is kept in columns."""
        return self.codec == "raw" and self.nbytes <= SMALL_BYTES

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Schema(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every step of a stream consists of; observation features are sorted by name."""

    observation: Annotated[tuple[Feature, ...], msgspec.Meta(max_length=MAX_FEATURES)]
    action: Feature

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.observation]
        if names != sorted(set(names)):
            raise ValueError(f"observation names {names} must be sorted and unique")
        if reserved := [name for name in names if name in RESERVED or name.startswith(".")]:
            raise ValueError(f"observation names {reserved} are reserved")
        for feature in (*self.observation, self.action):
            if feature.dtype not in DTYPES:
                raise ValueError(
                    f"'{feature.name}' has dtype '{feature.dtype}'; allowed: {', '.join(DTYPES)}"
                )
            if feature.codec != "raw":
                codecs.check(feature.codec, DTYPES[feature.dtype], feature.shape)
        if self.action.codec != "raw" or self.action.nbytes > SMALL_BYTES:
            raise ValueError(f"the action is stored raw, in at most {SMALL_BYTES} bytes")
        if sum(feature.span for feature in (*self.observation, self.action)) > MAX_STEP_BYTES:
            raise ValueError(f"a step has more than {MAX_STEP_BYTES} bytes")

    def feature(self, name: str) -> Feature | None:
        """The observation feature of this name, or the action; None if there is none."""
        return next((f for f in (*self.observation, self.action) if f.name == name), None)

    def check_same_arrays(self, other: "Schema", where: str, mine: str) -> None:
        """Raise SpecError that names the first difference to `other`, the schema of `where`.

        mine: what this schema belongs to. Codecs may differ.
        """
        ours = {feature.name: feature for feature in self.observation}
        theirs = {feature.name: feature for feature in other.observation}
        if ours.keys() != theirs.keys():
            missing, extra = sorted(ours.keys() - theirs), sorted(theirs.keys() - ours)
            what = "; ".join(
                f"{word} {', '.join(names)}"
                for word, names in (("lacks", missing), ("has also", extra))
                if names
            )
            raise SpecError(
                f"{where} {what}: {mine} has observation keys {', '.join(sorted(ours))}. "
                "Record other keys as another stream"
            )
        for name, feature in (*ours.items(), ("action", self.action)):
            found = theirs.get(name, other.action)
            if (found.dtype, found.shape) != (feature.dtype, feature.shape):
                raise SpecError(f"{name} of {where} is {found}; {mine} has {feature}")


class Part(msgspec.Struct, frozen=True):
    """A raw array of a payload: its bytes begin at `start`, counted from the end of the header."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the arrays of a schema lie. small, large: raw ones, in this order, `nbytes` together;
    encoded features follow, each at a multiple of 8."""

    small: tuple[Part, ...]
    large: tuple[Part, ...]
    encoded: tuple[Feature, ...]
    nbytes: int


@lru_cache(maxsize=64)
def layout_of(schema: Schema) -> Layout:
    """The layout of a schema's payloads; the action is the last of the small arrays."""
    small: list[Part] = []
    large: list[Part] = []
    raw = [feature for feature in schema.observation if feature.codec == "raw"]
    offset = 0
    for wanted, group in ((True, small), (False, large)):
        for feature in (*(f for f in raw if f.small is wanted), *([schema.action] * wanted)):
            dtype = DTYPES[feature.dtype]
            group.append(Part(feature.name, dtype, feature.shape, offset, feature.nbytes))
            offset += feature.nbytes + -feature.nbytes % 8
    encoded = tuple(feature for feature in schema.observation if feature.codec != "raw")
    return Layout(tuple(small), tuple(large), encoded, offset)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Schema)


def encode_schema(schema: Schema) -> bytes:
    """Payload of the schema's own record."""
    return _encoder.encode(schema)


def decode_schema(payload: bytes | bytearray | memoryview) -> Schema:
    """Inverse of encode_schema. Raises CorruptDataError."""
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise CorruptDataError(f"schema record cannot be decoded: {error}") from error


def schema_id(payload: bytes | bytearray | memoryview) -> int:
    """A schema's id, at least 16: a function of its payload, the same in all segments."""
    return max(_FIRST_ID, zlib.crc32(payload))


class Codecs:
    """Which codec each observation feature gets: name or pattern → codec, the first that fits.

    A pattern ends in "*". Raises ConfigError for a codec that there is not.
    """

    def __init__(self, codecs_by_name: "dict[str, str] | None" = None) -> None:
        self._rules = tuple((codecs_by_name or {}).items())
        for pattern, codec in self._rules:
            if codec != "raw":
                try:
                    codecs.check(codec, np.dtype(np.uint8), (8, 8, 3))
                except ValueError as error:
                    raise ConfigError(f"buffer.codecs.{pattern}: {error}") from error
        self._of = lru_cache(maxsize=64)(self._make)

    def schema_of(self, step: Step) -> Schema:
        """The schema of a step. Raises SpecError for arrays that cannot be stored."""
        try:
            parts = [(name, array.dtype, array.shape) for name, array in step.observation.items()]
            return self._of((*parts, ("action", step.action.dtype, step.action.shape)))
        except AttributeError:
            arrays = {**step.observation, "action": step.action}
            wrong = {
                n: type(a).__name__ for n, a in arrays.items() if not isinstance(a, np.ndarray)
            }
            raise SpecError(f"step {step.key} has {wrong}; numpy arrays are right") from None
        except SpecError as error:
            raise SpecError(f"step {step.key} cannot be stored: {error}") from error

    def _codec(self, name: str) -> str:
        for pattern, codec in self._rules:
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                return codec
        return "raw"

    def _make(self, parts: tuple[tuple[str, np.dtype, tuple[int, ...]], ...]) -> Schema:
        if not all(dtype.isnative for _, dtype, _ in parts):
            raise SpecError(f"arrays {[part[0] for part in parts]} must have native byte order")
        features = [Feature(n, dtype.name, shape, self._codec(n)) for n, dtype, shape in parts[:-1]]
        name, dtype, shape = parts[-1]
        try:  # through bytes, so that the limits of decoding hold here as well
            schema = Schema(
                tuple(sorted(features, key=lambda f: f.name)), Feature(name, dtype.name, shape)
            )
            return _decoder.decode(_encoder.encode(schema))
        except (msgspec.MsgspecError, ValueError) as error:
            raise SpecError(str(error)) from error
