"""The gateway's end: takes one host's experience in and passes it to the run's buffer service."""

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from embodied.buffer.serve.messages import AppendRequest, ResumeRequest
from embodied.buffer.spool.messages import UploadRequest, unwrap
from embodied.buffer.spool.names import prefix_of
from embodied.buffer.steps.records import check_payload, decode_header
from embodied.buffer.steps.schema import decode_schema
from embodied.comms.channels import Requests
from embodied.comms.codec import Message
from embodied.core.errors import EmbodiedError, LinkError

_decode_schema = lru_cache(maxsize=64)(decode_schema)


class ForeignStreamError(EmbodiedError):
    """A host names a stream that does not belong to it."""


class Receiver:
    """Serves one host, which the link has identified. For one thread.

    requests: to the BufferService, with its REPLIES. timeout_s: how long its answer is waited for.
    Nothing of an upload is passed on before all of it has been checked; what the steps contain is
    checked by the buffer service, step by step.
    """

    def __init__(self, host: str, requests: Requests, timeout_s: float = 2.0) -> None:
        self._host = host
        self._prefix = prefix_of(host)
        self._requests = requests
        self._timeout_s = timeout_s

    def handle(self, header: Any, arrays: Mapping[str, np.ndarray]) -> Message:
        """Answer one of UPLOADS: one of UPLOAD_REPLIES, or the buffer service's ErrorReply.

        Raises what check raises, and LinkError if the buffer service does not answer.
        """
        return self._forward(*self.check(header, arrays))

    def check(
        self, header: UploadRequest | ResumeRequest, arrays: Mapping[str, np.ndarray]
    ) -> tuple[msgspec.Struct, dict[str, np.ndarray]]:
        """What to pass to the buffer service for one of UPLOADS.

        Raises ForeignStreamError, and CorruptDataError for what no uploader sends.
        """
        if isinstance(header, ResumeRequest):
            for stream, _ in header.episodes:
                self._check_stream(stream)
            return header, {}
        data, lengths = unwrap(header, arrays)
        schema, start = _decode_schema(header.schema), 0
        for length in lengths:
            payload = data[start : start + length]
            step, begin = decode_header(payload)
            self._check_stream(step.stream)
            check_payload(payload, begin, step, schema)
            start += length
        payloads = np.frombuffer(data, np.uint8)
        return AppendRequest(header.schema), {"payloads": payloads, "lengths": arrays["lengths"]}

    def _check_stream(self, stream: str) -> None:
        if not stream.startswith(self._prefix):
            raise ForeignStreamError(
                f"host '{self._host}' sends steps of stream '{stream}'; its streams begin with "
                f"'{self._prefix}'"
            )

    def _forward(self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> Message:
        deadline_s = time.monotonic() + self._timeout_s
        number: int | None = None
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            if number is None and (number := self._requests.send(header, arrays)) is None:
                time.sleep(min(remaining_s, 0.01))
                continue
            self._requests.wait(remaining_s)
            for reply in self._requests.receive_ready():
                if reply.id == number:
                    return reply.header, reply.arrays
        if number is not None:
            self._requests.forget(number)
        raise LinkError(
            f"the buffer service at {self._requests.address} did not answer in {self._timeout_s:g} "
            "s; is its process running? The host keeps its steps and sends them again"
        )
