"""The robot host's end: one link to a gateway, kept up for as long as the object lives."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import grpc
import msgspec
import numpy as np

from embodied.comms.codec import Frame, Types
from embodied.comms.framing import unpack
from embodied.comms.identity.binding import check_dial
from embodied.comms.identity.credentials import Bundle, channel_credentials
from embodied.comms.links import wire
from embodied.comms.links.joiner import Joined
from embodied.comms.links.kinds import KINDS, Kind, by_name, find
from embodied.comms.links.outbox import Traffic, count_from_zero
from embodied.comms.links.pacing import Cap
from embodied.comms.links.requests import LinkRequests, Notices, settled
from embodied.comms.links.session import DEAD_S, Session
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError, IdentityError

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 3.0
_LOOK_S = 0.25
_GOODBYE_S = 0.5
_CLOSED = "the host closed the link"


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """A link as its host sees it. since_s: Unix time of the last change of `connected`. rtt_ms:
    median of the last pings. reconnects: sessions after the first. reason: why there is none, or
    why the last one ended. traffic and depths: by name of kind."""

    connected: bool
    since_s: float
    rtt_ms: float | None
    reconnects: int
    reason: str
    traffic: Mapping[str, Traffic]
    depths: Mapping[str, int]


class Link:
    """Dials a gateway, and again whenever the session breaks; its users never wait for that.

    identity: reads the host's certificate and keys, for each dial anew, and raises an
    EmbodiedError if there are none to be used; None only for an address inside this host. A
    session ends with the certificate that it was dialled with.
    cap_bytes_per_s: of what is sent. options: more of gRPC's channel.
    """

    def __init__(
        self,
        address: str,
        hello: wire.Hello,
        identity: Callable[[], Bundle] | None,
        *,
        cap_bytes_per_s: float | None = None,
        kinds: Sequence[Kind] = KINDS,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        if problem := wire.problem_of(hello):
            raise ConfigError(problem)
        check_dial(address, identity is not None)
        self.address = address
        self._hello = hello
        self._identity = identity
        self._cap = None if cap_bytes_per_s is None else Cap(cap_bytes_per_s, time.monotonic())
        self._kinds = by_name(kinds)
        self._options = [
            *wire.OPTIONS,
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            *options,
        ]
        self._traffic = count_from_zero(kinds)
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._session: Session | None = None
        self._since_s = time.time()
        self._sessions = 0
        self._reason = "not connected yet"
        self._owners: dict[int, LinkRequests] = {}
        self._notices: dict[str, Notices] = {}
        self._closed = threading.Event()
        self._random = random.Random()
        self._dialler = threading.Thread(target=self._dial, name=f"link {address}", daemon=True)
        self._dialler.start()

    def requests(self, kind: str, types: Types) -> LinkRequests:
        """Requests of a kind, whose replies have headers of `types`; as many as are wanted."""
        return LinkRequests(
            self.address, find(self._kinds, kind), types, self._ask, self.wait, self._disown
        )

    def notices(self, kind: str, types: Types) -> Notices:
        """What the gateway pushes of a kind, with headers of `types`. Without it, that is thrown
        away. ConfigError if they were taken before."""
        made = Notices(find(self._kinds, kind), types)
        with self._changed:
            if kind in self._notices:
                raise ConfigError(f"the notices of kind '{kind}' have a receiver already")
            self._notices[kind] = made
        return made

    def push(
        self, kind: str, header: msgspec.Struct, arrays: Mapping[str, np.ndarray], key: str = ""
    ) -> bool:
        """Send to the gateway's service of this kind without an answer; whether it was taken.

        Never waits. Without a session nothing is taken. SpecError if it is too large.
        """
        found, session = find(self._kinds, kind), self._session
        frames = settled(header, arrays)
        return session is not None and session.put(found, 0, frames, key=key)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is a session within timeout_s."""
        with self._changed:
            return self._changed.wait_for(lambda: self._session is not None, max(0.0, timeout_s))

    def status(self) -> LinkStatus:
        """The link as it is now."""
        with self._changed:
            session = self._session
            return LinkStatus(
                connected=session is not None,
                since_s=self._since_s,
                rtt_ms=session.rtt_ms if session else None,
                reconnects=max(0, self._sessions - 1),
                reason=self._reason,
                traffic={name: replace(traffic) for name, traffic in self._traffic.items()},
                depths=session.depths() if session else dict.fromkeys(self._traffic, 0),
            )

    def close(self) -> None:
        """End the session and dial no more; what was not sent is dropped. Safe to call twice."""
        self._closed.set()
        with self._changed:
            session = self._session
        if session is not None:
            session.close(_CLOSED)
        self._dialler.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, owner: LinkRequests, frames: Sequence[Frame]) -> int | None:
        number = next(self._numbers)
        with self._changed:
            session = self._session
            if session is None:
                return None
            self._owners[number] = owner
            owner.expect(number)
        if session.put(owner.kind, number, frames, kept=True):
            return number
        with self._changed:
            self._owners.pop(number, None)
        owner.forget(number)
        return None

    def _disown(self, owner: LinkRequests) -> None:
        with self._changed:
            for number in [n for n, o in self._owners.items() if o is owner]:
                del self._owners[number]

    def _dial(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closed.is_set():
            if self._run_session():
                backoff_s = FIRST_BACKOFF_S
            self._closed.wait(self._random.uniform(0.0, backoff_s))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _run_session(self) -> bool:
        """Dial and stay until the session ends; whether there was one."""
        try:
            bundle = None if self._identity is None else self._identity()
            credentials = None if bundle is None else channel_credentials(bundle)
        except EmbodiedError as error:
            with self._changed:
                self._reason = str(error)
            return False
        bounds = self._kinds.values()
        session = Session(
            {kind: kind.up for kind in bounds},
            {kind: kind.down for kind in bounds},
            self._traffic,
            lambda joined: self._deliver(session, joined),
            self._cap,
        )
        answered = threading.Event()
        if credentials is None:
            channel = grpc.insecure_channel(self.address, self._options)
        else:
            channel = grpc.secure_channel(self.address, credentials, self._options)
        with channel:
            call: Any = channel.stream_stream(wire.METHOD)(self._outgoing(session, answered))
            reader = threading.Thread(
                target=self._read, args=(call, session, answered), name="link reader", daemon=True
            )
            reader.start()
            while not session.wait_end(_LOOK_S):
                if session.silent_s > DEAD_S:
                    session.close(f"nothing came in {DEAD_S:g} s", tell=False)
                elif self._closed.is_set():
                    session.close(_CLOSED)
                elif bundle is not None:
                    _end_with(bundle, session)
            reader.join(_GOODBYE_S if self._closed.is_set() else 0.0)
            call.cancel()
            reader.join()
        return self._lose(session)

    def _outgoing(self, session: Session, answered: threading.Event) -> Iterator[bytes]:
        yield wire.hello_piece(self._hello)
        answered.wait()
        yield from session.outgoing()

    def _read(self, call: Any, session: Session, answered: threading.Event) -> None:
        try:
            refusal = wire.parse_welcome(next(call))
            if refusal:
                session.close(f"refused: {refusal}", tell=False)
                return
            self._gain(session)
            answered.set()
            for raw in call:
                session.take(raw)
        except CorruptDataError as error:
            session.close(str(error))
        except grpc.RpcError as error:
            session.close(_reason(error), tell=False)
        except StopIteration:
            pass
        finally:
            session.close("the gateway ended the session", tell=False)
            answered.set()

    def _gain(self, session: Session) -> None:
        with self._changed:
            self._session = session
            self._sessions += 1
            self._since_s = time.time()
            self._reason = ""
            self._changed.notify_all()

    def _lose(self, session: Session) -> bool:
        with self._changed:
            had, self._session = self._session is not None, None
            if had:
                self._since_s = time.time()
            self._reason = session.end or ""
            owners = set(self._owners.values())
            self._owners.clear()
        for owner in owners:
            owner.lose()
        return had

    def _deliver(self, session: Session, joined: Joined) -> None:
        number, frames = unpack(joined.message)
        if number == 0:
            with self._changed:
                notices = self._notices.get(joined.kind.name)
            if notices is not None:
                notices.take(session, joined, frames)
                return
        else:
            with self._changed:
                owner = self._owners.pop(number, None)
            if owner is not None and owner.kind is joined.kind:
                owner.take(number, frames)
        session.handled(joined)


def _end_with(bundle: Bundle, session: Session) -> None:
    """End the session if its certificate has."""
    try:
        bundle.check_current()
    except IdentityError as error:
        session.close(str(error))


def _reason(error: Any) -> str:
    """What gRPC says of a call that failed."""
    return f"{error.code().name.lower().replace('_', ' ')}: {error.details()}"
