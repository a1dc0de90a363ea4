"""What a host's uploader and the receiver at the gateway say to each other.

An upload carries records as the spool stores them; the batch is wrapped in one zstd frame where
that makes it smaller. Its checksum is of what the spool read, so damage on the way is found.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np
import zstandard
from crc32c import crc32c

from embodied.buffer.serve.messages import (
    MAX_BATCH_BYTES,
    MAX_BATCH_STEPS,
    AppendReply,
    ResumeReply,
    ResumeRequest,
)
from embodied.core.errors import CorruptDataError

MAX_SCHEMA_BYTES = 1 << 16

_LEVEL = 1
_SAMPLE_BYTES = 1 << 15
_PAYS_BELOW = 0.9
_MAX_WINDOW_BYTES = 1 << 23


class UploadRequest(msgspec.Struct, frozen=True, tag="upload", forbid_unknown_fields=True):
    """Steps of one schema. Arrays: payloads, uint8, one encoded step after the other, in a zstd
    frame if `zstd`; lengths, uint32, of each before that.

    nbytes: of the payloads before that. crc32c: of schema, lengths and payloads before that.
    """

    schema: Annotated[bytes, msgspec.Meta(max_length=MAX_SCHEMA_BYTES)]
    nbytes: Annotated[int, msgspec.Meta(gt=0, le=MAX_BATCH_BYTES)]
    crc32c: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    zstd: bool


UPLOADS = (UploadRequest, ResumeRequest)
UPLOAD_REPLIES = (AppendReply, ResumeReply)


def wrap(
    schema: bytes, payloads: Sequence[bytes | memoryview]
) -> tuple[UploadRequest, dict[str, np.ndarray]]:
    """The message that carries these payloads; compressed if a sample of them shrinks."""
    data = b"".join(payloads)
    lengths = np.array([len(payload) for payload in payloads], np.uint32)
    packed = data
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    if _pays(compressor, data[:_SAMPLE_BYTES]):
        packed = compressor.compress(data)
    wrapped = len(packed) < _PAYS_BELOW * len(data)
    request = UploadRequest(schema, len(data), _checksum(schema, lengths, data), wrapped)
    sent = np.frombuffer(packed if wrapped else data, np.uint8)
    return request, {"payloads": sent, "lengths": lengths}


def _pays(compressor: zstandard.ZstdCompressor, sample: bytes) -> bool:
    return len(compressor.compress(sample)) < _PAYS_BELOW * len(sample)


def unwrap(header: UploadRequest, arrays: Mapping[str, np.ndarray]) -> tuple[memoryview, list[int]]:
    """Payloads, one after the other, and the length of each. Raises CorruptDataError."""
    payloads, lengths = arrays.get("payloads"), arrays.get("lengths")
    if payloads is None or lengths is None or len(arrays) != 2:
        raise CorruptDataError(
            f"upload with arrays {sorted(arrays)}; 'lengths' and 'payloads' are right"
        )
    if (
        payloads.dtype != np.uint8
        or lengths.dtype != np.uint32
        or payloads.ndim != 1
        or lengths.ndim != 1
        or not 0 < lengths.size <= MAX_BATCH_STEPS
        or not 0 < payloads.size <= header.nbytes
        or int(lengths.sum(dtype=np.uint64)) != header.nbytes
    ):
        raise CorruptDataError(
            f"upload of {header.nbytes} bytes with payloads {payloads.dtype} {payloads.shape} and "
            f"lengths {lengths.dtype} {lengths.shape}: uint8 and uint32 vectors are right, at most "
            f"{MAX_BATCH_STEPS} lengths, adding up to the bytes"
        )
    data = _unpack(payloads.data, header.nbytes) if header.zstd else payloads.data
    if data.nbytes != header.nbytes:
        raise CorruptDataError(f"upload of {header.nbytes} bytes brings {data.nbytes}")
    found = _checksum(header.schema, lengths, data)
    if found != header.crc32c:
        raise CorruptDataError(
            f"upload of {header.nbytes} bytes has checksum {found:08x}, not {header.crc32c:08x}: "
            "it was damaged on the way"
        )
    return data, lengths.tolist()


def _unpack(packed: memoryview, nbytes: int) -> memoryview:
    """Contents of a zstd frame that declares just this size; checked before memory is taken."""
    try:
        frame = zstandard.get_frame_parameters(packed)
        if frame.content_size != nbytes or frame.window_size > _MAX_WINDOW_BYTES or frame.dict_id:
            raise CorruptDataError(
                f"upload of {nbytes} bytes in a zstd frame of {frame.content_size} bytes with "
                f"window {frame.window_size} and dictionary {frame.dict_id}; the same size, a "
                f"window of at most {_MAX_WINDOW_BYTES} and no dictionary are right"
            )
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        return memoryview(decompressor.decompress(packed, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise CorruptDataError(f"upload cannot be unpacked: {error}") from error


def _checksum(schema: bytes, lengths: np.ndarray, data: bytes | memoryview) -> int:
    return crc32c(data, crc32c(lengths.tobytes(), crc32c(schema)))
