"""Requests that wait for a decision, joined to batches with a bounded wait."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from embodied.comms.deferred import Answer
from embodied.core.errors import LinkError
from embodied.run.remote.requests import Request


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A request since arrived_s; nobody wants its answer after until_s (the batcher's clock)."""

    request: Request
    arrived_s: float
    until_s: float
    future: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """Gives batches of at most `rows` rows with equally many committed actions, oldest first.

    A batch waits for more until it is full or its oldest request is max_wait_s old. A request
    whose time is over, or that would be number max_queued + 1, is answered by a LinkError; dropped
    counts them. Any thread may submit; one takes.
    """

    def __init__(
        self,
        rows: int,
        *,
        max_wait_s: float,
        max_queued: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows = rows
        self._max_wait_s = max_wait_s
        self._max_queued = max_queued
        self._clock = clock
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, request: Request, time_left_s: float) -> "Future[Answer]":
        """Queue a request; its future is completed by whoever takes it, or here with an error."""
        now_s = self._clock()
        waiting = Waiting(request, now_s, now_s + time_left_s)
        with self._changed:
            if self._closed or len(self._queue) >= self._max_queued:
                self.dropped += 1
                full = f"{len(self._queue)} requests wait already, and no more may"
                raise LinkError("the policy server ends" if self._closed else full)
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.future

    def take(self, timeout_s: float) -> list[Waiting]:
        """The next batch, oldest first; [] if there is none within timeout_s."""
        ends_s = self._clock() + timeout_s
        with self._changed:
            while True:
                now_s = self._clock()
                self._drop_late(now_s)
                batch, ready_s = self._next()
                if batch and ready_s <= now_s:
                    for waiting in batch:
                        self._queue.remove(waiting)
                    return batch
                if ends_s <= now_s:
                    return []
                self._changed.wait(min(ends_s, ready_s) - now_s)

    def close(self) -> None:
        """Refuse whatever waits, and what still comes."""
        with self._changed:
            self._closed = True
            while self._queue:
                self._queue.popleft().future.set_exception(LinkError("the policy server ends"))

    def _next(self) -> tuple[list[Waiting], float]:
        """The batch as it is now, and when it need not wait any longer."""
        batch: list[Waiting] = []
        rows = 0
        for waiting in self._queue:
            if waiting.request.committed != self._queue[0].request.committed:
                continue
            if rows + waiting.request.rows > self._rows:
                return batch, batch[0].arrived_s
            batch.append(waiting)
            rows += waiting.request.rows
        if not batch:
            return [], float("inf")
        first_s = batch[0].arrived_s
        return batch, first_s if rows == self._rows else first_s + self._max_wait_s

    def _drop_late(self, now_s: float) -> None:
        for waiting in [w for w in self._queue if w.until_s <= now_s]:
            self._queue.remove(waiting)
            self.dropped += 1
            waited_ms, had_ms = (
                1e3 * (end_s - waiting.arrived_s) for end_s in (now_s, waiting.until_s)
            )
            waiting.future.set_exception(
                LinkError(f"dropped: waited {waited_ms:.0f} ms and had {had_ms:.0f} ms")
            )
