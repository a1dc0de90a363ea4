"""Patches: everything that makes the acting form of one version out of another's, as bytes.

A patch is b"EMBW", one byte of format version, the size of the description (uint32, little-endian),
the description (msgpack: a Change for each tensor that changed, in the order of the layout), then
the changes' blobs. A tensor that did not change takes no byte, so frozen parameters never travel.
A patch without a base holds every tensor that has elements.
"""

import struct
from typing import Annotated

import msgspec
import numpy as np

from embodied.core.errors import CorruptDataError
from embodied.weights.acting import MAX_TENSORS, Form, Layout, Tensor, layout_of
from embodied.weights.changes import Change, Coded, decode_change, encode_change, encode_full

FORMAT = 1

_HEAD = struct.Struct("<4sBI")
_MAGIC = b"EMBW"
_CHANGE_BYTES = 80


class _Description(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    changes: Annotated[tuple[Change, ...], msgspec.Meta(max_length=MAX_TENSORS)]


_decoder = msgspec.msgpack.Decoder(_Description)


def encode_patch(new: Form, base: Form | None) -> bytes:
    """The patch that makes `new`, of a base with the same layout or of nothing.

    Each tensor travels in the smallest of the codings in embodied.weights.changes. The same forms
    make the same bytes, as long as the zstd library is the same.
    """
    if base is not None and layout_of(base) != layout_of(new):
        raise ValueError("base and new form differ in layout; encode against no base")
    coded: list[Coded] = []
    for index, (name, tensor) in enumerate(new.items()):
        if base is not None:
            change = encode_change(index, tensor.bits, base[name].bits)
        else:
            change = encode_full(index, tensor.bits) if tensor.bits.size else None
        if change is not None:
            coded.append(change)
    description = msgspec.msgpack.encode(_Description(tuple(change for change, _ in coded)))
    head = _HEAD.pack(_MAGIC, FORMAT, len(description))
    return b"".join((head, description, *(blob for _, blobs in coded for blob in blobs)))


def max_patch_bytes(num_tensors: int, num_bytes: int) -> int:
    """No patch of a form of that size is larger: no blob is larger than what it stands for."""
    return num_bytes + _CHANGE_BYTES * num_tensors + _HEAD.size + 16


def describe(patch: bytes | memoryview) -> tuple[Change, ...]:
    """The changes that a patch lists. Raises CorruptDataError."""
    return _open(memoryview(patch))[0]


def apply_patch(patch: bytes | memoryview, layout: Layout, base: Form | None) -> Form:
    """The new form; tensors that did not change are the base's own, which stays as it is.

    layout: of the new form, checked (acting.check_layout); the base's if there is one. No array is
    made larger than it says. CorruptDataError for anything that encode_patch does not produce.
    """
    changes, blobs = _open(memoryview(patch))
    changed = {change.index: change for change in changes}
    if list(changed) != sorted(changed) or len(changed) != len(changes):
        raise CorruptDataError("patch lists its tensors out of order")
    if changed and changes[-1].index >= len(layout):
        raise CorruptDataError(f"patch changes tensor {changes[-1].index} of {len(layout)}")
    starts: dict[int, int] = {}
    place = 0
    for change in changes:
        starts[change.index] = place
        place += sum(change.sizes)
    if place != blobs.nbytes:
        raise CorruptDataError(f"patch has blobs of {blobs.nbytes} bytes; {place} are right")
    form: Form = {}
    for index, spec in enumerate(layout):
        old = None if base is None else base[spec.name]
        change = changed.get(index)
        if change is not None:
            parts = _cut(blobs[starts[index] :], change.sizes)
            bits = decode_change(change, spec, parts, None if old is None else old.bits)
            bits.flags.writeable = False
            form[spec.name] = Tensor(spec, bits)
        elif old is not None:
            form[spec.name] = old
        elif spec.size == 0:
            form[spec.name] = Tensor(spec, np.empty(0, spec.bits_dtype))
        else:
            raise CorruptDataError(f"patch lacks '{spec.name}' and there is no base to have it")
    return form


def _open(patch: memoryview) -> tuple[tuple[Change, ...], memoryview]:
    if patch.nbytes < _HEAD.size:
        raise CorruptDataError(f"patch of {patch.nbytes} bytes; at least {_HEAD.size} are right")
    magic, version, size = _HEAD.unpack_from(patch)
    if magic != _MAGIC or version != FORMAT:
        raise CorruptDataError(
            f"patch begins with {magic!r}, format {version}; {_MAGIC!r}, format {FORMAT} is right"
        )
    if _HEAD.size + size > patch.nbytes:
        raise CorruptDataError(f"patch of {patch.nbytes} bytes with a description of {size}")
    try:
        description = _decoder.decode(patch[_HEAD.size : _HEAD.size + size])
    except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError) as error:
        raise CorruptDataError(f"description of a patch cannot be decoded: {error}") from error
    return description.changes, patch[_HEAD.size + size :]


def _cut(data: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    parts: list[memoryview] = []
    for size in sizes:
        parts.append(data[:size])
        data = data[size:]
    return parts
