"""A robot host's side of its link: spool, weights, decisions and reports, in turns."""

import time
from typing import Any

import msgspec

from embodied.buffer.spool.bucket import TokenBucket
from embodied.buffer.spool.messages import UPLOAD_REPLIES
from embodied.buffer.spool.uploader import Uploader
from embodied.comms.channels import ErrorReply
from embodied.comms.identity.signing import verify
from embodied.core.errors import EmbodiedError
from embodied.core.rundir import RunDir
from embodied.run.context import kind_of
from embodied.run.site import messages as m
from embodied.run.site.config import Site
from embodied.run.site.decisions import Decisions
from embodied.run.site.host import dial, identity_of
from embodied.run.site.results import Results
from embodied.run.site.status import HostStatus, LinksStatus, traffic_of
from embodied.run.telemetry import address
from embodied.weights.mirror import WeightMirror
from embodied.weights.store import WeightStore
from embodied.weights.wire import REPLIES as WEIGHT_REPLIES
from hal.discovery import own_devices

_WEIGHTS_S = 0.25
_REPORT_S = 1.0
_LOST_S = 5.0
_NOBODY_S = 15.0
"""Longer than a gateway waits for its hosts at the end of a run."""
_MAX_WEIGHTS_BYTES = 4 << 30


class _Asked:
    """One request at a time of a kind: asked again when its answer is lost."""

    def __init__(self, requests: Any) -> None:
        self.requests = requests
        self._number: int | None = None
        self._sent_s = 0.0

    def free(self, every_s: float) -> bool:
        """Whether to ask now: the last answer has come, every_s ago at least; or it is lost."""
        waits = self._number is not None and not self.requests.lost(self._number)
        return time.monotonic() - self._sent_s >= (_LOST_S if waits else every_s)

    def ask(self, header: msgspec.Struct) -> None:
        """Send; nothing while there is no link."""
        if self._number is not None:
            self.requests.forget(self._number)
        self._number = self.requests.send(header, {})
        self._sent_s = time.monotonic()

    def answer(self) -> Any:
        """The answer if it has come, None if not."""
        for reply in self.requests.receive_ready():
            if reply.id == self._number:
                self._number = None
                return reply
        return None


class HostLink:
    """What a host's link role does, a bounded piece at each `pump`.

    fault: why something does not get on, "" if all does.
    """

    def __init__(self, run: RunDir, site: Site, sockets: str) -> None:
        bundle = identity_of(site.config)
        self._run, self._site = run, site
        self._link = dial(site.config, site.name, site.run)
        mbit_s = site.config.spool.mbit_s
        run.buffer.mkdir(exist_ok=True)  # the spool's service may be later
        self._uploader = Uploader(
            run.buffer,
            self._link.requests("experience", UPLOAD_REPLIES),
            site.name,
            budget=None if mbit_s is None else TokenBucket(mbit_s * 1e6 / 8),
        )
        self._decisions: Decisions | None = None
        if site.config.remote != "never":
            self._decisions = Decisions(self._link, address(sockets, "inference"))
        key = None if bundle is None else bundle.weights_public_pem
        self._mirror = WeightMirror(
            WeightStore(run.weights),
            site.run_id,
            None if key is None else lambda data, signature: verify(key, data, signature),
            host=site.name,
            max_bytes=_MAX_WEIGHTS_BYTES,
        )
        self._weights = _Asked(self._link.requests("weights", WEIGHT_REPLIES))
        self._control = _Asked(self._link.requests("control", m.REPLIES))
        self._results = Results(run)
        self._history = run.id()
        self._counted = 0
        self._over = self._was_drained = self._told_drained = False
        self._linked_s = time.monotonic()
        self.fault = ""

    @property
    def connected(self) -> bool:
        """Whether there is a session."""
        return self._link.status().connected

    @property
    def done(self) -> bool:
        """Whether the run is over, all is delivered, and the gateway knows or is gone."""
        gone = self._was_drained and time.monotonic() - self._linked_s > _NOBODY_S
        return self._over and (self._told_drained or gone)

    def pump(self) -> bool:
        """Do what can be done now; whether there is more at once."""
        busy = self._uploader.pump()
        busy |= self._pump_weights()
        self._pump_report()
        if self._decisions is not None:
            busy |= self._decisions.pump()
        return busy

    def status(self) -> LinksStatus:
        """The link as this host sees it."""
        link, spool = self._link.status(), self._uploader.status()
        confirmed_s = self._mirror.confirmed_s
        host = HostStatus(
            name=self._site.name,
            connected=link.connected,
            since_s=link.since_s,
            heard_s=0.0,
            rtt_ms=link.rtt_ms,
            traffic=traffic_of(link.traffic, link.depths),
            version=self._mirror.version,
            episodes=self._results.episodes,
            spool_steps=spool.depth_steps,
            spool_bytes=spool.depth_bytes,
            oldest_s=spool.oldest_unsent_s,
            reconnects=link.reconnects,
            reason=link.reason or spool.error or self.fault,
            confirmed_ns=None if confirmed_s is None else int(confirmed_s * 1e9),
            waits=self._waits(),
        )
        return LinksStatus(
            run=self._site.run,
            site=self._site.name,
            address=self._link.address,
            version=self._mirror.newest,
            over=self._over,
            hosts=(host,),
        )

    def close(self) -> None:
        """Leave; what is not delivered stays in the spool."""
        self._uploader.close()
        if self._decisions is not None:
            self._decisions.close()
        self._link.close()

    def _pump_weights(self) -> bool:
        reply = self._weights.answer()
        if reply is not None:
            self._take_weights(reply)
        going_on = reply is not None and self._mirror.transferring and not self.fault
        if self._weights.free(0.0 if going_on else _WEIGHTS_S):
            self._weights.ask(self._mirror.next_request())
        return going_on

    def _take_weights(self, reply: Any) -> None:
        try:
            if isinstance(reply.header, ErrorReply):
                raise reply.header.exception()
            adopted = self._mirror.take(reply.header, reply.arrays, time.monotonic())
        except EmbodiedError as error:
            if self.fault != str(error):
                self._run.event("weights refused", error=str(error))
            self.fault = str(error)
            return
        self.fault = ""
        if adopted is not None:
            self._run.event("weights adopted", version=adopted.version)

    def _pump_report(self) -> None:
        if self.connected:
            self._linked_s = time.monotonic()
        reply = self._control.answer()
        if reply is not None and isinstance(reply.header, m.Standing):
            self._over |= reply.header.over
            self._counted = reply.header.results
            self._told_drained = self._over and self._was_drained
        if self._control.free(_REPORT_S):
            self._results.refresh()
            spool = self._uploader.status()
            self._was_drained = self._over and not self._acting() and not spool.depth_steps
            first, results = self._results.since(self._counted)
            confirmed_s = self._mirror.confirmed_s
            self._control.ask(
                m.HostReport(
                    version=self._mirror.version,
                    episodes=self._results.episodes,
                    spool_steps=spool.depth_steps,
                    spool_bytes=spool.depth_bytes,
                    oldest_s=spool.oldest_unsent_s,
                    drained=self._was_drained,
                    devices=tuple(own_devices()[: m.MAX_DEVICES]),
                    first_result=first,
                    results=results,
                    history=self._history,
                    weights_age_s=None if confirmed_s is None else time.monotonic() - confirmed_s,
                    waits=self._waits()[: m.MAX_REASON_CHARS],
                )
            )

    def _waits(self) -> str:
        """Why actors begin no episode with the weights that are here."""
        age_s, behind = self._mirror.staleness(time.monotonic())
        return self._site.config.staleness.check(age_s, behind, self.connected)

    def _acting(self) -> bool:
        """Whether any actor has been started and not told to be finished."""
        acting: set[str] = set()
        for event in self._run.events():
            role = str(event.get("role", ""))
            if event["event"] == "role started" and kind_of(role) == "actor":
                acting.add(role)
            elif event["event"] == "role finished":
                acting.discard(role)
        return bool(acting)
