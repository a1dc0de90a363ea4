"""How one array of a step becomes fewer bytes: zstd for anything, WebP and JPEG for images.

Whatever is decoded may come from a damaged disk or from another party: the size that the bytes
declare is compared with the wanted array's before memory is taken for it, and only the plain form
of each format that `encode` writes is accepted (no alpha, animation, metadata or progressive scan).
"""

import io
import math
import re
import struct
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import zstandard
from PIL import Image

from embodied.comms.codec import DTYPES, raw_bytes
from embodied.core.errors import CorruptDataError, SpecError

Bytes = bytes | bytearray | memoryview

KNOWN = "raw, zstd, webp, webp:Q and jpeg:Q (Q: quality 1..100)"
_ZSTD_LEVEL = 1
_WEBP_EFFORT = {"method": 0, "quality": 20}
_MOST_PIXELS_A_SIDE = {"webp": 16383, "jpeg": 65500}
_LOSSY = re.compile(r"(webp|jpeg):([1-9]\d?|100)")
_WEBP = re.compile(rb"RIFF(.{4})WEBP(?:VP8L.{4}\x2f(.{4})|VP8 .{7}\x9d\x01\x2a(.{4}))", re.DOTALL)
_JPEG_END = b"\xff\xd9"
_local = threading.local()


class Codec(NamedTuple):
    """A codec's name taken apart. kind: raw, zstd, webp, jpeg. quality: None if lossless."""

    kind: str
    quality: int | None

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back every bit."""
        return self.quality is None


@lru_cache(maxsize=64)
def parse(codec: str) -> Codec:
    """The codec of this name. Raises SpecError that lists the known ones."""
    if codec in ("raw", "zstd", "webp"):
        return Codec(codec, None)
    match = _LOSSY.fullmatch(codec)
    if match is None:
        hint = " JPEG is never lossless: give a quality, as in jpeg:95." if codec == "jpeg" else ""
        raise SpecError(f"unknown codec '{codec}'.{hint} Known: {KNOWN}")
    return Codec(match[1], int(match[2]))


def check(codec: str, dtype: str | np.dtype, shape: tuple[int, ...]) -> None:
    """Raise SpecError unless arrays of this dtype and shape can be stored by the codec."""
    kind = parse(codec).kind
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES:
        raise SpecError(f"codec '{codec}': dtype {dtype}; allowed: {', '.join(DTYPES)}")
    if kind not in _MOST_PIXELS_A_SIDE:
        return
    most = _MOST_PIXELS_A_SIDE[kind]
    image = len(shape) == 3 and shape[2] in (1, 3) and all(1 <= side <= most for side in shape[:2])
    if dtype != np.uint8 or not image:
        raise SpecError(
            f"codec '{codec}' stores uint8 images [h, w, 3] or [h, w, 1] of at most {most} pixels "
            f"a side, not {dtype} {list(shape)}; zstd and raw store any array"
        )


def encode(array: np.ndarray, codec: str) -> Bytes:
    """The array's bytes by this codec (deterministic). Raises SpecError as `check` does."""
    kind, quality = parse(codec)
    check(codec, array.dtype, array.shape)
    if kind == "raw":
        return raw_bytes(array).data
    if kind == "zstd":
        return _zstd()[0].compress(raw_bytes(array).data)
    image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
    buffer = io.BytesIO()
    if kind == "jpeg":
        # Full chroma: at equal size nearer to the picture than 4:2:0 at a higher quality.
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    else:
        image = image.convert("RGB")  # WebP has no grey images
        if quality is None:
            image.save(buffer, "WEBP", lossless=True, **_WEBP_EFFORT)
        else:
            image.save(buffer, "WEBP", quality=quality, method=0)
    return buffer.getbuffer()


def decode(data: Bytes, codec: str, dtype: str | np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of encode (for lossy codecs, nearly): an array of exactly this dtype and shape.

    It may be read-only. Raises CorruptDataError for bytes that are not whole or hold another
    array, and SpecError if no such array could have been encoded.
    """
    kind = parse(codec).kind
    check(codec, dtype, shape)
    try:
        if kind in _MOST_PIXELS_A_SIDE:
            return _decode_image(bytes(data), kind, shape)
        if kind == "zstd":
            data = _decode_zstd(data, math.prod(shape) * np.dtype(dtype).itemsize)
        return _from_raw(data, np.dtype(dtype), shape)
    except _Unfit as error:
        raise CorruptDataError(
            f"{len(data)} bytes of codec '{codec}' are not {np.dtype(dtype)} {list(shape)}: {error}"
        ) from error


class _Unfit(Exception):
    """Bytes that are not the wanted array, and why."""


def _from_raw(data: Bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise _Unfit("the size differs")
    if dtype == np.bool_ and len(data) and np.frombuffer(data, np.uint8).max() > 1:
        raise _Unfit("a bool is neither 0 nor 1")
    return (np.frombuffer(data, dtype) if len(data) else np.empty(0, dtype)).reshape(shape)


def _zstd() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """This thread's own: zstandard's objects must not be shared between threads."""
    if not hasattr(_local, "zstd"):
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True)
        _local.zstd = compressor, zstandard.ZstdDecompressor()
    return _local.zstd


def _decode_zstd(data: Bytes, nbytes: int) -> bytes:
    try:
        declared = zstandard.get_frame_parameters(data).content_size
        if declared != nbytes:
            raise _Unfit(f"it declares {declared} bytes, not {nbytes}")
        return _zstd()[1].decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _Unfit(str(error)) from error


def _decode_image(data: bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    height, width, channels = shape
    try:
        # Pillow allocates a WebP's canvas on opening it: its size is read before.
        if kind == "webp" and _webp_size(data) != (width, height):
            raise _Unfit(f"it declares {_webp_size(data)} pixels, not {(width, height)}")
        with Image.open(io.BytesIO(data), formats=(kind.upper(),)) as image:
            if image.size != (width, height):
                raise _Unfit(f"it declares {image.size} pixels, not {(width, height)}")
            if kind == "jpeg" and (not data.endswith(_JPEG_END) or "progressive" in image.info):
                raise _Unfit("it is truncated or progressive")
            if image.mode != ("L" if kind == "jpeg" and channels == 1 else "RGB"):
                raise _Unfit(f"its pixels are {image.mode}")
            if kind == "webp" and channels == 1 and data[12:16] == b"VP8L":
                pixels = np.asarray(image)
                if (pixels != pixels[..., :1]).any():
                    raise _Unfit("it has colours")
                pixels = pixels[..., :1]
            else:
                pixels = np.asarray(image.convert("L") if channels == 1 else image)
    except _Unfit:
        raise
    except Exception as error:  # what Pillow raises for bad data is not specified
        raise _Unfit(f"{type(error).__name__}: {error}") from error
    return pixels.reshape(shape)


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a WebP file that is one plain VP8 or VP8L image."""
    match = _WEBP.match(data)
    if match is None:
        raise _Unfit("it is no plain WebP image")
    if struct.unpack("<I", match[1])[0] + 8 != len(data):
        raise _Unfit("it is truncated")
    if match[2] is not None:
        bits = struct.unpack("<I", match[2])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", match[3])
    return width & 0x3FFF, height & 0x3FFF
