"""What a gateway does with the messages of a host: one worker per kind, in the order they came."""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from embodied.comms.channels import error_reply
from embodied.comms.codec import Types, decode
from embodied.comms.framing import unpack
from embodied.comms.links.joiner import Joined
from embodied.comms.links.requests import settled
from embodied.comms.links.session import Session
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError

Handler = Callable[
    [str, Any, dict[str, np.ndarray]], tuple[msgspec.Struct, Mapping[str, np.ndarray]]
]
"""(host, header, arrays) → (header, arrays); an EmbodiedError becomes an ErrorReply."""


@dataclass(frozen=True, slots=True)
class Service:
    """Answers the messages of one kind, whose headers are of `types`. The handler is called from
    several threads: one at a time for each host. What it returns for a message that asks for no
    answer is thrown away."""

    types: Types
    handler: Handler


class Workers:
    """Threads that answer one host; a slow kind delays no other."""

    def __init__(self, host: str, services: Mapping[str, Service]) -> None:
        self._host = host
        self._services = services
        self._queues: dict[str, queue.SimpleQueue[tuple[Session, Joined] | None]] = {}

    def deliver(self, session: Session, joined: Joined) -> None:
        """Hand a message to the worker of its kind; one thread may call it."""
        name = joined.kind.name
        waiting = self._queues.get(name)
        if waiting is None:
            waiting = self._queues[name] = queue.SimpleQueue()
            threading.Thread(
                target=self._work, args=(waiting,), name=f"link {self._host} {name}", daemon=True
            ).start()
        waiting.put((session, joined))

    def close(self) -> None:
        """Let the threads end after what they have; to be called by the thread that delivers."""
        for waiting in self._queues.values():
            waiting.put(None)

    def _work(self, waiting: queue.SimpleQueue[tuple[Session, Joined] | None]) -> None:
        while (work := waiting.get()) is not None:
            session, joined = work
            if session.end is not None:
                continue
            done = False
            try:
                self._answer(session, joined)
                done = True
            except CorruptDataError as error:
                session.close(str(error))
                done = True
            finally:
                if not done:
                    session.close(f"the gateway failed over a message of kind '{joined.kind.name}'")

    def _answer(self, session: Session, joined: Joined) -> None:
        number, frames = unpack(joined.message)
        kind = joined.kind
        try:
            service = self._services.get(kind.name)
            if service is None:
                raise ConfigError(
                    f"messages of kind '{kind.name}' are not served here; "
                    f"{', '.join(self._services) or 'none'} are"
                )
            header, arrays = decode(frames, service.types)
            reply = settled(*service.handler(self._host, header, arrays))
            if number:
                session.put(kind, number, reply, kept=True, wait=True)
        except EmbodiedError as error:
            if number:
                refusal = settled(error_reply(error), {})
                session.put(kind, number, refusal, kept=True, wait=True)
        session.handled(joined)
