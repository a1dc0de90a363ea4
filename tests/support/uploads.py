"""Uploads of experience, right ones and such as lie."""

import numpy as np
import zstandard

from embodied.buffer.spool.messages import UploadRequest, wrap
from embodied.buffer.steps.records import encode_step
from embodied.buffer.steps.schema import Codecs, encode_schema

CODECS = Codecs({})


def upload(*steps):
    schema = CODECS.schema_of(steps[0])
    return wrap(encode_schema(schema), [bytes(encode_step(step, schema)) for step in steps])


def changed(request, **fields):
    return UploadRequest(
        **{n: fields.get(n, getattr(request, n)) for n in request.__struct_fields__}
    )


def bombs(request, arrays):
    """Name → (header, arrays) of uploads that lie."""
    frame = zstandard.ZstdCompressor().compress
    lengths, n = arrays["lengths"], request.nbytes
    zeros = frame(bytes(1 << 28))
    undeclared = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28))
    wide = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    wide_frame = stream.compress(bytes(n)) + stream.flush()
    packed = changed(request, zstd=True)

    def arrays_of(data, lengths=lengths):
        return {"payloads": np.frombuffer(data, np.uint8), "lengths": lengths}

    long = np.array([n - 1, 2**32 - 1], np.uint32)
    most = 4096 * 1000
    return {
        "declares more": (packed, arrays_of(zeros)),
        "declares nothing": (packed, arrays_of(undeclared)),
        "nested": (changed(packed, nbytes=1 << 20), arrays_of(frame(zeros), long)),
        "wide window": (packed, arrays_of(wide_frame)),
        "two frames": (packed, arrays_of(frame(bytes(n)) + frame(b"x"))),
        "no frame": (packed, arrays_of(b"\0" * (n - 1))),
        "short": (request, arrays_of(bytes(n - 1))),
        "long": (request, arrays_of(bytes(n + 1))),
        "lengths": (request, arrays_of(bytes(n), long)),
        "too many": (
            changed(request, nbytes=5000),
            arrays_of(bytes(5000), np.ones(5000, np.uint32)),
        ),
        "empty": (request, arrays_of(bytes(n), np.zeros(0, np.uint32))),
        "large": (changed(packed, nbytes=most), arrays_of(zeros, np.full(4096, 1000, np.uint32))),
        "dtype": (request, {"payloads": np.zeros(n, np.int8), "lengths": lengths}),
        "missing": (request, {"payloads": arrays["payloads"]}),
        "checksum": (changed(request, crc32c=request.crc32c ^ 1), arrays),
        "schema": (changed(request, schema=request.schema[:-1] + b"x"), arrays),
    }
