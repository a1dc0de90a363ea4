"""Arrays of unsigned integers as compressed byte planes, and back within stated bounds."""

import threading

import numpy as np
import zstandard

from embodied.core.errors import CorruptDataError

LEVEL = 3
MAX_WINDOW_BYTES = 8 << 20

_local = threading.local()


def _zstd() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """This thread's own: zstandard's objects must not be shared between threads."""
    if not hasattr(_local, "zstd"):
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        _local.zstd = compressor, zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return _local.zstd


def squeeze(data: np.ndarray) -> bytes:
    """uint8 [n] as a zstd frame that states its size, or as it is where that is not longer."""
    frame = _zstd()[0].compress(data.data) if data.size else b""
    return frame if len(frame) < data.size else data.tobytes()


def expand(blob: memoryview, num_bytes: int) -> np.ndarray:
    """Inverse of squeeze, read-only. num_bytes: the size that must come out.

    Nothing larger is allocated. CorruptDataError for a frame that states another size or none,
    wants a larger window than MAX_WINDOW_BYTES, is damaged, or is followed by anything.
    """
    if blob.nbytes == num_bytes:
        return np.frombuffer(blob, np.uint8)
    try:
        frame = zstandard.get_frame_parameters(blob)
        if blob.nbytes > num_bytes or frame.content_size != num_bytes:
            raise CorruptDataError(
                f"{blob.nbytes} compressed bytes state a size of {frame.content_size}; "
                f"{num_bytes} is right"
            )
        data = _zstd()[1].decompress(blob, max_output_size=num_bytes, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError, ValueError) as error:
        raise CorruptDataError(f"compressed bytes cannot be expanded: {error}") from error
    if len(data) != num_bytes:
        raise CorruptDataError(f"{len(data)} bytes were compressed; {num_bytes} are right")
    return np.frombuffer(data, np.uint8)


def squeeze_planes(values: np.ndarray) -> list[bytes]:
    """One blob for each byte of the unsigned integers [n], lowest first."""
    planes = values.view(np.uint8).reshape(-1, values.itemsize).T
    return [squeeze(np.ascontiguousarray(plane)) for plane in planes]


def expand_planes(blobs: list[memoryview], count: int, dtype: np.dtype) -> np.ndarray:
    """Inverse of squeeze_planes: [count] of dtype. Raises CorruptDataError as expand does."""
    values = np.empty(count, dtype)
    bytes_NB = values.view(np.uint8).reshape(count, dtype.itemsize)
    for column, blob in enumerate(blobs):
        bytes_NB[:, column] = expand(blob, count)
    return values


def fold(differences: np.ndarray) -> np.ndarray:
    """Differences modulo 2^bits as zigzag codes: 0, −1, 1, −2 … become 0, 1, 2, 3 …"""
    signed = differences.view(f"i{differences.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(differences.dtype)


def unfold(codes: np.ndarray) -> np.ndarray:
    """Inverse of fold."""
    return (codes >> 1) ^ np.negative(codes & 1)
