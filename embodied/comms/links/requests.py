"""What the users of a link hold: requests with replies, and what the gateway pushed."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from embodied.comms.channels import ErrorReply, Reply
from embodied.comms.codec import Frame, Message, Types, check_types, decode, encode, members_of
from embodied.comms.links.joiner import Joined
from embodied.comms.links.kinds import Kind
from embodied.comms.links.session import Session
from embodied.core.errors import CorruptDataError, LinkError

MAX_IN_FLIGHT = 64


def settled(header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> list[Frame]:
    """The codec's frames, which stay as they are: writeable arrays are copied, others must not be
    written through another view of theirs until they are sent."""
    return [
        frame if isinstance(frame, bytes) or frame.readonly else bytes(frame)
        for frame in encode(header, arrays)
    ]


class LinkRequests:
    """Requests of one kind over a link: the methods of comms.channels.Requests.

    What was under way when a session broke is lost: `request` says so, and after `send` the id is
    never answered; send again. At most MAX_IN_FLIGHT are under way or wait to be received.
    num_late: replies nobody waited for any more. num_bad: replies that could not be decoded.
    """

    def __init__(
        self,
        address: str,
        kind: Kind,
        types: Types,
        send: Callable[["LinkRequests", Sequence[Frame]], int | None],
        connected: Callable[[float], bool],
        forgotten: Callable[["LinkRequests"], None],
    ) -> None:
        self._types = (*members_of(types), ErrorReply)
        check_types(self._types)
        self.address = address
        self.kind = kind
        self._send = send
        self._connected = connected
        self._forgotten = forgotten
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._ready: deque[Reply] = deque()
        self._closed = False
        self.num_late = 0
        self.num_bad = 0

    def send(self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> int | None:
        """Send without waiting; the request's id, or None if nobody is connected or it is full.

        SpecError for a message that is too large for its kind.
        """
        with self._changed:
            full = len(self._waiting) + len(self._ready) >= MAX_IN_FLIGHT
        return None if full or self._closed else self._send(self, settled(header, arrays))

    def receive_ready(self) -> list[Reply]:
        """All replies that have come to requests made by `send`, without waiting."""
        with self._changed:
            ready = list(self._ready)
            self._ready.clear()
            return ready

    def forget(self, number: int) -> None:
        """Discard the reply to this request if it still comes."""
        with self._changed:
            self._waiting.discard(number)

    def lost(self, number: int) -> bool | None:
        """Whether its session broke: while that lives, what was sent arrives and is answered."""
        with self._changed:
            ready = any(reply.id == number for reply in self._ready)
            return number not in self._waiting and not ready

    def request(
        self, header: msgspec.Struct, arrays: Mapping[str, np.ndarray], timeout_s: float
    ) -> Message:
        """Send, wait, return (header, arrays). Raises LinkError after timeout_s or as soon as the
        session breaks, or the error with which the server refused."""
        deadline_s = time.monotonic() + timeout_s
        while (number := self.send(header, arrays)) is None:
            self._pause(deadline_s, timeout_s)
        with self._changed:
            self._changed.wait_for(
                lambda: number not in self._waiting, max(0.0, deadline_s - time.monotonic())
            )
            late = number in self._waiting
            self._waiting.discard(number)
            reply = next((reply for reply in self._ready if reply.id == number), None)
            if reply is not None:
                self._ready.remove(reply)
        if late:
            raise self._silent(timeout_s)
        if reply is None:
            raise LinkError(f"the link to {self.address} broke before it answered")
        if isinstance(reply.header, ErrorReply):
            raise reply.header.exception()
        return reply.header, reply.arrays

    def _pause(self, deadline_s: float, timeout_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise self._silent(timeout_s)
        if self._connected(left_s):  # full, then
            with self._changed:
                self._changed.wait(min(left_s, 0.01))

    def _silent(self, timeout_s: float) -> LinkError:
        return LinkError(
            f"no answer from {self.address} in {timeout_s:g} s; is the gateway running, and does "
            "it admit this host?"
        )

    def wait(self, timeout_s: float) -> bool:
        """Whether a reply is there within timeout_s (negative counts as 0)."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._ready), max(0.0, timeout_s))

    def close(self) -> None:
        """Take no more replies; the link stays up. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._ready.clear()
        self._forgotten(self)

    def expect(self, number: int) -> None:
        """The link's: a request with this id is about to be sent."""
        with self._changed:
            self._waiting.add(number)

    def take(self, number: int, frames: Sequence[Frame]) -> None:
        """The link's: a reply has come."""
        with self._changed:
            if number not in self._waiting:
                self.num_late += 1
                return
        try:
            reply = Reply(number, *decode(frames, self._types))
        except CorruptDataError:
            self.num_bad += 1
            return
        with self._changed:
            if number in self._waiting:
                self._waiting.remove(number)
                self._ready.append(reply)
                self._changed.notify_all()

    def lose(self) -> None:
        """The link's: the session broke."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()


class Notices:
    """What the gateway pushed of one kind, oldest first; one thread may use it.

    Room is given back when a notice is received: the gateway sends no more than the kind's bound
    ahead. num_bad: messages that could not be decoded.
    """

    def __init__(self, kind: Kind, types: Types) -> None:
        check_types(types)
        self.kind = kind
        self._types = types
        self._changed = threading.Condition()
        self._ready: deque[tuple[Session, Joined, Sequence[Frame]]] = deque()
        self.num_bad = 0

    def receive_ready(self) -> list[Message]:
        """All that has come, without waiting."""
        with self._changed:
            ready = list(self._ready)
            self._ready.clear()
        found: list[tuple[Any, dict[str, np.ndarray]]] = []
        for session, joined, frames in ready:
            try:
                found.append(decode(frames, self._types))
            except CorruptDataError:
                self.num_bad += 1
            session.handled(joined)
        return found

    def wait(self, timeout_s: float) -> bool:
        """Whether something is there within timeout_s (negative counts as 0)."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._ready), max(0.0, timeout_s))

    def take(self, session: Session, joined: Joined, frames: Sequence[Frame]) -> None:
        """The link's: a notice has come."""
        with self._changed:
            self._ready.append((session, joined, frames))
            self._changed.notify_all()
