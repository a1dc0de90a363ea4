"""A device that another process of this host drives: what a lease holder works with."""

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np

from embodied.comms.channels import RequestClient
from embodied.comms.direct import DirectClient
from embodied.core.errors import DeviceLostError, EmbodiedError, LeaseError, LinkError
from embodied.core.frames import Chunk, Frame, Ticket
from hal.control.history import History
from hal.health import DeviceInfo, Health, Hops
from hal.pictures import check_size
from hal.process import messages as m
from hal.safety.config import Bounds

_TIMEOUT_S = 2.0
_RESET_TIMEOUT_S = 60.0
_PICTURE_TIMEOUT_S = 20.0
_GRANT_S = 3.0
_RETRY_S = 0.0005
_MARGIN_S = 0.0002
_PULSES_PER_HEARTBEAT = 5
_BYTES_KEPT = 256 << 20


class RemoteDevice:
    """The same calls as a Device, over a Unix socket; heartbeats are sent by a thread of its own.

    address: of the servo process. token: fencing token of the lease, 0 to observe only. One
    thread uses an object. After LeaseError or DeviceLostError it is closed and made anew.
    """

    def __init__(self, address: str, token: int = 0) -> None:
        self._address = address
        self._token = token
        self._client: DirectClient | None = None
        self._pictures: RequestClient | None = None
        self._history: History | None = None
        self._open: Frame | None = None
        self._description: m.Description | None = None
        self._hops = Hops()
        self._lost = ""
        self._closing = threading.Event()
        self._pulse: threading.Thread | None = None

    def open(self) -> "RemoteDevice":
        """Connect, learn the spec, fetch the newest frame, begin the heartbeat."""
        self._client = DirectClient(self._address, m.DATA_REPLIES)
        try:
            description, _ = self._ask(m.Describe())
            assert isinstance(description, m.Description)
            self._description = description
            if self._token:
                self._await_grant()
            self._fetch(since_tick=None)
        except BaseException:
            self.close()
            raise
        if self._token and description.heartbeat_s is not None:
            period_s = description.heartbeat_s / _PULSES_PER_HEARTBEAT
            self._pulse = threading.Thread(
                target=self._beat, args=(period_s,), name=f"pulse {description.id}", daemon=True
            )
            self._pulse.start()
        return self

    @property
    def spec(self) -> Any:
        """What the device senses and accepts."""
        return self._described.spec

    @property
    def info(self) -> DeviceInfo:
        """What is known without I/O: identity, and latencies as seen from this process."""
        described = self._described
        return DeviceInfo(
            described.id,
            described.kind,
            described.host,
            Health.LOST if self._lost else Health.LEASED if self._token else Health.READY,
            self._lost,
            tick_hz=described.spec.tick_hz,
            hops_ms=self._hops.percentiles_ms(),
        )

    @property
    def resettable(self) -> bool:
        """Whether the device is simulated, so that `reset` can set its state."""
        return self._described.resettable

    @property
    def realtime(self) -> bool:
        """Its time passes whether commands come or not."""
        return True

    @property
    def tick(self) -> int:
        """The newest tick that this process has seen."""
        return self.latest().tick

    def lease(self, holder: str = "") -> int:
        """The token of the lease that this object was made with."""
        return self._token

    def submit(self, chunk: Chunk) -> Ticket:
        """Queue a chunk under the lease."""
        header, arrays = m.submit_of(replace(chunk, lease_token=self._token))
        started_ns = time.monotonic_ns()
        reply, contents = self._ask(header, arrays)
        self._hops.add("submit", time.monotonic_ns() - started_ns)
        return m.ticket_of(reply, contents)

    def advance(self, until_tick: int, timeout_s: float = 5.0) -> None:
        """Return once `until_tick` is open and fetched."""
        deadline_s = time.monotonic() + timeout_s
        period_s = 1.0 / self.spec.tick_hz
        while (newest := self.latest()).tick < until_tick:
            due_s = max(newest.t_ns.values()) / 1e9 + period_s * (until_tick - newest.tick)
            wait_s = due_s + _MARGIN_S - time.monotonic()
            time.sleep(wait_s if wait_s > _RETRY_S else _RETRY_S)
            self._fetch(newest.tick)
            if self.latest().tick == newest.tick and time.monotonic() > deadline_s:
                raise DeviceLostError(
                    f"{self._described.id} did not reach tick {until_tick} in {timeout_s} s"
                )

    def latest(self) -> Frame:
        """The newest frame that was fetched."""
        if self._open is None:
            raise EmbodiedError("open() the device first")
        return self._open

    def refresh(self) -> Frame:
        """Fetch the open frame; the ones since the last fetch are left out."""
        self._fetch(since_tick=None)
        return self.latest()

    def frames(self, since_tick: int) -> list[Frame]:
        """Every frame from `since_tick` to the newest fetched one, in order."""
        newest = self.latest()
        assert self._history is not None
        return self._history.since(since_tick, newest)

    def reset(self, seed: int) -> int:
        """Bring a simulated device to the start state of `seed`; the new frame's tick."""
        reply, _ = self._ask(m.Reset(seed, self._token), timeout_s=_RESET_TIMEOUT_S)
        self._fetch(since_tick=reply.tick)
        return reply.tick

    def tighten(self, bounds: Bounds) -> None:
        """Narrow the host's limits for as long as this lease lasts; ConfigError for wider ones."""
        self._ask(m.Tighten(bounds, self._token))

    def halt(self, reason: str) -> None:
        """Latch a halt on the robot's host."""
        self._ask(m.Halt(reason))

    def render(self, width: int, height: int) -> np.ndarray | None:
        """A picture, if the driver can draw itself; ConfigError if it is too large."""
        check_size(width, height)
        address = self._described.pictures
        if not address:
            return None
        if self._pictures is None:
            self._pictures = RequestClient(address, m.PICTURE_REPLIES)
        try:
            _, arrays = self._pictures.request(m.Render(width, height), {}, _PICTURE_TIMEOUT_S)
        except LinkError as error:
            raise DeviceLostError(f"servo process: {error}") from error
        return arrays["picture"]

    def close(self) -> None:
        """Disconnect; the device goes on under its lease until that ends."""
        self._closing.set()
        if self._pulse is not None:
            self._pulse.join(timeout=_TIMEOUT_S)
        for client in (self._client, self._pictures):
            if client is not None:
                client.close()
        self._client = self._pictures = None

    def __enter__(self) -> "RemoteDevice":
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await_grant(self) -> None:
        """The agent tells the servo process of a new lease a moment after the pool gave it."""
        deadline_s = time.monotonic() + _GRANT_S
        while True:
            reply, _ = self._ask(m.Pulse(self._token))
            if reply.held:
                return
            if time.monotonic() > deadline_s:
                raise LeaseError(f"{self._described.id}: {reply.reason}")
            time.sleep(0.01)

    @property
    def _described(self) -> m.Description:
        if self._description is None:
            raise EmbodiedError("open() the device first")
        return self._description

    def _ask(
        self,
        header: Any,
        arrays: dict[str, np.ndarray] | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> tuple[Any, dict[str, np.ndarray]]:
        if self._lost:
            raise LeaseError(self._lost)
        if self._client is None:
            raise EmbodiedError("open() the device first")
        try:
            return self._client.request(header, arrays or {}, timeout_s)
        except LinkError as error:
            raise DeviceLostError(f"servo process: {error}") from error

    def _fetch(self, since_tick: int | None) -> None:
        """Take the frames since a tick: the one that was open comes again, closed.

        None: only the open one; what came before it is forgotten.
        """
        started_ns = time.monotonic_ns()
        since = m.NEWEST if since_tick is None else since_tick
        reply, arrays = self._ask(m.GetFrames(since, self._token))
        frames = m.frames_of(reply, arrays, self.spec)
        if not frames:
            return
        if since_tick is None or self._history is None:
            size = max(1, sum(value.nbytes for value in frames[-1].observation.values()))
            capacity = min(4096, max(64, _BYTES_KEPT // size))
            self._history = History(capacity, self._described.id, frames[0].tick)
        for closed in frames[:-1]:
            self._history.append(closed)
        self._open = frames[-1]
        self._hops.add("fetch", time.monotonic_ns() - started_ns)

    def _beat(self, period_s: float) -> None:
        with DirectClient(self._address, m.DATA_REPLIES) as client:
            while not self._closing.wait(period_s):
                try:
                    reply, _ = client.request(m.Pulse(self._token), {}, _TIMEOUT_S)
                except EmbodiedError:
                    continue
                if isinstance(reply, m.Alive) and not reply.held:
                    self._lost = f"{self._described.id}: {reply.reason}"
                    return
