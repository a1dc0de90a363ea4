"""What waits to be sent: one bounded, keyed queue per kind, and which piece goes next.

No threads, no clock, no sockets: the session around it holds a lock.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from embodied.comms.codec import Frame
from embodied.comms.links.kinds import Bound, Kind
from embodied.core.errors import SpecError


@dataclass(slots=True)
class Traffic:
    """Messages and bytes of a kind since counting began. received: handed on, sent: their last
    piece was; dropped: gave way to others or to a full queue."""

    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """A piece to send: fields of link.proto's Part, its data in views."""

    kind: Kind
    message: int
    offset: int
    total: int
    views: list[memoryview]
    nbytes: int


class _Item:
    """A message that waits. kept: it may not give way to another."""

    def __init__(self, parts: Sequence[Frame], key: str, kept: bool) -> None:
        self.views = deque(memoryview(part).cast("B") for part in parts if len(part))
        self.total = sum(view.nbytes for view in self.views)
        self.key = key
        self.kept = kept
        self.offset = 0

    def cut(self, most: int) -> list[memoryview]:
        found: list[memoryview] = []
        while most and self.views:
            view = self.views.popleft()
            if view.nbytes > most:
                self.views.appendleft(view[most:])
                view = view[:most]
            found.append(view)
            most -= view.nbytes
        return found


class _Lane:
    """The queue of one kind. begun, handled: messages since the beginning of which the first piece
    was taken, and which the other end holds no more."""

    def __init__(self, kind: Kind, bound: Bound, traffic: Traffic) -> None:
        self.kind = kind
        self.bound = bound
        self.traffic = traffic
        self.waiting: deque[_Item] = deque()
        self.waiting_bytes = 0
        self.current: _Item | None = None
        self.begun = 0
        self.begun_bytes = 0
        self.handled = 0
        self.handled_bytes = 0
        self.served = 0.0

    def fits(self, nbytes: int) -> bool:
        return (
            len(self.waiting) < self.bound.messages
            and self.waiting_bytes + nbytes <= self.bound.total_bytes
        )

    def ready(self) -> bool:
        """Whether a piece may go: the other end has room for what it belongs to."""
        if self.current is not None:
            return True
        return bool(self.waiting) and (
            self.begun - self.handled < self.bound.messages
            and self.begun_bytes - self.handled_bytes + self.waiting[0].total
            <= self.bound.total_bytes
        )

    def drop(self, item: _Item) -> None:
        self.waiting.remove(item)
        self.waiting_bytes -= item.total
        self.traffic.dropped += 1

    def begin(self) -> _Item:
        item = self.waiting.popleft()
        self.waiting_bytes -= item.total
        self.begun += 1
        self.begun_bytes += item.total
        return item


class Outbox:
    """Queues of all kinds in one direction; `traffic` counts by kind's name."""

    def __init__(self, bounds: Mapping[Kind, Bound], traffic: Mapping[str, Traffic]) -> None:
        self._lanes = {
            kind.id: _Lane(kind, bound, traffic[kind.name]) for kind, bound in bounds.items()
        }
        self._started: dict[int, float] = {}

    def put(self, kind: Kind, parts: Sequence[Frame], key: str = "", kept: bool = False) -> bool:
        """Queue a message; whether it was taken.

        kept: it never gives way; False then means that there is no room yet. Bytes are not
        copied. SpecError for a message larger than its kind's largest.
        """
        lane = self._lanes[kind.id]
        item = _Item(parts, key, kept)
        if item.total > lane.bound.message_bytes:
            raise SpecError(
                f"a message of {item.total} bytes; those of kind '{kind.name}' have at most "
                f"{lane.bound.message_bytes} in this direction"
            )
        if not kept and kind.policy == "latest":
            for other in [o for o in lane.waiting if o.key == key and not o.kept]:
                lane.drop(other)
        if not kept and kind.policy != "block":
            while not lane.fits(item.total):
                oldest = next((o for o in lane.waiting if not o.kept), None)
                if oldest is None:
                    lane.traffic.dropped += 1
                    return False
                lane.drop(oldest)
        if not lane.fits(item.total):
            return False
        lane.waiting.append(item)
        lane.waiting_bytes += item.total
        return True

    def take(self, most: int, urgent_only: bool = False) -> Cut | None:
        """The next piece, of at most `most` bytes; None if none may go."""
        ready = [
            lane
            for lane in self._lanes.values()
            if lane.ready() and (lane.kind.urgent or not urgent_only)
        ]
        if not ready:
            return None
        lane = min(ready, key=lambda lane: (lane.kind.priority, self._start(lane), lane.kind.id))
        if lane.current is None:
            lane.current = lane.begin()
        item = lane.current
        offset, views = item.offset, item.cut(most)
        nbytes = sum(view.nbytes for view in views)
        item.offset += nbytes
        start = self._start(lane)
        self._started[lane.kind.priority] = start
        lane.served = start + nbytes / lane.kind.share
        lane.traffic.sent_bytes += nbytes
        if item.offset == item.total:
            lane.current = None
            lane.traffic.sent += 1
        return Cut(lane.kind, lane.begun, offset, item.total, views, nbytes)

    def _start(self, lane: _Lane) -> float:
        """Start tag of start-time fair queueing: who was idle is level with who is served."""
        return max(lane.served, self._started.get(lane.kind.priority, 0.0))

    def handled(self, kind_id: int, messages: int, nbytes: int) -> bool:
        """Take in how many messages of a kind, of how many bytes, the other end has handled since
        the beginning; False if that cannot be."""
        lane = self._lanes.get(kind_id)
        if lane is None:
            return False
        ended, ended_bytes = lane.begun, lane.begun_bytes
        if lane.current is not None:
            ended, ended_bytes = ended - 1, ended_bytes - lane.current.total
        if not (lane.handled <= messages <= ended and lane.handled_bytes <= nbytes <= ended_bytes):
            return False
        lane.handled, lane.handled_bytes = messages, nbytes
        return True

    def depths(self) -> dict[str, int]:
        """Messages of each kind that have not been sent whole."""
        return {
            lane.kind.name: len(lane.waiting) + (lane.current is not None)
            for lane in self._lanes.values()
        }


def count_from_zero(kinds: Iterable[Kind]) -> dict[str, Traffic]:
    """New counters for each kind."""
    return {kind.name: Traffic() for kind in kinds}
