"""The gateway's end: takes in the links of many robot hosts, answers them and pushes to them."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import grpc
import msgspec
import numpy as np

from embodied.comms.codec import check_types
from embodied.comms.identity.binding import check_listen
from embodied.comms.identity.peer import certificate_in
from embodied.comms.links import wire
from embodied.comms.links.admission import Admission
from embodied.comms.links.kinds import KINDS, Kind, by_name, find
from embodied.comms.links.outbox import Traffic, count_from_zero
from embodied.comms.links.pacing import Cap
from embodied.comms.links.requests import settled
from embodied.comms.links.services import Service, Workers
from embodied.comms.links.session import DEAD_S, Session
from embodied.core.errors import ConfigError, EmbodiedError

Admit = Callable[[wire.Hello, bytes | None], None]
"""Called with who dials and its certificate (PEM; None without TLS), and again about every second
of the session; an EmbodiedError refuses the host, or ends its session, and the host gets its
text."""

MAX_SESSIONS = 64
_SPARE = 8
"""Calls beyond max_sessions that are answered, with a refusal."""
_LOOK_S = 0.25
_GOODBYE_S = 1.0


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """A connected host. since_s: Unix time. traffic and depths: by name of kind."""

    host: str
    run: str
    software: str
    since_s: float
    rtt_ms: float | None
    traffic: Mapping[str, Traffic]
    depths: Mapping[str, int]


class _Call:
    """One call of Session. hello, session, traffic: once the host was admitted."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.begun_s = time.monotonic()
        self.since_s = time.time()
        self.ended_s: float | None = None
        self.hello: wire.Hello | None = None
        self.session: Session | None = None
        self.traffic: dict[str, Traffic] = {}

    def overdue(self, now_s: float) -> bool:
        """Whether it should be cut off; ends a session of which nothing is heard."""
        if self.session is None:
            return now_s - self.begun_s > DEAD_S
        if self.session.end is None:
            if self.session.silent_s <= DEAD_S:
                return False
            self.session.close(f"nothing came in {DEAD_S:g} s", tell=False)
            return True
        self.ended_s = self.ended_s or now_s
        return now_s - self.ended_s > _GOODBYE_S


class LinkServer:
    """Serves links on one address until it is closed.

    address: 'HOST:PORT', port 0 for any, or 'unix:PATH'. services: by name of kind.
    credentials: None only for an address inside this host. A host that dials again takes the
    place of its own earlier session. cap_bytes_per_s: of what is sent to each host.
    """

    def __init__(
        self,
        address: str,
        services: Mapping[str, Service],
        credentials: grpc.ServerCredentials | None,
        admit: Admit,
        *,
        software: str = "",
        cap_bytes_per_s: float | None = None,
        max_sessions: int = MAX_SESSIONS,
        kinds: Sequence[Kind] = KINDS,
    ) -> None:
        check_listen(address, credentials is not None)
        self._kinds = by_name(kinds)
        for name, service in services.items():
            find(self._kinds, name)
            check_types(service.types)
        self._services = dict(services)
        self._admit = admit
        self._encrypted = credentials is not None
        self._software = software
        self._cap_bytes_per_s = cap_bytes_per_s
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        self._peers: dict[str, _Call] = {}
        self._closed = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(max_sessions + _SPARE, thread_name_prefix="link"),
            options=[*wire.OPTIONS, ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=max_sessions + _SPARE,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(wire.SERVICE, {wire.RPC: handler}),)
        )
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on '{address}': {error}") from error
        inside = address.startswith("unix")
        self.address = address if inside else f"{address.rpartition(':')[0]}:{port}"
        self._server.start()
        self._watch = threading.Thread(target=self._look_after, name="link watch", daemon=True)
        self._watch.start()

    def push(
        self,
        host: str,
        kind: str,
        header: msgspec.Struct,
        arrays: Mapping[str, np.ndarray],
        key: str = "",
    ) -> bool:
        """Send to a host without an answer; whether it was taken: False if the host is not
        connected, or there is no room and the kind's policy is `block`.

        Never waits. Arrays that are not writeable are not copied. SpecError if it is too large.
        """
        found = find(self._kinds, kind)
        with self._lock:
            call = self._peers.get(host)
        if call is None or call.session is None:
            return False
        return call.session.put(found, 0, settled(header, arrays), key=key)

    def peers(self) -> dict[str, PeerStatus]:
        """The hosts that are connected, by name."""
        with self._lock:
            calls = dict(self._peers)
        return {
            host: PeerStatus(
                host=host,
                run=call.hello.run,
                software=call.hello.software,
                since_s=call.since_s,
                rtt_ms=call.session.rtt_ms,
                traffic={name: replace(traffic) for name, traffic in call.traffic.items()},
                depths=call.session.depths(),
            )
            for host, call in calls.items()
            if call.session is not None and call.hello is not None
        }

    def close(self) -> None:
        """End all sessions and stop listening. Safe to call twice."""
        self._closed.set()
        with self._lock:
            sessions = [call.session for call in self._calls if call.session is not None]
        for session in sessions:
            session.close("the gateway is closing")
        self._server.stop(_GOODBYE_S).wait()
        self._watch.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_after(self) -> None:
        """Cut off calls that say nothing, or do not end when they should."""
        while not self._closed.wait(_LOOK_S):
            now_s = time.monotonic()
            with self._lock:
                calls = list(self._calls)
            for call in calls:
                if call.overdue(now_s):
                    call.context.cancel()

    def _serve(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """One call, on a thread of the pool: its pieces to the host."""
        call = _Call(context)
        with self._lock:
            self._calls.add(call)
            full = len(self._calls) > self._max_sessions
        if not context.add_callback(lambda: self._ended(call)):
            self._ended(call)
            return
        try:
            hello = wire.parse_hello(next(requests))
            if full:
                raise ConfigError(f"the gateway has {self._max_sessions} sessions, its most")
            proof = certificate_in(context.auth_context()) if self._encrypted else None
            self._admit(hello, proof)
        except EmbodiedError as error:
            yield wire.welcome_piece(self._software, str(error) or type(error).__name__)
            return
        except (StopIteration, grpc.RpcError):
            return
        admission = Admission(lambda: self._admit(hello, proof))
        workers = Workers(hello.host, self._services)
        session = self._begin(call, hello, workers)
        yield wire.welcome_piece(self._software)
        threading.Thread(
            target=self._read,
            args=(requests, session, workers, admission),
            name=f"link {hello.host}",
            daemon=True,
        ).start()
        yield from session.outgoing()

    def _begin(self, call: _Call, hello: wire.Hello, workers: Workers) -> Session:
        traffic = count_from_zero(self._kinds.values())
        cap = self._cap_bytes_per_s
        session = Session(
            {kind: kind.down for kind in self._kinds.values()},
            {kind: kind.up for kind in self._kinds.values()},
            traffic,
            lambda joined: workers.deliver(session, joined),
            None if cap is None else Cap(cap, time.monotonic()),
        )
        with self._lock:
            earlier = self._peers.get(hello.host)
            self._peers[hello.host] = call
            call.hello, call.session, call.traffic = hello, session, traffic
        if earlier is not None and earlier.session is not None:
            earlier.session.close(f"another session of host '{hello.host}' took its place")
        return session

    def _read(
        self,
        requests: Iterator[bytes],
        session: Session,
        workers: Workers,
        admission: Admission,
    ) -> None:
        """Take pieces in; a host from which none comes is cut off, so that each is checked."""
        try:
            for raw in requests:
                session.take(raw)
                if session.end is not None:
                    return
                admission.check()
        except EmbodiedError as error:
            session.close(str(error))
        except grpc.RpcError:  # cut off: its callback says so
            pass
        finally:
            session.close("the host ended the session", tell=False)
            workers.close()

    def _ended(self, call: _Call) -> None:
        if call.session is not None:
            call.session.close("the host is gone", tell=False)
        with self._lock:
            self._calls.discard(call)
            if call.hello is not None and self._peers.get(call.hello.host) is call:
                del self._peers[call.hello.host]
