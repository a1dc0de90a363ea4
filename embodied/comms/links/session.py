"""One session as either end sees it: pieces out in order of urgency, pieces in, pings, acks."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from embodied.comms.codec import Frame
from embodied.comms.framing import parts
from embodied.comms.links import link_pb2 as pb
from embodied.comms.links import wire
from embodied.comms.links.joiner import Joined, Joiner
from embodied.comms.links.kinds import Bound, Kind
from embodied.comms.links.outbox import Cut, Outbox, Traffic
from embodied.comms.links.pacing import Cap, Window
from embodied.core.errors import CorruptDataError

PING_S = 0.5
DEAD_S = 3.0
_ACK_S = 0.01
_ACK_BYTES = 512 << 10
_ACK_MESSAGES = 8
_RTTS = 9


class Session:
    """Sends and receives messages over one stream of pieces, for as long as the stream lives.

    One thread drives `outgoing`, one calls `take`; everything else may be called by any. deliver:
    called by the latter for each whole message; the message's room is free when `handled` is
    called. bounds: of what is sent and of what is received.
    """

    def __init__(
        self,
        send_bounds: Mapping[Kind, Bound],
        receive_bounds: Mapping[Kind, Bound],
        traffic: Mapping[str, Traffic],
        deliver: Callable[[Joined], None],
        cap: Cap | None,
    ) -> None:
        self._outbox = Outbox(send_bounds, traffic)
        self._joiner = Joiner(receive_bounds)
        self._traffic = traffic
        self._deliver = deliver
        self._cap = cap
        self._window = Window()
        self._kinds = {kind.id: kind for kind in receive_bounds}
        self._changed = threading.Condition()
        self._joining = threading.Lock()  # taken before the condition's
        self._end: str | None = None
        self._ended = threading.Event()
        self._goodbye: bytes | None = None
        self._replies: deque[bytes] = deque(maxlen=16)
        self._received = 0
        self._acknowledged = 0
        self._handled: dict[int, tuple[int, int]] = {}
        self._num_handled = 0
        self._ack_since_s: float | None = None
        self._heard_s = time.monotonic()
        self._pinged_s = 0.0
        self._nonce = 0
        self._pinging = False
        self._rtts_s: deque[float] = deque(maxlen=_RTTS)

    @property
    def end(self) -> str | None:
        """Why it ended; None while it lives."""
        return self._end

    @property
    def silent_s(self) -> float:
        """Time since something came from the other end."""
        return time.monotonic() - self._heard_s

    @property
    def rtt_ms(self) -> float | None:
        """Time for a ping and its answer, the median of the last nine; None before the first."""
        rtts_s = list(self._rtts_s)
        return median(rtts_s) * 1e3 if rtts_s else None

    def depths(self) -> dict[str, int]:
        """Messages of each kind that have not been sent whole."""
        with self._changed:
            return self._outbox.depths()

    def put(
        self,
        kind: Kind,
        number: int,
        frames: Sequence[Frame],
        *,
        key: str = "",
        kept: bool = False,
        wait: bool = False,
    ) -> bool:
        """Queue a message of the codec's frames, which stay as they are until it is sent; whether
        it was taken. wait: until there is room, or the session ends. SpecError if too large."""
        message = parts(number, frames)
        with self._changed:
            while self._end is None:
                if self._outbox.put(kind, message, key, kept):
                    self._changed.notify_all()
                    return True
                if not wait:
                    break
                self._changed.wait()
        return False

    def handled(self, joined: Joined) -> None:
        """Give back the room of a message that was delivered."""
        with self._joining, self._changed:
            self._handled[joined.kind.id] = self._joiner.handled(joined)
            self._num_handled += 1
            self._ack_later()

    def close(self, reason: str, tell: bool = True) -> None:
        """End the session; the first reason stays. tell: the other end as well."""
        with self._changed:
            if self._end is None:
                self._end = reason
                self._goodbye = wire.goodbye_piece(reason) if tell else None
                self._ended.set()
                self._changed.notify_all()

    def wait_end(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most timeout_s."""
        return self._ended.wait(timeout_s)

    def outgoing(self) -> Iterator[bytes]:
        """Pieces to send; each is asked for when the one before has been taken. Ends with the
        session."""
        while True:
            with self._changed:
                while (piece := self._next()) is None and self._end is None:
                    self._changed.wait(self._pause_s())
                if self._end is not None:
                    break
                if isinstance(piece, Cut):
                    self._changed.notify_all()  # there may be room
            if isinstance(piece, Cut):
                piece = wire.part_piece(
                    piece.kind.id, piece.message, piece.offset, piece.total, piece.views
                )
            assert piece is not None
            yield piece
        if self._goodbye is not None:
            yield self._goodbye

    def take(self, raw: bytes) -> None:
        """Take a piece in. CorruptDataError if it breaks the rules: end the session then."""
        piece = wire.parse(raw)
        now_s = time.monotonic()
        self._heard_s = now_s
        if isinstance(piece, wire.Part):
            self._take_part(piece)
            return
        with self._changed:
            match piece.WhichOneof("body"):
                case "ping":
                    self._replies.append(
                        pb.Piece(pong=pb.Pong(nonce=piece.ping.nonce)).SerializeToString()
                    )
                    self._changed.notify_all()
                case "pong":
                    if self._pinging and piece.pong.nonce == self._nonce:
                        self._rtts_s.append(now_s - self._pinged_s)
                        self._pinging = False
                case "ack":
                    self._take_ack(piece.ack, now_s)
                    self._changed.notify_all()
                case "goodbye":
                    self._end = self._end or piece.goodbye.reason or "the other end closed it"
                    self._ended.set()
                    self._changed.notify_all()
                case body:
                    raise CorruptDataError(f"a {body} within a session")

    def _take_part(self, part: wire.Part) -> None:
        with self._joining:
            joined = self._joiner.add(part)
        with self._changed:
            traffic = self._traffic[self._kinds[part.kind].name]
            traffic.received += joined is not None
            traffic.received_bytes += len(part.data)
            self._received += len(part.data)
            self._ack_later()
        if joined is not None:
            self._deliver(joined)

    def _take_ack(self, ack: pb.Ack, now_s: float) -> None:
        right = self._window.acknowledge(ack.bytes, now_s)
        for handled in ack.handled:
            right &= self._outbox.handled(handled.kind, handled.messages, handled.bytes)
        if not right:
            raise CorruptDataError("an acknowledgement of what was not sent")

    def _ack_later(self) -> None:
        first = self._ack_since_s is None
        if self._ack_since_s is None:
            self._ack_since_s = time.monotonic()
        if first or self._ack_is_due(self._ack_since_s):
            self._changed.notify_all()

    def _ack_is_due(self, now_s: float) -> bool:
        return self._ack_since_s is not None and (
            now_s - self._ack_since_s >= _ACK_S
            or self._received - self._acknowledged >= _ACK_BYTES
            or self._num_handled >= _ACK_MESSAGES
        )

    def _next(self) -> bytes | Cut | None:
        """What goes next, if anything: what keeps the other end informed, then messages."""
        now_s = time.monotonic()
        if self._replies:
            return self._replies.popleft()
        if not self._pinging and now_s - self._pinged_s >= PING_S:
            self._pinged_s, self._pinging = now_s, True
            self._nonce += 1
            return pb.Piece(ping=pb.Ping(nonce=self._nonce)).SerializeToString()
        if self._ack_is_due(now_s):
            return self._ack()
        waiting = self._cap is not None and self._cap.wait_s(now_s) > 0
        most = self._window.piece_bytes(wire.MAX_PIECE_BYTES)
        cut = self._outbox.take(most, urgent_only=waiting or not self._window.open)
        if cut is not None:
            self._window.send(cut.nbytes, now_s)
            if self._cap is not None:
                self._cap.spend(cut.nbytes, now_s)
        return cut

    def _ack(self) -> bytes:
        handled = [
            pb.Handled(kind=kind, messages=messages, bytes=nbytes)
            for kind, (messages, nbytes) in self._handled.items()
        ]
        self._handled.clear()
        self._num_handled = 0
        self._acknowledged = self._received
        self._ack_since_s = None
        ack = pb.Ack(bytes=self._received, handled=handled)
        return pb.Piece(ack=ack).SerializeToString()

    def _pause_s(self) -> float:
        """Time until there may be something to send although nothing changes."""
        now_s = time.monotonic()
        pause_s = PING_S if self._pinging else self._pinged_s + PING_S - now_s
        if self._ack_since_s is not None:
            pause_s = min(pause_s, self._ack_since_s + _ACK_S - now_s)
        if self._cap is not None and self._cap.wait_s(now_s) > 0:
            pause_s = min(pause_s, self._cap.wait_s(now_s))
        return max(pause_s, 0.001)
