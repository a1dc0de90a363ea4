"""Networks between hosts, imitated on loopback: a relay with delay, rate, losses and cuts.

Each direction of the relay is one link that its connections share. Bytes that are read are given
a time at which they leave (a token bucket of the link's rate) and one at which they arrive; they
are written then. Times are computed and never slept one after another, so that a late wake-up
makes later bytes no later, and the rate holds on a busy machine. What does not fit into the link's
queue is not read, which slows the sender down as TCP does.

A loss on a stream of bytes shows as a wait for the repeated segment: of 1,448-byte segments a
share `loss`, drawn from the seed and the place in the stream, arrives a round trip later than it
would have (two if it is lost again, and so on), and everything behind it waits, then comes at once.
A new connection waits for the round trips of TCP's handshake.

A link can also fall silent: nothing passes and nothing closes, until what waited comes at once.

What it cannot imitate: congestion control, which at 2 % loss and 200 ms leaves CUBIC or Reno some
0.5 Mbit/s (this relay is nearer to BBR: the rate stays), reordering, duplicates, packet headers.
tc's netem, which could, is missing in many kernels (among them the one of our tests).
"""

import fcntl
import math
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import Random
from typing import Literal, Self

from embodied.comms.identity.binding import check_dial
from sim.links import Link, Profile, Stream

Direction = Literal["up", "down"]
"""up: from who connected to the relay to the target; down: back."""

QUEUE_S = 0.1
"""How long bytes may wait for a link to be free."""

_PIECE_S = 0.002
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 2 << 10, 64 << 10
_MIN_WINDOW_BYTES, _MAX_WINDOW_BYTES = 256 << 10, 8 << 20
_RECEIVE_BYTES = 128 << 10
_CONNECT_S = 5.0
_SENT_S = 5.0
_END_S = 10.0


class Relay:
    """Listens on a loopback port and passes what comes to `target` and back, as `profile` has it.

    A context manager. target: (host, port) on loopback. The seed decides losses, jitter and when
    the profile's cuts come. `address` is (host, port) to connect to.
    """

    def __init__(self, target: tuple[str, int], profile: Profile, seed: int = 0) -> None:
        check_dial(f"{target[0]}:{target[1]}", has_identity=False)
        self.target = target
        self.profile = profile
        self.seed = seed
        self.connections = 0
        self.cuts = 0
        self._sides = {name: _Side(Link(profile.rate_bit_s), self.cut) for name in ("up", "down")}
        self._open: set[_Connection] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._refuse_until_s = time.monotonic()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address: tuple[str, int] = self._listener.getsockname()
        work = [self._accept] if profile.cut_every_s is None else [self._accept, self._cut_at_times]
        self._threads = [threading.Thread(target=one, daemon=True) for one in work]

    @property
    def bytes_up(self) -> int:
        """Bytes delivered to the target."""
        return self._sides["up"].num_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes delivered to those who connected."""
        return self._sides["down"].num_bytes

    def cut(self, duration_s: float = 0.0) -> None:
        """Close every connection, losing what is on its way, and refuse new ones for a time."""
        with self._lock:
            self.cuts += 1
            self._refuse_until_s = max(self._refuse_until_s, time.monotonic() + duration_s)
            closing = list(self._open)
        for connection in closing:
            connection.close()

    def cut_after(self, num_bytes: int, direction: Direction, duration_s: float = 0.0) -> None:
        """Cut as soon as exactly so many more bytes have been delivered in a direction."""
        if num_bytes == 0:
            self.cut(duration_s)
        else:
            self._sides[direction].cut_after(num_bytes, duration_s)

    def fall_silent(self, duration_s: float) -> None:
        """Let no byte pass for a time, in either direction, and close nothing."""
        for side in self._sides.values():
            side.silent_until_s = time.monotonic() + duration_s

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        with self._lock:
            closing = list(self._open)
        for connection in closing:
            connection.close()
        for thread in (*self._threads, *(one for each in closing for one in each.threads)):
            thread.join(_END_S)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if self._ended.is_set():
                    return
                raise
            self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        target = socket.socket()
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        target.settimeout(_CONNECT_S)
        reached = not self._refuses() and target.connect_ex(self.target) == 0
        target.settimeout(None)
        with self._lock:
            if reached and not self._refuses():
                self.connections += 1
                seed = f"{self.seed}/{self.connections}"
                self._open.add(
                    _Connection(client, target, self._sides, self.profile, seed, self._forget)
                )
                return
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        client.close()
        target.close()

    def _refuses(self) -> bool:
        return self._ended.is_set() or time.monotonic() < self._refuse_until_s

    def _cut_at_times(self) -> None:
        assert self.profile.cut_every_s is not None
        times = Random(f"{self.seed}/cuts")
        while not self._ended.wait(times.expovariate(1 / self.profile.cut_every_s)):
            self.cut(self.profile.cut_s)

    def _forget(self, connection: "_Connection") -> None:
        with self._lock:
            self._open.discard(connection)


class _Side:
    """One direction: its link, what it has delivered, and what is left until it is to be cut."""

    def __init__(self, link: Link, cut: Callable[[float], None]) -> None:
        self.link = link
        self.num_bytes = 0
        self.silent_until_s = -math.inf
        self._cut = cut
        self._cut_s = 0.0
        self._left: int | None = None
        self._lock = threading.Lock()

    def cut_after(self, num_bytes: int, duration_s: float) -> None:
        with self._lock:
            self._left, self._cut_s = num_bytes, duration_s

    def deliver(self, target: socket.socket, data: bytes) -> None:
        """Write the bytes, or as many as are left, and then cut."""
        if self._left is None:
            target.sendall(data)
            with self._lock:
                self.num_bytes += len(data)
            return
        with self._lock:  # one connection after the other, so that the number is exact
            part = data[: self._left]
            target.sendall(part)
            self.num_bytes += len(part)
            if self._left is None:
                return
            self._left -= len(part)
            if self._left == 0:
                _wait_until_sent(target)
                self._cut(self._cut_s)
                self._left = None


class _Connection:
    """A client's socket and the target's, and four threads between them."""

    def __init__(
        self,
        client: socket.socket,
        target: socket.socket,
        sides: Mapping[str, _Side],
        profile: Profile,
        seed: str,
        ended: "Callable[[_Connection], None]",
    ) -> None:
        self._sockets = (client, target)
        self._ended = ended
        self._lock = threading.Lock()
        for end in self._sockets:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        now_s = time.monotonic()
        self._pipes: list[_Pipe] = []
        for name, source, sink, handshake_delays in (
            ("up", client, target, 2),
            ("down", target, client, 3),
        ):
            opened_s = now_s + handshake_delays * profile.delay_s
            stream = Stream(profile, sides[name].link, f"{seed}/{name}")
            self._pipes.append(_Pipe(source, sink, sides[name], stream, profile, opened_s))
        work = [half for pipe in self._pipes for half in (pipe.read, pipe.write)]
        self._running = len(work)
        self.threads = [
            threading.Thread(target=self._run, args=(half,), daemon=True) for half in work
        ]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Close both ends, whatever is on its way. From any thread, more than once."""
        for pipe in self._pipes:
            pipe.close()
        with self._lock:
            for end in self._sockets if self._running else ():
                with suppress(OSError):  # it may not be connected any more
                    end.shutdown(socket.SHUT_RDWR)

    def _run(self, half: Callable[[], None]) -> None:
        try:
            half()
        except OSError:  # one end has gone: so does the other
            self.close()
        with self._lock:
            self._running -= 1
            if self._running:
                return
            for end in self._sockets:
                end.close()
        self._ended(self)


class _Pipe:
    """One direction of a connection: one thread reads, another one writes."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        side: _Side,
        stream: Stream,
        profile: Profile,
        opened_s: float,
    ) -> None:
        byte_s = (profile.rate_bit_s or math.inf) / 8
        self._piece_bytes = int(min(max(_PIECE_S * byte_s, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES))
        flight_s = QUEUE_S + 5 * profile.delay_s + profile.jitter_s  # two round trips for losses
        self._window_bytes = min(max(flight_s * byte_s, _MIN_WINDOW_BYTES), _MAX_WINDOW_BYTES)
        self._source, self._sink, self._side, self._stream = source, sink, side, stream
        self._opened_s = opened_s
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def close(self) -> None:
        """Wake both threads up to end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def read(self) -> None:
        """Take in what comes, no faster than the link carries it, until its end."""
        with self._changed:
            self._wait_until(self._opened_s)
        more = True
        while more and not self._closed:
            data = self._source.recv(self._piece_bytes)
            more = bool(data)
            left_s, arrival_s = self._stream.send(time.monotonic(), len(data))
            with self._changed:
                self._waiting.append((arrival_s, data))
                self._waiting_bytes += len(data)
                self._changed.notify_all()
                while not self._closed and self._waiting_bytes >= self._window_bytes:
                    self._changed.wait()
                self._wait_until(left_s - QUEUE_S)

    def write(self) -> None:
        """Deliver what has arrived, in order, and then the end."""
        while True:
            with self._changed:
                while not self._closed and (rest_s := self._rest_s()) > 0:
                    self._changed.wait(None if rest_s == math.inf else rest_s)
                if self._closed:
                    return
                _, data = self._waiting.popleft()
            if not data:
                self._sink.shutdown(socket.SHUT_WR)
                return
            self._side.deliver(self._sink, data)
            with self._changed:
                self._waiting_bytes -= len(data)
                self._changed.notify_all()

    def _wait_until(self, time_s: float) -> None:
        while not self._closed and (rest_s := time_s - time.monotonic()) > 0:
            self._changed.wait(rest_s)

    def _rest_s(self) -> float:
        if not self._waiting:
            return math.inf
        return max(self._waiting[0][0], self._side.silent_until_s) - time.monotonic()


def _wait_until_sent(end: socket.socket) -> None:
    """Wait until the other end's kernel has everything that was written, for at most _SENT_S."""
    until_s = time.monotonic() + _SENT_S
    unsent = bytearray(4)
    while time.monotonic() < until_s:
        fcntl.ioctl(end, termios.TIOCOUTQ, unsent)
        if not any(unsent):
            return
        time.sleep(0.001)
