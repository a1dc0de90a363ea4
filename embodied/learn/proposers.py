"""Processes that propose chunks beside a learner, as the learner sees them.

Shapes: M observations, n proposals for each, H chunk, D action.
"""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from embodied.comms.channels import ErrorReply
from embodied.comms.pair import PairEnd
from embodied.core.errors import CorruptDataError, EmbodiedError, LinkError
from embodied.core.seeds import derive_seed
from embodied.weights.store import WeightStore

ROWS = 32
"""Observations of a request, at most."""

_REQUESTS_QUEUED = 2
_START_S = 180.0
_ANSWER_S = 300.0
_END_S = 1.0
_MOST_RESTARTS = 3
_RESTART_WINDOW_S = 60.0


class Propose(msgspec.Struct, frozen=True, tag="propose", forbid_unknown_fields=True):
    """So many chunks are wanted for each of these observations, by key [M, To, …]."""

    count: Annotated[int, msgspec.Meta(ge=1)]
    seed: int


class Proposed(msgspec.Struct, frozen=True, tag="proposed", forbid_unknown_fields=True):
    """ "chunks" [M, n, H, D] float32."""


REQUESTS = (Propose,)
REPLIES = (Proposed, ErrorReply)


@dataclass(frozen=True)
class Wanted:
    """An observation, by key [To, …], that is to be proposed for. made: the gradient step of the
    proposals that there are; step: the one in which new ones were asked for."""

    made: int
    step: int
    observation: dict[str, np.ndarray]


@dataclass(frozen=True)
class Answer:
    """Chunks [M, n, H, D] for the observations of these keys, asked for in these steps."""

    keys: list[bytes]
    steps: list[int]
    chunks: np.ndarray


class Proposers:
    """Has others propose for observations, those first whose proposals are oldest. Each process
    has one request at a time, and a thread here that waits for it: only `close` waits otherwise.

    A process that dies, or answers with what cannot be read, is started and asked again; after
    three times within a minute that is an error.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        *,
        proposals: int,
        seed: int,
        weights: WeightStore,
        on_restart: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Starts them. command: of one; its parent's number and its link's descriptor are
        appended. proposals: n. weights: where they look before the run publishes any."""
        self._command = list(command)
        self._proposals = proposals
        self._seed = seed
        self._weights = weights
        self._on_restart = on_restart
        self._most = _REQUESTS_QUEUED * ROWS * processes
        self._changed = threading.Condition()
        self._waiting: dict[bytes, Wanted] = {}
        self._asked: set[bytes] = set()
        self._answers: list[Answer] = []
        self._numbers = 0
        self._closing = False
        self._offered = False
        self._running: dict[int, _Process] = {}
        executor = ThreadPoolExecutor(processes, "proposers")
        self._threads = [executor.submit(self._keep, index) for index in range(processes)]
        executor.shutdown(wait=False)

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        with self._changed:
            return [process.pid for process in self._running.values()]

    def offer(
        self, weights: Callable[[], tuple[dict[str, Any], Mapping[str, np.ndarray]]], step: int
    ) -> None:
        """Have them propose by the weights of this gradient step until newer ones are published.
        The first call does, which comes before the first `ask`."""
        if self._offered:
            return
        config, arrays = weights()
        self._weights.publish(arrays, config, {"step": step})
        self._weights.prune(1)
        self._offered = True

    def ask(
        self,
        made: Mapping[bytes, int],
        step: int,
        observe: Callable[[list[bytes]], Mapping[str, np.ndarray]],
    ) -> None:
        """Want new proposals for as many of these keys' observations as there is room for, the
        oldest first. made: the step of those that there are, by key. observe: of keys, [M, To, …].
        """
        with self._changed:
            known = self._waiting.keys() | self._asked
            room = self._most - len(self._waiting)
        keys = sorted((key for key in made if key not in known), key=made.__getitem__)[:room]
        if not keys:
            return
        arrays = observe(keys)
        new = {
            key: Wanted(made[key], step, {name: array[row] for name, array in arrays.items()})
            for row, key in enumerate(keys)
        }
        with self._changed:
            self._waiting |= new
            self._changed.notify_all()

    def take(self) -> list[Answer]:
        """What has come since the last call; raises what went wrong."""
        for thread in self._threads:
            if thread.done():
                thread.result()
        with self._changed:
            answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        """End the processes; safe to call twice."""
        with self._changed:
            self._closing = True
            for process in self._running.values():
                process.kill()
            self._changed.notify_all()
        for thread in self._threads:
            thread.exception()

    def _keep(self, index: int) -> None:
        """Have a process until this is closed."""
        died_s: list[float] = []
        while (process := self._start(index)) is not None:
            try:
                self._employ(process)
            except _ProcessLost as error:
                now_s = time.monotonic()
                died_s = [t for t in died_s if now_s - t < _RESTART_WINDOW_S] + [now_s]
                if len(died_s) > _MOST_RESTARTS and not self._closing:
                    raise EmbodiedError(f"{error}, {len(died_s)} times within a minute") from error
                if not self._closing:
                    self._on_restart(str(error))
            finally:
                process.close()

    def _start(self, index: int) -> "_Process | None":
        with self._changed:
            if self._closing:
                return None
            process = self._running[index] = _Process(self._command)
            return process

    def _employ(self, process: "_Process") -> None:
        """Ask it for what is wanted until this is closed."""
        while wanted := self._next():
            try:
                rows = list(wanted.values())
                answer = process.propose(rows, self._proposals, self._seed_of(rows))
            except _ProcessLost:
                with self._changed:
                    self._asked -= wanted.keys()
                    self._waiting |= wanted
                raise
            with self._changed:
                self._asked -= wanted.keys()
                self._answers.append(Answer(list(wanted), [row.step for row in rows], answer))

    def _next(self) -> dict[bytes, Wanted]:
        """The oldest of what waits, from now on asked for; nothing once this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or bool(self._waiting))
            if self._closing:
                return {}
            keys = sorted(self._waiting, key=lambda key: self._waiting[key].made)[:ROWS]
            self._asked |= set(keys)
            return {key: self._waiting.pop(key) for key in keys}

    def _seed_of(self, rows: Sequence[Wanted]) -> int:
        with self._changed:
            self._numbers += 1
            return derive_seed(self._seed, max(row.step for row in rows), self._numbers)


class _ProcessLost(EmbodiedError):
    """A process is of no use any more."""


class _Process:
    """One that proposes. It ends with the thread that made it."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._end = PairEnd(ours, REPLIES)
        self._number = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def propose(self, rows: Sequence[Wanted], count: int, seed: int) -> np.ndarray:
        """Chunks [M, n, H, D]; _ProcessLost, or what it cannot go on with."""
        observation = {
            name: np.stack([row.observation[name] for row in rows]) for name in rows[0].observation
        }
        self._number += 1
        limit_s = _ANSWER_S + (_START_S if self._number == 1 else 0.0)
        try:
            self._end.send(self._number, Propose(count, seed), observation, limit_s)
            reply = self._end.receive(limit_s)
        except (LinkError, CorruptDataError) as error:
            raise self._lost(error) from error
        if isinstance(reply.header, ErrorReply):
            raise reply.header.exception()
        chunks = reply.arrays.get("chunks")
        if chunks is None or chunks.ndim != 4 or chunks.shape[:2] != (len(rows), count):
            raise self._lost(CorruptDataError(f"no {count} chunks for each of {len(rows)}"))
        return chunks

    def _lost(self, error: EmbodiedError) -> _ProcessLost:
        try:
            how = f"ended with status {self._process.wait(_END_S)}"
        except subprocess.TimeoutExpired:
            how = f"is of no use any more: {error}"
        return _ProcessLost(f"process {self.pid}, which proposes chunks, {how}")

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._end.close()
