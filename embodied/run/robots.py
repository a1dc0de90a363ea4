"""Where an actor's robots come from: simulated ones in its own process, or leased from the pool."""

import contextlib
import os
import time
from typing import Protocol

from embodied.core.clock import VirtualClock
from embodied.core.errors import ConfigError, DeviceLostError, EmbodiedError, LeaseError
from embodied.core.specs import DeviceSpec
from embodied.run.config import TrainConfig
from embodied.run.leased import halt, halted_by
from embodied.run.tasks import robot_task
from hal.group import DeviceGroup, make_group
from hal.pool.holding import Holding
from hal.pool.leases import Allocation, DeviceRecord
from hal.pool.pool import Pool, PoolBusyError
from hal.pool.state import pool_path
from hal.remote import RemoteDevice
from sim import family

_REPORT_S = 1.0
_POLL_S = 0.5
_TTL_S = 5.0
"""After an actor's death, until another one can have its robot."""


class Robots(Protocol):
    """The robots of one actor. waiting_for: why they cannot be had yet, "" if that is not known."""

    waiting_for: str

    def acquire(self) -> DeviceGroup | None:
        """The robots, open; None while they cannot be had."""
        ...

    def lost(self, error: EmbodiedError) -> bool:
        """Give them back after an error; whether `acquire` may get them or others again."""
        ...

    def report(self) -> None:
        """Say that they are alive, about once a second; cheap if asked more often."""
        ...

    def close(self) -> None:
        """Give them back."""
        ...


class SimulatedRobots:
    """Simulators in this process, in virtual time; the pool lists them and who holds them."""

    def __init__(self, config: TrainConfig, index: int, speed: float, holder: str) -> None:
        rows = config.actors.rows
        tasks = [robot_task(config.tasks, index, row, rows) for row in range(rows)]
        self._group = make_group(
            lambda row: family.make_device(
                tasks[row], config.sim, row=index * rows + row, clock=VirtualClock(speed)
            ),
            rows,
        )
        self._pool = Pool(pool_path())
        self._ids: list[str] = []
        self._holdings: list[Holding] = []
        self._reported_s = 0.0
        self.waiting_for = ""
        for row, device in enumerate(self._group.devices):
            name = f"{tasks[row]}:{os.getpid()}.{index * rows + row}"
            kind, classes = device.info.kind, ("robot", "simulated")
            self._pool.register(DeviceRecord(id=name, kind=kind, classes=classes))
            self._ids.append(name)
            leased = self._pool.acquire(printable(holder), f"id={name}", ttl_s=_TTL_S)
            self._holdings.append(Holding.of(self._pool, leased))

    def acquire(self) -> DeviceGroup | None:
        """They are there from the start."""
        return self._group

    def lost(self, error: EmbodiedError) -> bool:
        """A simulator that failed is this process's own fault."""
        return False

    def report(self) -> None:
        """Tell the pool their state and rate."""
        if time.monotonic() - self._reported_s < _REPORT_S:
            return
        self._reported_s = time.monotonic()
        for name, device in zip(self._ids, self._group.devices, strict=True):
            info = device.info
            health = info.health.value
            self._pool.update(name, health, info.reason, rate_hz=info.rate_hz, tick_hz=info.tick_hz)

    def close(self) -> None:
        """Close the simulators and take them out of the pool."""
        for holding in self._holdings:
            holding.close()
        for name in self._ids:
            self._pool.remove(name)
        self._pool.close()
        self._group.close()


class LeasedRobots:
    """A robot from the pool, asked for by a selector; another one, or the same, when it is lost."""

    def __init__(self, selector: str, holder: str, spec: DeviceSpec) -> None:
        self._selector = selector
        self._holder = printable(holder)
        self._spec = spec
        self._pool = Pool(pool_path())
        self._request: int | None = None
        self._holding: Holding | None = None
        self._group: DeviceGroup | None = None
        self._asked_s = 0.0
        self._halted = ""
        self.waiting_for = ""

    def acquire(self) -> DeviceGroup | None:
        """Poll the request; once it is granted, connect. Nothing while what `halt` has halted has
        not been cleared."""
        if self._group is not None:
            return self._group
        if self._halted:
            if why := halted_by(self._halted):
                self.waiting_for = why
                return None
            self._halted = ""
        if time.monotonic() - self._asked_s < _POLL_S:
            return None
        self._asked_s = time.monotonic()
        allocation = self._poll()
        if allocation is None:
            return None
        self._request, self.waiting_for = None, ""
        self._holding = Holding.of(self._pool, allocation)
        try:
            leased = [RemoteDevice(device.address, device.token) for device in allocation.devices]
            self._group = make_group(lambda row: leased[row], len(leased))
        except (LeaseError, DeviceLostError) as error:
            self.lost(error)
            return None
        try:
            check_spec(self._group.spec, self._spec, allocation.devices[0].id)
        except ConfigError:
            self.close()
            raise
        return self._group

    def _poll(self) -> Allocation | None:
        """Ask for a robot, or whether it can be had now; from the start if the pool forgot it."""
        try:
            if self._request is None:
                self._request = self._pool.request(self._holder, self._selector, ttl_s=_TTL_S)
            allocation = self._pool.poll(self._request)
            if allocation is None:
                waiting = self._pool.waiting(self._request)
                self.waiting_for = waiting.reason or f"number {waiting.position} in the queue"
            return allocation
        except PoolBusyError as error:
            self.waiting_for = str(error)
        except LeaseError as error:
            self.waiting_for = str(error)
            self._cancel()
        return None

    def _cancel(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            with contextlib.suppress(LeaseError):
                self._pool.cancel(request)

    def lost(self, error: EmbodiedError) -> bool:
        """Release what is left of the lease."""
        group, holding = self._group, self._holding
        self._group = self._holding = None
        if group is not None:
            group.close()
        if holding is not None:
            holding.close()
        return True

    def halt(self) -> None:
        """Latch a halt of what is leased, from any thread, until a person clears it."""
        holding = self._holding
        if holding is not None:
            self._halted = holding.devices[0].id
            halt(self._halted)

    def report(self) -> None:
        """Its own agent reports it."""

    def close(self) -> None:
        """Release the lease, or leave the queue."""
        self.lost(LeaseError("closing"))
        self._cancel()
        self._pool.close()


def printable(holder: str) -> str:
    """A run's name as the pool takes it."""
    return "".join(c if c.isprintable() else "?" for c in holder)[-200:]


def check_spec(found: DeviceSpec, wanted: DeviceSpec, name: str) -> None:
    """Raise ConfigError unless a leased device senses and accepts what the task's policies need."""
    if found.action != wanted.action or found.tick_hz != wanted.tick_hz:
        raise ConfigError(
            f"{name} takes actions {found.action} at {found.tick_hz:g} Hz; the task's are "
            f"{wanted.action} at {wanted.tick_hz:g} Hz"
        )
    for key, spec in wanted.observation.items():
        if found.observation.get(key) != spec:
            raise ConfigError(
                f"{name} observes {key} as {found.observation.get(key)}; the task needs {spec}"
            )
