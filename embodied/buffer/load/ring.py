"""Shared memory for batches: a few slots that one process fills and another one reads."""

import math
import mmap
import os
from collections.abc import Mapping
from typing import Annotated, Self

import msgspec
import numpy as np

from embodied.buffer.sample.batches import ArraySize
from embodied.comms.codec import DTYPES
from embodied.core.errors import CorruptDataError

MAX_RING_BYTES = 1 << 36
_ALIGN = 64


class RingArray(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One array of a slot: where it begins, and what it is."""

    name: Annotated[str, msgspec.Meta(max_length=256)]
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(max_length=10)]
    start: Annotated[int, msgspec.Meta(ge=0, le=MAX_RING_BYTES)]


class RingLayout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Slots of slot_bytes each, all with the same arrays."""

    slots: Annotated[int, msgspec.Meta(ge=1, le=64)]
    slot_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_RING_BYTES)]
    arrays: Annotated[tuple[RingArray, ...], msgspec.Meta(max_length=256)]


def ring_layout(sizes: Mapping[str, ArraySize], slots: int) -> RingLayout:
    """Lay batches of these arrays out."""
    arrays: list[RingArray] = []
    end = 0
    for name, (dtype, shape) in sizes.items():
        arrays.append(RingArray(name, dtype.name, shape, end))
        end += dtype.itemsize * math.prod(shape)
        end += -end % _ALIGN
    end += -end % mmap.PAGESIZE
    return RingLayout(slots, max(end, mmap.PAGESIZE), tuple(arrays))


class BatchRing:
    """Anonymous shared memory that another process can attach to by its descriptor; it is gone
    when both are, however they end."""

    def __init__(self, layout: RingLayout, fd: int) -> None:
        nbytes = layout.slots * layout.slot_bytes
        if os.fstat(fd).st_size < nbytes:
            raise CorruptDataError(f"shared memory of {os.fstat(fd).st_size} bytes, not {nbytes}")
        self.layout = layout
        self.fd = fd
        self.memory = mmap.mmap(fd, nbytes)
        self._slots = [self._arrays(slot) for slot in range(layout.slots)]

    @classmethod
    def create(cls, layout: RingLayout) -> Self:
        """Make the memory; its space is reserved now."""
        fd = os.memfd_create("embodied-batches", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, layout.slots * layout.slot_bytes)
            return cls(layout, fd)
        except BaseException:
            os.close(fd)
            raise

    def _arrays(self, slot: int) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for array in self.layout.arrays:
            dtype = DTYPES.get(array.dtype)
            count = math.prod(array.shape)
            if dtype is None or array.start + count * dtype.itemsize > self.layout.slot_bytes:
                raise CorruptDataError(
                    f"{array} does not lie in a slot of {self.layout.slot_bytes}"
                )
            start = slot * self.layout.slot_bytes + array.start
            flat = np.frombuffer(self.memory, dtype, count, start) if count else np.empty(0, dtype)
            arrays[array.name] = flat.reshape(array.shape)
        return arrays

    def arrays(self, slot: int) -> dict[str, np.ndarray]:
        """The arrays of a slot: views on the shared memory."""
        return self._slots[slot]

    def close(self) -> None:
        """Give the descriptor up; the memory goes with the last array that looks at it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
