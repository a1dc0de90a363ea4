"""One connection between two processes, of which one started the other.

A connected socket without an address: nobody else can reach it, and its end is the other's death.
"""

import socket
import time
from collections.abc import Mapping

import msgspec
import numpy as np

from embodied.comms.channels import Reply
from embodied.comms.codec import Types, check_types, decode, encode, members_of
from embodied.comms.framing import PIECE, Stream, pack, unpack
from embodied.core.errors import LinkError, SpecError

MAX_BYTES = 1 << 30


class PairEnd:
    """An end of a connection: messages in order, each with an id; one thread may use it."""

    def __init__(self, link: socket.socket, types: Types) -> None:
        """types: of the headers that may come."""
        check_types(types)
        self._types = members_of(types)
        self._link = link
        self._stream = Stream(MAX_BYTES)

    def send(
        self,
        number: int,
        header: msgspec.Struct,
        arrays: Mapping[str, np.ndarray],
        timeout_s: float | None = None,
    ) -> None:
        """Send a message whose id is `number`; None waits for ever.

        SpecError for one that may not be sent. LinkError if the other end is gone or takes nothing
        for timeout_s: the connection is of no use then.
        """
        message = pack(number, encode(header, arrays))
        if len(message) > MAX_BYTES:
            raise SpecError(f"a message of {len(message)} bytes; at most {MAX_BYTES} are sent")
        try:
            self._link.settimeout(timeout_s)
            self._link.sendall(message)
        except TimeoutError:
            raise LinkError(f"took no message in {timeout_s:g} s") from None
        except OSError as error:
            raise LinkError(f"broke off: {error}") from error

    def receive(self, timeout_s: float | None = None) -> Reply:
        """The next message; None waits for ever.

        LinkError if the other end is gone or silent for timeout_s; CorruptDataError for anything
        that `send` does not produce. The connection is of no use then.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := next(self._stream.messages(), None)) is None:
            left_s = None if deadline_s is None else max(1e-6, deadline_s - time.monotonic())
            try:
                self._link.settimeout(left_s)
                data = self._link.recv(PIECE)
            except TimeoutError:
                raise LinkError(f"gave no answer in {timeout_s:g} s") from None
            except OSError as error:
                raise LinkError(f"broke off: {error}") from error
            if not data:
                raise LinkError("has ended")
            self._stream.feed(data)
        number, frames = unpack(message)
        return Reply(number, *decode(frames, self._types))

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        self._link.close()
