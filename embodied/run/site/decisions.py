"""Actors' questions to the policy server at the gateway's site: passed on, and the answers back."""

import time
from concurrent.futures import Future
from typing import Any

import numpy as np

from embodied.comms.channels import ErrorReply
from embodied.comms.deferred import Answer, DeferredServer
from embodied.comms.links.client import Link
from embodied.core.errors import LinkError
from embodied.run.remote import messages as inference

_MOST_WAITING = 64
_PATIENCE_S = 5.0


class Decisions:
    """Serves the actors of this host at `address`, as a policy server would.

    What the link cannot take or loses is answered with a LinkError: the actor may ask again.
    """

    def __init__(self, link: Link, address: str) -> None:
        self._requests = link.requests("inference", inference.REPLIES)
        self._server = DeferredServer(address, inference.REQUESTS, self._pass_on)
        self._waiting: dict[int, tuple[Future[Answer], float]] = {}

    def pump(self) -> bool:
        """Take questions, give answers; whether any was given."""
        for reply in self._requests.receive_ready():
            future, _ = self._waiting.pop(reply.id, (None, 0.0))
            if future is None:
                continue
            if isinstance(reply.header, ErrorReply):
                future.set_exception(reply.header.exception())
            else:
                future.set_result((reply.header, reply.arrays))
        now_s = time.monotonic()
        for number in [n for n, (_, until_s) in self._waiting.items() if until_s < now_s]:
            future, _ = self._waiting.pop(number)
            self._requests.forget(number)
            future.set_exception(LinkError("the gateway's site did not answer in time"))
        return self._server.poll(0.0) > 0

    def close(self) -> None:
        """Serve no more."""
        self._server.close()
        self._requests.close()

    def _pass_on(self, header: Any, arrays: dict[str, np.ndarray]) -> "Future[Answer]":
        future: Future[Answer] = Future()
        number = None
        if len(self._waiting) < _MOST_WAITING:
            number = self._requests.send(header, arrays)
        if number is None:
            future.set_exception(LinkError("no link to the gateway, or no room on it"))
        else:
            left_s = getattr(header, "time_left_ms", 1e3 * _PATIENCE_S) / 1e3
            self._waiting[number] = future, time.monotonic() + left_s
        return future
