"""A person moves a leased robot: nothing is recorded."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import numpy as np

from embodied.run.leased import LeasedRobot
from hal.commander import Commander
from hal.health import Hops, RateMeter
from hal.remote import RemoteDevice
from hal.teleop.asking import PersonStopped
from hal.teleop.session import Session

_AHEAD_TICKS = 4
"""An action is given for a few ticks, so that a late one is not a gap."""

_STALE_NS = 200_000_000


class TeleopConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """device: selector of one device of the pool. teleoperator: a registered one and its options.

    align_speed: share of the velocity limits at which the robot is led to the teleoperator's pose
    when it takes over. wait_s: how long to wait for the lease.
    """

    device: str
    teleoperator: dict[str, Any]
    align_speed: float = 0.4
    wait_s: float = 10.0


class Teleoperation:
    """Drives one leased robot by a session, until the person stops; gets it back when it is lost.

    show: called after every tick and while waiting.
    """

    def __init__(self, robot: LeasedRobot, session: Session, show: Callable[[], None]) -> None:
        self._robot = robot
        self._session = session
        self._show = show
        self._rate = RateMeter()
        self._hops = Hops()
        self._device: RemoteDevice | None = None
        self.rejections: Counter[str] = Counter()

    def run(self, device: RemoteDevice) -> None:
        """Return when the person stops; device: as leased."""
        self._robot.keep(device, self._drive, waiting=self._wait, lost=self._forget)

    def line(self) -> str:
        """State, rates, latencies and rejections, in one line."""
        if self._device is None:
            return f"waiting for {self._robot.id}: {self._robot.waiting_for}"
        parts = [self._robot.id, self._session.state]
        status = self._robot.status()
        if status is not None:
            reason = "" if status.health == "leased" else status.reason
            parts.append(": ".join(filter(None, (status.health, reason))))
        parts.append(f"{self._rate.per_second():.0f} of {self._device.spec.tick_hz:.0f} Hz")
        hops = {**self._hops.percentiles_ms(), **self._device.info.hops_ms}
        parts += [f"{name} {p50:.1f} (p99 {p99:.1f}) ms" for name, (p50, p99) in hops.items()]
        parts += [f"{count} rejected: {code}" for code, count in self.rejections.items()]
        return " · ".join(parts)

    def _obey(self) -> None:
        """Raise PersonStopped if the person signalled a stop; nothing else means anything here."""
        self._session.events()
        for event in self._session.controls():
            if event in ("stop", "estop"):
                raise PersonStopped(event)

    def _wait(self) -> None:
        self._obey()
        self._show()

    def _forget(self) -> None:
        self._device = None

    def _drive(self, device: RemoteDevice) -> NoReturn:
        self._device = device
        self._session.begin(device.spec)
        commander = Commander(device)
        while True:
            self._obey()
            frame = device.latest()
            if time.monotonic_ns() - max(frame.t_ns.values()) > _STALE_NS:
                frame = device.refresh()
            action_D = self._session.read(frame.observation)
            if action_D is not None:
                ticket = commander.send(
                    np.repeat(action_D[None], _AHEAD_TICKS, axis=0),
                    obs_tick=frame.tick,
                    start_tick=frame.tick + 1,
                )
                self._hops.add("action", time.monotonic_ns() - max(frame.t_ns.values()))
                self.rejections.update(rejection.code for rejection in ticket.rejections)
            device.advance(frame.tick + 1)
            self._rate.count()
            self._show()
