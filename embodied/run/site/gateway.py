"""The learner's end of a run's links: experience comes in, weights and chunks go out."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied import __version__
from embodied.buffer.serve.messages import REPLIES as BUFFER_REPLIES
from embodied.buffer.spool.messages import UPLOADS
from embodied.buffer.spool.receiver import Receiver
from embodied.comms.channels import RequestClient
from embodied.comms.codec import Message
from embodied.comms.identity.binding import check_listen
from embodied.comms.identity.credentials import NewestBundle, server_credentials
from embodied.comms.identity.peer import check_peer
from embodied.comms.identity.signing import sign
from embodied.comms.links.server import LinkServer
from embodied.comms.links.services import Service
from embodied.comms.links.wire import Hello
from embodied.core.errors import ConfigError, CorruptDataError, IdentityError
from embodied.core.rundir import RunDir
from embodied.run.config import TrainConfig
from embodied.run.remote import messages as inference
from embodied.run.site import messages as m
from embodied.run.site.status import HostStatus, LinksStatus, traffic_of
from embodied.run.telemetry import address
from embodied.weights.feed import WeightFeed
from embodied.weights.progress import progress
from embodied.weights.store import VersionGoneError, WeightStore
from embodied.weights.trial import Trial
from embodied.weights.wire import REQUESTS as WEIGHT_REQUESTS
from hal.listing import note_host

_INFERENCE_S = 30.0


class _Host:
    """What the gateway keeps of one host, its connections into this site among it.

    left: it has gone since it reported that all is delivered.
    """

    def __init__(self, name: str, sockets: str) -> None:
        self.report: m.HostReport | None = None
        self.heard_s = time.monotonic()
        self.results: dict[str, int] = {}
        self.left = False
        self._name = name
        self._sockets = sockets
        self._buffer: RequestClient | None = None
        self._receiver: Receiver | None = None
        self._uploading = threading.Lock()
        self._policy: RequestClient | None = None
        self._deciding = threading.Lock()

    @property
    def confirmed_ns(self) -> int | None:
        """When its weights were confirmed, by this host's monotonic clock."""
        age_s = None if self.report is None else self.report.weights_age_s
        return None if age_s is None else int((self.heard_s - age_s) * 1e9)

    def take_upload(self, header: Any, arrays: dict[str, np.ndarray]) -> Message:
        """Pass experience on to the run's buffer."""
        with self._uploading:
            if self._receiver is None:
                self._buffer = RequestClient(address(self._sockets, "buffer"), BUFFER_REPLIES)
                self._receiver = Receiver(self._name, self._buffer)
            return self._receiver.handle(header, arrays)

    def decide(self, header: Any, arrays: dict[str, np.ndarray]) -> Message:
        """Ask this site's policy server."""
        with self._deciding:
            if self._policy is None:
                self._policy = RequestClient(address(self._sockets, "policy"), inference.REPLIES)
            left_s = getattr(header, "time_left_ms", 1e3 * _INFERENCE_S) / 1e3
            return self._policy.request(header, arrays, min(left_s, _INFERENCE_S))

    def close(self) -> None:
        """Disconnect from this site's services."""
        with self._uploading, self._deciding:
            for client in filter(None, (self._buffer, self._policy)):
                client.close()


class Gateway:
    """One port for all hosts of a run; see docs/links.md for what crosses."""

    def __init__(self, run: RunDir, config: TrainConfig, sockets: str) -> None:
        options = config.gateway
        if options.listen is None:
            raise ConfigError("gateway.listen is missing: HOST:PORT, such as 127.0.0.1:7443")
        if not re.match(m.RUN_NAME, run.path.name):
            raise ConfigError(
                f"the run's folder is '{run.path.name}', and other hosts name theirs after it: "
                "letters, digits, '.', '_' and '-' are right, the first a letter or digit"
            )
        self._run = run
        identity = None
        if options.identity is not None:
            identity = NewestBundle(
                Path(options.identity),
                lambda error: run.event("identity refused", error=str(error)),
            )
        check_listen(options.listen, identity is not None)
        self._sockets = sockets
        self._serves = options.serve
        self._assignment = m.Assignment(run.id(), run.path.name, msgspec.json.encode(config))
        self._sitting = run.sitting()
        self._store = WeightStore(run.weights)
        self._trial = Trial(self._store)
        bundle = None if identity is None else identity()
        self._identity = identity
        self._revocations = None if bundle is None else bundle.revocations()
        key = None if bundle is None else bundle.weights_private_pem
        self._feed = WeightFeed(
            self._store,
            self._assignment.id,
            options.precision,
            None if key is None else lambda data: sign(key, data),
            choose=self._trial.offered,
        )
        self._hosts: dict[str, _Host] = {}
        self._hosts_lock = threading.Lock()
        self._over = False
        services = {
            "control": Service(m.REQUESTS, self._control),
            "experience": Service(UPLOADS, lambda host, *said: self._host(host).take_upload(*said)),
            "weights": Service(WEIGHT_REQUESTS, self._weights),
        }
        if options.serve:
            services["inference"] = Service(
                inference.REQUESTS, lambda host, *said: self._host(host).decide(*said)
            )
        self._server = LinkServer(
            options.listen,
            services,
            None if identity is None else server_credentials(identity),
            self._admit,
            software=__version__,
            cap_bytes_per_s=None if options.mbit_s is None else options.mbit_s * 1e6 / 8,
        )

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._server.address

    def look(self) -> LinksStatus:
        """Whether the run is over, whether a trial is due; the state of all links."""
        self._over = self._over or self._has_last_weights()
        for event in filter(None, [self._trial.advance()]):
            self._run.event(f"weights {event.what}", version=event.version)
        peers = self._server.peers()
        with self._hosts_lock:
            known = dict(self._hosts)
        for name, host in known.items():
            host.left |= name not in peers and host.report is not None and host.report.drained
        hosts = [self._status(name, host, peers.get(name)) for name, host in known.items()]
        return LinksStatus(
            run=self._assignment.name,
            site="gateway",
            address=self.address,
            version=self._store.latest_version(),
            over=self._over,
            hosts=tuple(sorted(hosts, key=lambda host: host.name)),
            trial=progress(self._trial.state()),
        )

    @property
    def over(self) -> bool:
        """Whether the run has its last weights."""
        return self._over

    @property
    def drained(self) -> bool:
        """Whether every host that is connected has delivered all it had and left since: it leaves
        once it has the answer to that report."""
        peers = self._server.peers()
        with self._hosts_lock:
            return all(host.left for name, host in self._hosts.items() if name in peers)

    def close(self) -> None:
        """End all sessions."""
        self._server.close()
        self._feed.close()
        with self._hosts_lock:
            for host in self._hosts.values():
                host.close()

    def _admit(self, hello: Hello, certificate: bytes | None) -> None:
        name = self._assignment.name
        if self._identity is not None and self._revocations is not None:
            self._identity().check_current()
            if certificate is None:
                raise IdentityError("this gateway knows hosts by their certificates alone")
            peer = check_peer(certificate, self._revocations, name)
            if peer.name != hello.host:
                raise IdentityError(
                    f"the certificate is of host '{peer.name}', which calls itself '{hello.host}'"
                )
        if hello.run not in ("", name):
            raise ConfigError(f"here is run '{name}', not '{hello.run}'")

    def _host(self, name: str) -> _Host:
        with self._hosts_lock:
            return self._hosts.setdefault(name, _Host(name, self._sockets))

    def _control(self, name: str, header: Any, arrays: dict[str, np.ndarray]) -> Message:
        if isinstance(header, m.Join):
            self._run.event("host joined", host=name)
            return self._assignment, {}
        host = self._host(name)
        host.report, host.heard_s = header, time.monotonic()
        note_host(name, header.devices)
        counted = max(host.results.get(header.history, 0), header.first_result)
        new = [(r.version, r.success) for r in header.results[counted - header.first_result :]]
        if new:
            for event in self._trial.tell(f"{name}/{header.history}", counted, new):
                self._run.event(f"weights {event.what}", version=event.version, host=name)
        host.results[header.history] = counted + len(new)
        return m.Standing(self._over, counted + len(new)), {}

    def _weights(self, name: str, header: Any, arrays: dict[str, np.ndarray]) -> Message:
        if header.host != name:
            raise IdentityError(f"host '{name}' asks for the weights of '{header.host}'")
        return self._feed.handle(header, arrays)

    def _has_last_weights(self) -> bool:
        version = self._store.latest_version()
        if version is None:
            return False
        try:
            metadata = self._store.manifest(version).metadata
        except (VersionGoneError, CorruptDataError):
            return False
        return bool(metadata.get("final")) and metadata.get("sitting") == self._sitting

    def _status(self, name: str, host: _Host, peer: Any) -> HostStatus:
        report = host.report
        return HostStatus(
            name=name,
            connected=peer is not None,
            since_s=0.0 if peer is None else peer.since_s,
            heard_s=time.monotonic() - host.heard_s,
            rtt_ms=None if peer is None else peer.rtt_ms,
            traffic={} if peer is None else traffic_of(peer.traffic, peer.depths),
            version=None if report is None else report.version,
            episodes=0 if report is None else report.episodes,
            spool_steps=0 if report is None else report.spool_steps,
            spool_bytes=0 if report is None else report.spool_bytes,
            oldest_s=0.0 if report is None else report.oldest_s,
            delivery=self._feed.deliveries.last(name),
            confirmed_ns=host.confirmed_ns,
            waits="" if report is None else report.waits,
        )
