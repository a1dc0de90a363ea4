"""Parts to messages: every number is checked before memory is taken for it.

No threads, no clock, no sockets: the session around it holds a lock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import crc32c
import numpy as np

from embodied.comms.links.kinds import Bound, Kind
from embodied.comms.links.wire import MAX_PIECE_BYTES, Part
from embodied.core.errors import CorruptDataError


@dataclass(frozen=True, slots=True)
class Joined:
    """A whole message."""

    kind: Kind
    message: memoryview


class _Lane:
    """What has come of one kind. begun, handled: messages since the beginning of which something
    came, and of which the memory is free again."""

    def __init__(self, kind: Kind, bound: Bound) -> None:
        self.kind = kind
        self.bound = bound
        self.begun = 0
        self.begun_bytes = 0
        self.handled = 0
        self.handled_bytes = 0
        self.message: memoryview | None = None
        self.size = 0


class Joiner:
    """Joins parts of all kinds in one direction.

    Memory is taken for a message when it begins, and touched as its bytes come: at most the bound
    of each kind, whatever the other end sends.
    """

    def __init__(self, bounds: Mapping[Kind, Bound]) -> None:
        self._lanes = {kind.id: _Lane(kind, bound) for kind, bound in bounds.items()}

    def add(self, part: Part) -> Joined | None:
        """Take a part in; the message if this was its last. CorruptDataError for a part that a
        sender which keeps the rules does not send: nothing after it can be used."""
        lane = self._lanes.get(part.kind)
        if lane is None:
            raise CorruptDataError(
                f"a part of kind {part.kind}; known are {', '.join(map(str, self._lanes))}"
            )
        size = len(part.data)
        if not 1 <= size <= MAX_PIECE_BYTES:
            raise CorruptDataError(f"a part of {size} bytes; 1 to {MAX_PIECE_BYTES} are right")
        if lane.message is None:
            self._check_first(lane, part)
        expected = (lane.begun + (lane.message is None), lane.size)
        total = part.total if lane.message is None else lane.message.nbytes
        if (part.message, part.offset) != expected or part.total != total:
            raise CorruptDataError(
                f"a part of message {part.message} of kind '{lane.kind.name}' at byte "
                f"{part.offset} of {part.total}; message {expected[0]} at byte {expected[1]} "
                f"of {total} was next"
            )
        if size > total - lane.size:
            raise CorruptDataError(
                f"a part of {size} bytes at byte {lane.size} of a message of {total}"
            )
        if crc32c.crc32c(part.data) != part.crc32c:
            raise CorruptDataError(
                f"a part of message {part.message} of kind '{lane.kind.name}' does not match its "
                "checksum"
            )
        if lane.message is None:
            lane.message = np.empty(total, np.uint8).data
            lane.begun += 1
            lane.begun_bytes += total
        lane.message[lane.size : lane.size + size] = part.data
        lane.size += size
        if lane.size < total:
            return None
        message, lane.message, lane.size = lane.message, None, 0
        return Joined(lane.kind, message)

    def _check_first(self, lane: _Lane, part: Part) -> None:
        bound = lane.bound
        if not 1 <= part.total <= bound.message_bytes:
            raise CorruptDataError(
                f"a message of {part.total} bytes of kind '{lane.kind.name}'; 1 to "
                f"{bound.message_bytes} are right"
            )
        held = lane.begun - lane.handled
        held_bytes = lane.begun_bytes - lane.handled_bytes
        if held >= bound.messages or held_bytes + part.total > bound.total_bytes:
            raise CorruptDataError(
                f"a message of {part.total} bytes of kind '{lane.kind.name}' while {held} of "
                f"{held_bytes} bytes are not handled; at most {bound.messages} messages of "
                f"{bound.total_bytes} bytes together are right"
            )

    def handled(self, joined: Joined) -> tuple[int, int]:
        """Give back the room of a message; how many messages of its kind, and of how many bytes,
        were handled since the beginning."""
        lane = self._lanes[joined.kind.id]
        lane.handled += 1
        lane.handled_bytes += joined.message.nbytes
        return lane.handled, lane.handled_bytes
