"""Unsigned integers as LEB128 varints, whole arrays at a time."""

import numpy as np

from embodied.core.errors import CorruptDataError

MAX_BITS = 35
MAX_BYTES = MAX_BITS // 7
"""Of one varint."""


def encode_varints(values_N: np.ndarray) -> np.ndarray:
    """uint8 bytes of unsigned integers below 2^MAX_BITS: seven bits each, lowest first; the high
    bit says that more follow."""
    values_N = values_N.astype(np.uint64, copy=False)
    largest = int(values_N.max(initial=0))
    assert largest >> MAX_BITS == 0, largest
    if largest < 0x80:
        return values_N.astype(np.uint8)
    lengths_N = np.ones(values_N.size, np.int64)
    for k in range(1, MAX_BYTES):
        lengths_N += values_N >= 1 << (7 * k)
    ends_N = np.cumsum(lengths_N)
    starts_N = ends_N - lengths_N
    encoded = np.empty(int(ends_N[-1]), np.uint8)
    for k in range(int(lengths_N.max())):
        has = lengths_N > k
        low = (values_N[has] >> np.uint64(7 * k)) & np.uint64(0x7F)
        more = (lengths_N[has] > k + 1).astype(np.uint64) << np.uint64(7)
        encoded[starts_N[has] + k] = low | more
    return encoded


def decode_varints(encoded: np.ndarray, count: int) -> np.ndarray:
    """`count` integers (uint64) of their uint8 bytes.

    CorruptDataError unless the bytes are exactly what encode_varints makes of that many.
    """
    last = encoded < 0x80
    ends_N = np.flatnonzero(last) + 1
    if ends_N.size != count or (encoded.size and not last[-1]):
        raise CorruptDataError(f"varints hold {ends_N.size} whole integers; {count} are right")
    if encoded.size == count:
        return encoded.astype(np.uint64)
    starts_N = np.concatenate([[0], ends_N[:-1]])
    lengths_N = ends_N - starts_N
    if lengths_N.max() > MAX_BYTES or (encoded[ends_N - 1][lengths_N > 1] == 0).any():
        raise CorruptDataError("a varint is longer than it may or needs to be")
    place = np.arange(encoded.size) - np.repeat(starts_N, lengths_N)
    parts = (encoded & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(parts, starts_N)
