"""A policy for many robots: their requests wait a little for each other and are decided together.

Shapes: B rows, H chunk, D action.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Annotated, Any

import msgspec
import numpy as np

from embodied.comms.deferred import Answer
from embodied.core.errors import ConfigError, EmbodiedError, LinkError, SpecError
from embodied.run.remote import messages as m
from embodied.run.remote.requests import Form, Request, carry_arrays
from embodied.run.serving.batcher import Batcher, Waiting
from embodied.run.serving.weights import Served

_KEPT = 1000
_IDLE_S = 0.1


class BatchingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """rows: of a batch, a power of two; fewer are filled up, so that every batch has one shape and
    a row's decision does not depend, bit for bit, on what is decided with it. max_wait_ms: that a
    request waits for others while the policy is free. max_queued: requests that wait at most."""

    rows: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    max_wait_ms: Annotated[float, msgspec.Meta(ge=0, le=1000)]
    max_queued: Annotated[int, msgspec.Meta(ge=1, le=65536)]

    def __post_init__(self) -> None:
        """Raise ConfigError for another number of rows."""
        if self.rows & (self.rows - 1):
            raise ConfigError(
                f"rows is {self.rows}; it must be a power of two, such as "
                f"{1 << self.rows.bit_length()}: with others, kernels treat the last rows "
                "differently"
            )


class PolicyServer:
    """Decides for many robots and remembers nothing of them: what a policy remembers travels with
    the request and back, so that a restarted server goes on where the last one stopped.

    `submit` and `handler` may be called by any thread; `run` belongs to the one that is to compute.
    load: the policy, ready to act in batches of `config.rows`; called by `run`.
    """

    def __init__(
        self,
        load: Callable[[], Served],
        config: BatchingConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._config = config
        self._clock = clock
        self._batcher = Batcher(
            config.rows,
            max_wait_s=config.max_wait_ms / 1e3,
            max_queued=config.max_queued,
            clock=clock,
        )
        self._served: Served | None = None
        self._form: Form | None = None
        self._fingerprint = ""
        self._batch_rows = [0] * config.rows
        self._decided = self._refused = 0
        self._counting = threading.Lock()
        self._latencies_ms: deque[float] = deque(maxlen=_KEPT)

    def submit(self, header: Any, arrays: dict[str, np.ndarray]) -> "Future[Answer]":
        """A future of the answer. Raises LinkError while the policy is not ready or too many wait,
        SpecError for a request that the policy cannot take."""
        match header:
            case m.Check():
                return _now(self.health(), {})
            case m.Describe():
                return _now(*self._described())
            case m.Act():
                form = self._ready()
                try:
                    request = self._checked(form, header, arrays)
                except SpecError:
                    self._refuse()
                    raise
                return self._batcher.submit(request, header.time_left_ms / 1e3)
        raise SpecError(f"{type(header).__name__} is no request to a policy server")

    def handler(self, header: Any, arrays: dict[str, np.ndarray]) -> Answer:
        """The answer; waits for it, an Act's time at most. Errors as of `submit`; LinkError when
        the time is over."""
        future = self.submit(header, arrays)
        try:
            return future.result(header.time_left_ms / 1e3 if isinstance(header, m.Act) else None)
        except TimeoutError as error:
            raise LinkError(f"not decided within {header.time_left_ms} ms") from error

    def health(self) -> m.Health:
        """Now."""
        p50, p99 = _percentiles(list(self._latencies_ms))
        served = self._served
        return m.Health(
            ready=self._form is not None,
            version=-1 if served is None else served.version,
            queued=len(self._batcher),
            batch_rows=tuple(self._batch_rows),
            decided=self._decided,
            dropped=self._batcher.dropped,
            refused=self._refused,
            p50_ms=p50,
            p99_ms=p99,
            fault="" if served is None else served.fault,
        )

    def run(self, keep_going: Callable[[], bool]) -> None:
        """Load the policy, then decide until keep_going() is false; it is asked between batches.

        Errors of loading, and of weights that do not fit the policy, are raised.
        """
        try:
            self._served = served = self._load()
            fresh = served.policy.init(1)
            self._form = Form(served.policy.spec, fresh, self._config.rows)
            self._fingerprint = self._form.fingerprint()
            while keep_going():
                served.refresh()
                batch = self._batcher.take(_IDLE_S)
                if batch:
                    self._decide(served, batch)
        finally:
            self._form = None
            self._batcher.close()
            if self._served is not None:
                self._served.close()

    def _ready(self) -> Form:
        form = self._form
        if form is None:
            raise LinkError("the policy server is warming up, or ends")
        return form

    def _described(self) -> Answer:
        form, served = self._ready(), self._served
        assert served is not None
        latency = served.policy.latency()
        described = m.Described(
            spec=form.spec,
            fingerprint=self._fingerprint,
            version=served.version,
            rows=self._config.rows,
            p50_ms=0.0 if latency is None else latency.p50_ms,
            p99_ms=0.0 if latency is None else latency.p99_ms,
        )
        return described, carry_arrays(form.fresh)

    def _checked(self, form: Form, header: m.Act, arrays: dict[str, np.ndarray]) -> Request:
        if header.fingerprint != self._fingerprint:
            raise SpecError(
                "the request is to another policy than the one that is served now; connect again"
            )
        return form.read(arrays)

    def _refuse(self) -> None:
        with self._counting:
            self._refused += 1

    def _decide(self, served: Served, batch: list[Waiting]) -> None:
        """Complete the futures of a batch. If it fails, each request is decided on its own: one
        robot's observations must not cost the others their answer."""
        try:
            answers = self._act(served, [waiting.request for waiting in batch])
        except EmbodiedError as error:
            if len(batch) > 1:
                for waiting in batch:
                    self._decide(served, [waiting])
            else:
                self._refuse()
                batch[0].future.set_exception(error)
            return
        now_s = self._clock()
        for waiting, answer in zip(batch, answers, strict=True):
            self._latencies_ms.append(1e3 * (now_s - waiting.arrived_s))
            self._decided += 1
            waiting.future.set_result(answer)

    def _act(self, served: Served, requests: list[Request]) -> list[Answer]:
        rows = sum(request.rows for request in requests)
        first = requests[0]
        obs = {key: self._joined([r.obs[key] for r in requests]) for key in first.obs}
        carry = first.carry and {
            key: self._joined([r.carry[key] for r in requests if r.carry is not None])
            for key in first.carry
        }
        prefixes = [r.prefix for r in requests if r.prefix is not None]
        following, actions_BHD = served.policy.act(
            carry,
            obs,
            prefix=self._joined(prefixes) if prefixes else None,
            seed=self._joined([r.seed for r in requests]),
        )
        self._batch_rows[rows - 1] += 1
        answers: list[Answer] = []
        start = 0
        for request in requests:
            own = slice(start, start + request.rows)
            start += request.rows
            kept = following and {key: value[own] for key, value in following.items()}
            arrays = {"actions": actions_BHD[own], **carry_arrays(kept)}
            answers.append((m.Acted(served.version), arrays))
        return answers

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        """One array of exactly the batch's rows; the last row fills up what is missing."""
        missing = self._config.rows - sum(map(len, parts))
        return np.concatenate([*parts, *[parts[-1][-1:]] * missing])


def _now(header: msgspec.Struct, arrays: Mapping[str, np.ndarray]) -> "Future[Answer]":
    future: Future[Answer] = Future()
    future.set_result((header, arrays))
    return future


def _percentiles(values: list[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 0.0
    p50, p99 = np.percentile(values, (50, 99))
    return float(p50), float(p99)
