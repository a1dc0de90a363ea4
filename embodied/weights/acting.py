"""The acting form of weights: what robots compute with, bit for bit, as unsigned integers.

Of float32 weights the acting form is either what the learner published, bit for bit, or its values
rounded to the nearest bfloat16, ties to even. That is the one lossy step, taken at the learner;
from there on every bit is kept. All other dtypes are kept as they are.

Canonical digest: SHA-256 over b"embodied weights 1\\n" and then, for each tensor in the order of
its name's code points, the msgpack array [name, dtype, shape] followed by its elements,
little-endian in C order. dtype is a name of embodied.comms.codec.DTYPES or "bfloat16". A msgpack
array says where it ends, and [dtype, shape] how many bytes follow, so no two forms share an input.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import msgspec
import numpy as np

from embodied.comms.codec import DTYPES, MAX_ARRAY_BYTES, MAX_DIMS, extent
from embodied.core.errors import CorruptDataError, SpecError

Precision = Literal["float32", "bfloat16"]
MAX_TENSORS = 1 << 16
ITEM_BYTES = {**{name: dtype.itemsize for name, dtype in DTYPES.items()}, "bfloat16": 2}

_MAGIC = b"embodied weights 1\n"


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Name, dtype and shape of a tensor of an acting form."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_ARRAY_BYTES)], ...],
        msgspec.Meta(max_length=MAX_DIMS),
    ]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of all elements. Raises KeyError for an unknown dtype."""
        return self.size * ITEM_BYTES[self.dtype]

    @property
    def bits_dtype(self) -> np.dtype:
        """Unsigned integers as wide as an element."""
        return np.dtype(f"u{ITEM_BYTES[self.dtype]}")


Layout = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Tensor:
    """bits: the elements in C order as unsigned integers of their width [size], read-only."""

    spec: TensorSpec
    bits: np.ndarray


Form = dict[str, Tensor]
"""Tensors by name, in the order of the names."""


def acting_form(arrays: Mapping[str, np.ndarray], precision: Precision) -> Form:
    """The acting form of a policy's arrays; of an acting policy's arrays it is what it was.

    precision: of float32 arrays. Raises SpecError for arrays that cannot travel.
    """
    if len(arrays) > MAX_TENSORS:
        raise SpecError(f"weights of {len(arrays)} tensors; at most {MAX_TENSORS} are sent")
    names = {dtype: name for name, dtype in DTYPES.items()}
    form: Form = {}
    for name, array in sorted(arrays.items()):
        dtype = names.get(array.dtype)
        if dtype is None:
            raise SpecError(
                f"weights '{name[:256]}' have dtype {array.dtype.str}; native ones of "
                f"{', '.join(DTYPES)} can be sent"
            )
        span = extent(array.shape, array.itemsize)
        if span > MAX_ARRAY_BYTES or array.ndim > MAX_DIMS or not 0 < len(name) <= 256:
            raise SpecError(
                f"weights '{name[:256]}' have shape {array.shape} and {array.nbytes} bytes; at "
                f"most {MAX_DIMS} axes, {MAX_ARRAY_BYTES} bytes and a name of 1 to 256 characters"
            )
        bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
        if precision == "bfloat16" and dtype == "float32":
            dtype, bits = "bfloat16", round_to_bfloat16(bits)
        form[name] = Tensor(TensorSpec(name, dtype, array.shape), _read_only(bits))
    return form


def to_arrays(form: Form) -> dict[str, np.ndarray]:
    """The form as a policy's arrays, read-only: bfloat16 is widened to float32, exactly.

    CorruptDataError for a bool that is neither 0 nor 1.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in form.items():
        bits, dtype = tensor.bits, tensor.spec.dtype
        if dtype == "bfloat16":
            bits, dtype = bits.astype(np.uint32) << np.uint32(16), "float32"
        if dtype == "bool" and bits.max(initial=0) > 1:
            raise CorruptDataError(f"weights '{name}' of dtype bool hold bytes above 1")
        arrays[name] = _read_only(bits.view(DTYPES[dtype]).reshape(tensor.spec.shape))
    return arrays


def round_to_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 as uint32 bits → nearest bfloat16 as uint16 bits, ties to even; NaN stays NaN."""
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)


def layout_of(form: Form) -> Layout:
    """What the form's tensors are."""
    return tuple(tensor.spec for tensor in form.values())


def check_layout(layout: Layout, num_bytes: int) -> None:
    """CorruptDataError unless the names ascend, dtypes are known and sizes add up to num_bytes."""
    names = [spec.name for spec in layout]
    if any(a >= b for a, b in pairwise(names)) or len(names) > MAX_TENSORS:
        raise CorruptDataError(
            f"layout of {len(names)} tensors; at most {MAX_TENSORS}, each named once, in order"
        )
    for spec in layout:
        if spec.dtype not in ITEM_BYTES:
            raise CorruptDataError(
                f"weights '{spec.name}' have dtype '{spec.dtype}'; allowed: {', '.join(ITEM_BYTES)}"
            )
        if extent(spec.shape, ITEM_BYTES[spec.dtype]) > MAX_ARRAY_BYTES:
            raise CorruptDataError(
                f"weights '{spec.name}' have shape {spec.shape}; at most {MAX_ARRAY_BYTES} bytes "
                "are right, counting sides of 0 as 1"
            )
    total = sum(spec.num_bytes for spec in layout)  # Python integers: no overflow
    if total != num_bytes:
        raise CorruptDataError(f"layout of {total} bytes in weights of {num_bytes}")


def digest(form: Form) -> str:
    """The canonical digest, as above, in hexadecimal."""
    hashed = hashlib.sha256(_MAGIC)
    for name in sorted(form):
        hashed.update(msgspec.msgpack.encode(form[name].spec))
        hashed.update(form[name].bits.data)
    return hashed.hexdigest()


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
