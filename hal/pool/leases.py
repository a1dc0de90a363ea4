"""What the pool tells: devices, leases, places in the queue."""

import socket

import msgspec

from embodied.core import registry
from hal.pool.selectors import Description

HEALTHS = ("absent", "ready", "leased", "degraded", "halted", "lost")
"""States of a device; one that is leased and ready is shown as leased."""

_USABLE = frozenset({"ready", "leased", "degraded"})


class DeviceRecord(Description, frozen=True):
    """A device as its owner registers it. ConfigError if a field is wrong.

    address: where the owner takes chunks for it. owner_pid: the process that drives it and
    reports its state; 0 stands for the one that registers.
    """

    host: str = msgspec.field(default_factory=socket.gethostname)
    address: str = ""
    owner_pid: int = 0


class Report(msgspec.Struct, frozen=True):
    """What a device's owner tells of it. ConfigError if health is none of HEALTHS.

    reason: why it is not ready. rate_hz and tick_hz: ticks per second, measured and meant.
    load: share of the rated one. Numbers that are not finite count as unknown.
    """

    health: str
    reason: str = ""
    rate_hz: float = 0.0
    tick_hz: float = 0.0
    load: float | None = None
    temperature_c: float | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if self.health not in HEALTHS:
            raise registry.unknown("health", self.health, HEALTHS)


class DeviceStatus(DeviceRecord, frozen=True, kw_only=True):
    """A device as it is now: its record, its owner's report, its lease.

    silent_s: since that report, infinite if there was none since the host was started.
    holder, token: of the lease, "" and 0 without one; it ends in lease_remaining_s unless renewed.
    used_ns: when the last lease ended, 0 if there was none since the host was started.
    """

    health: str
    reason: str
    rate_hz: float
    tick_hz: float
    load: float | None
    temperature_c: float | None
    detail: str
    silent_s: float
    used_ns: int
    holder: str = ""
    token: int = 0
    lease_age_s: float = 0.0
    lease_remaining_s: float = 0.0

    def __post_init__(self) -> None:
        """Nothing: what comes from the pool was checked on its way in."""

    @property
    def usable(self) -> bool:
        """Whether it can be leased once nobody holds it."""
        return self.health in _USABLE

    @property
    def free(self) -> bool:
        """Whether it can be leased now."""
        return self.usable and not self.holder

    def state(self) -> str:
        """Its state in a few words, for messages."""
        if not self.holder:
            return f"{self.id} is {self.health}" + (f" ({self.reason})" if self.reason else "")
        return (
            f"{self.id} is held by {self.holder} for {self.lease_age_s:.1f} s, which must renew "
            f"within {self.lease_remaining_s:.1f} s"
        )


class Lease(msgspec.Struct, frozen=True):
    """Who may command a device: chunks that carry another token are to be refused."""

    holder: str
    token: int
    expires_ns: int


class LeasedDevice(msgspec.Struct, frozen=True):
    """A device of an allocation and the fencing token that its chunks must carry."""

    id: str
    kind: str
    host: str
    address: str
    token: int


class Allocation(msgspec.Struct, frozen=True):
    """All devices of a request, in the selectors' order, leased until expires_ns (since boot)."""

    request: int
    holder: str
    devices: tuple[LeasedDevice, ...]
    ttl_s: float
    expires_ns: int


class Waiting(msgspec.Struct, frozen=True):
    """A request in the queue. position: 1 is next. reason: why no devices there can fulfil it."""

    request: int
    holder: str
    selectors: str
    position: int
    waiting_s: float
    reason: str
