"""Batches from a process of their own, so that reading them costs the learner nothing.

The loader draws, prefetches one batch ahead, and fills slots of shared memory; the learner is
told which slot is ready, reads the arrays where they are, and gives the slot back.
"""

import contextlib
import select
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Annotated, Generic, Self, TypeVar

import msgspec
import numpy as np

from embodied.buffer.load.ring import BatchRing, RingLayout, ring_layout
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.batches import DRAW_AGAIN
from embodied.buffer.sample.samplers import Sampler
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError

D = TypeVar("D")

_MAX_MESSAGE = 1 << 18
_IDLE_S = 0.02
_STOP_S = 5.0
_MOST_RESTARTS = 3
_RESTART_WINDOW_S = 60.0


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the loader's reader holds. steps: recorded, deleted ones included. candidates: steps
    that can be drawn. episodes: closed. hits, misses, read_bytes, evicted_bytes: see CacheStats."""

    steps: int = 0
    candidates: int = 0
    episodes: int = 0
    damaged: int = 0
    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    evicted_bytes: int = 0


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """The ring; its descriptor comes with the message."""

    layout: RingLayout


class Ready(msgspec.Struct, frozen=True, tag="ready", forbid_unknown_fields=True):
    """A batch is in this slot."""

    slot: Annotated[int, msgspec.Meta(ge=0, le=63)]


class Status(msgspec.Struct, frozen=True, tag="status", forbid_unknown_fields=True):
    """What there is now."""

    counts: Counts


class Failed(msgspec.Struct, frozen=True, tag="failed", forbid_unknown_fields=True):
    """The loader cannot go on: a wrong configuration."""

    message: str


class Free(msgspec.Struct, frozen=True, tag="free", forbid_unknown_fields=True):
    """The slot's batch is used up. priorities: new ones of its steps, float64 bytes, or none."""

    slot: Annotated[int, msgspec.Meta(ge=0, le=63)]
    priorities: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_decode_loaders = msgspec.msgpack.Decoder(Hello | Ready | Status | Failed).decode
_decode_free = msgspec.msgpack.Decoder(Free).decode


class Loader(Generic[D]):
    """The loader's side. Fills slots until the learner hangs up.

    refresh_s: how often to look for new steps. slots: batches made in advance.
    """

    def __init__(
        self,
        reader: ReplayReader,
        sampler: Sampler[D],
        link: socket.socket,
        batch_size: int,
        rng: np.random.Generator,
        *,
        slots: int = 4,
        refresh_s: float = 0.2,
    ) -> None:
        self._reader = reader
        self._sampler = sampler
        self._link = link
        self._batch_size = batch_size
        self._rng = rng
        self._slots = slots
        self._refresh_s = refresh_s
        self._refreshed_s = -float("inf")
        self._ring: BatchRing | None = None
        self._free: list[int] = []
        self._draws: dict[int, D] = {}
        self._next: D | None = None

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until the learner closes the link or should_stop() is true."""
        try:
            while not should_stop():
                self._refresh()
                self._fill()
                idle = self._ring is None or not self._free
                if not self._receive(self._refresh_s if idle else 0.0):
                    return
        except ConfigError as error:
            self._send(Failed(str(error)))
        except ConnectionError:
            return

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if now_s - self._refreshed_s < self._refresh_s:
            return
        self._reader.refresh()
        self._sampler.refresh()
        self._refreshed_s = now_s
        stats = self._reader.cache_stats
        counts = Counts(
            self._reader.num_seen,
            self._sampler.num_candidates,
            self._reader.num_closed,
            len(self._reader.damaged),
            stats.hits,
            stats.misses,
            stats.read_bytes,
            stats.evicted_bytes,
        )
        self._send(Status(counts))
        if self._ring is None and self._sampler.num_candidates:
            sizes = self._sampler.batch_spec(self._batch_size)
            self._ring = BatchRing.create(ring_layout(sizes, self._slots))
            message = _encode(Hello(self._ring.layout))
            socket.send_fds(self._link, [message], [self._ring.fd])
            self._free = list(range(self._slots))

    def _fill(self) -> None:
        if self._ring is None or not self._free or not self._sampler.num_candidates:
            return
        draw = self._draw() if self._next is None else self._next
        self._next = self._draw()
        slot = self._free[-1]
        try:
            self._sampler.fetch(draw, out=self._ring.arrays(slot))
        except DRAW_AGAIN:
            return
        self._free.pop()
        self._draws[slot] = draw
        self._send(Ready(slot))

    def _draw(self) -> D:
        draw = self._sampler.draw(self._batch_size, self._rng)
        self._sampler.prefetch(draw)
        return draw

    def _receive(self, timeout_s: float) -> bool:
        """Take slots back, waiting for one at most timeout_s; False once the learner hung up."""
        while select.select([self._link], [], [], timeout_s)[0]:
            data = self._link.recv(_MAX_MESSAGE)
            if not data:
                return False
            free = _decode_free(data)
            draw = self._draws.pop(free.slot)
            self._free.append(free.slot)
            if free.priorities:
                self._sampler.update(draw, np.frombuffer(free.priorities, np.float64))
            timeout_s = 0.0
        return True

    def _send(self, message: Ready | Status | Failed) -> None:
        self._link.sendall(_encode(message))


class LoaderClient:
    """The learner's side: starts the loader and takes its batches.

    command: starts a loader; the number of its link's descriptor is appended. on_restart: told
    when the loader died and is started again; after three times within a minute it is an error.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_restart: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._command = list(command)
        self._on_restart = on_restart
        self._on_ring: Callable[[mmap], None] | None = None
        self._died_s: list[float] = []
        self._ring: BatchRing | None = None
        self._ready: list[int] = []
        self._held: int | None = None
        self.counts = Counts()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._link = ours

    def on_ring(self, told: Callable[[mmap], None]) -> None:
        """Have the memory told in which batches will lie (to pin it): at once if it is there."""
        self._on_ring = told
        if self._ring is not None:
            told(self._ring.memory)

    def poll(self, timeout_s: float = 0.0) -> None:
        """Take in what the loader says, waiting for something at most timeout_s.

        Raises ConfigError for what the loader cannot go on with.
        """
        while select.select([self._link], [], [], timeout_s)[0]:
            try:
                data, fds, _, _ = socket.recv_fds(self._link, _MAX_MESSAGE, 1)
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self._restart()
                return
            self._take(_decode_loaders(data), fds)
            timeout_s = 0.0

    def _take(self, message: Hello | Ready | Status | Failed, fds: list[int]) -> None:
        if isinstance(message, Ready):
            self._ready.append(message.slot)
        elif isinstance(message, Status):
            self.counts = message.counts
        elif isinstance(message, Failed):
            raise ConfigError(message.message)
        elif len(fds) == 1:
            self._ring = BatchRing(message.layout, fds[0])
            if self._on_ring is not None:
                self._on_ring(self._ring.memory)
        else:
            raise CorruptDataError("the loader announced a ring without its memory")

    def _restart(self) -> None:
        status = self._stop()
        now_s = time.monotonic()
        self._died_s = [t for t in self._died_s if now_s - t < _RESTART_WINDOW_S] + [now_s]
        reason = f"the loader process ended with status {status}"
        if len(self._died_s) > _MOST_RESTARTS:
            raise EmbodiedError(f"{reason}, {len(self._died_s)} times within a minute")
        self._on_restart(reason)
        self._start()

    def next(
        self, timeout_s: float, priorities: np.ndarray | None = None
    ) -> dict[str, np.ndarray] | None:
        """The next batch, or None if none came within timeout_s; see WindowSampler.fetch.

        Its arrays are views on shared memory, good until next is called again. priorities: new
        ones [B] of the batch that was returned before.
        """
        self._give_back(priorities)
        if not self._ready:
            self.poll(timeout_s)
        else:
            self.poll()
        if not self._ready or self._ring is None:
            return None
        self._held = self._ready.pop(0)
        return self._ring.arrays(self._held)

    def _give_back(self, priorities: np.ndarray | None) -> None:
        if self._held is None:
            return
        data = b"" if priorities is None else np.asarray(priorities, np.float64).tobytes()
        with contextlib.suppress(ConnectionError):  # poll finds out and starts another one
            self._link.sendall(_encode(Free(self._held, data)))
        self._held = None

    def _stop(self) -> int:
        self._link.close()
        self._ready, self._held = [], None
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    @property
    def pid(self) -> int:
        """The loader's process."""
        return self._process.pid

    def wait_ended(self) -> int:
        """Wait until the loader's process has ended; returns its status."""
        return self._process.wait(_STOP_S)

    def close(self) -> None:
        """Hang up and end the loader; safe to call twice."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
