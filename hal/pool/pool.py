"""The host's devices as resources that any of its processes can lease, like GPUs.

Leases are exclusive and end by themselves unless renewed. A request gets all its devices or none.
The holders that wait take turns: each one's first request, then each one's second, and so on; who
has got something goes to the end. A request that must wait keeps as many free devices for itself as
it could use at once, so smaller ones behind it cannot starve it; those that want other devices
pass. It keeps nothing while too few of the devices that fit are usable (others are halted, lost or
not there): idle robots shall not wait for a broken one.
"""

import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec

from embodied.core.errors import ConfigError, EmbodiedError, LeaseError
from embodied.core.processes import alive
from hal.pool import tables
from hal.pool.file import BootClock, PoolBusyError, PoolClock, PoolFile, Transaction
from hal.pool.leases import Allocation, DeviceRecord, DeviceStatus, Lease, Report, Waiting
from hal.pool.selectors import Selector, checked, missing, text

__all__ = [
    "Allocation",
    "BootClock",
    "DeviceRecord",
    "DeviceStatus",
    "Lease",
    "Pool",
    "PoolBusyError",
    "PoolClock",
    "Waiting",
]

PATIENCE_S = 10.0
"""A request that is not polled for so long leaves the queue: its owner must have died."""

_LONGEST_TTL_S = 3600.0
_LONGEST_TEXT = 500
_POLL_S = (0.001, 0.05)
_SHOWN = 8


class Pool:
    """The devices of one host in one file, for any number of processes and threads at once.

    stale_s: a device whose owner is silent for longer is lost until it reports again.
    forget_s: so long after that it leaves the pool, unless it is leased.
    busy_s: longest wait for other processes' operations (each takes well under a millisecond).

    Every method may raise PoolBusyError (a LeaseError), CorruptDataError, StorageFullError and,
    if the file cannot be used at all, ConfigError; then it has changed nothing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: PoolClock | None = None,
        stale_s: float = 3.0,
        forget_s: float = 3600.0,
        busy_s: float = 5.0,
    ) -> None:
        self.clock = clock or BootClock()
        self._stale_ns = round(stale_s * 1e9)
        self._forget_ns = round((stale_s + forget_s) * 1e9)
        self._file = PoolFile(path, self.clock, busy_s)

    def close(self) -> None:
        """Close the file; leases stay as they are."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(self, record: DeviceRecord, health: str = "ready", reason: str = "") -> None:
        """Add a device, or describe it anew; a lease on it stays.

        LeaseError if another process that is alive and not silent has registered that id.
        """
        if not record.owner_pid:
            record = msgspec.structs.replace(record, owner_pid=os.getpid())
        report = msgspec.json.encode(Report(health, _clipped(reason)))
        with self._transaction() as tx:
            self._check_owner(tx, record)
            tx.rows(
                "INSERT INTO devices VALUES (?, ?, ?, ?, ?, 0) ON CONFLICT (id) DO UPDATE SET "
                "record = excluded.record, report = excluded.report, "
                "owner_pid = excluded.owner_pid, seen_ns = excluded.seen_ns",
                record.id,
                msgspec.json.encode(record),
                report,
                record.owner_pid,
                tx.now_ns,
            )

    def update(
        self,
        id: str,
        health: str,
        reason: str = "",
        *,
        rate_hz: float = 0.0,
        tick_hz: float = 0.0,
        load: float | None = None,
        temperature_c: float | None = None,
        detail: str = "",
        owner_pid: int | None = None,
    ) -> Lease | None:
        """Report a device's state, more often than every stale_s; return who may command it now.

        health "leased" counts as "ready". owner_pid: as registered, by default this process.
        LeaseError if the device is not registered, or by another process now.
        """
        report = Report(
            health,
            _clipped(reason),
            _finite(rate_hz) or 0.0,
            _finite(tick_hz) or 0.0,
            _finite(load),
            _finite(temperature_c),
            _clipped(detail),
        )
        caller = os.getpid() if owner_pid is None else owner_pid
        with self._transaction() as tx:
            found = tx.rows("SELECT owner_pid FROM devices WHERE id = ?", id)
            if not found:
                raise LeaseError(f"device {id} is not in the pool: register it (again)")
            if found[0][0] != caller:
                raise LeaseError(
                    f"device {id} belongs to process {found[0][0]} now, not to {caller}, which "
                    "must no longer drive it"
                )
            tx.rows(
                "UPDATE devices SET report = ?, seen_ns = ? WHERE id = ?",
                msgspec.json.encode(report),
                tx.now_ns,
                id,
            )
            leases = tx.rows(
                "SELECT r.holder, l.token, r.expires_ns FROM leases l "
                "JOIN requests r ON r.id = l.request WHERE l.device = ?",
                id,
            )
        return Lease(*leases[0]) if leases else None

    def remove(self, id: str) -> bool:
        """Take a device out of the pool; its holder's next renewal fails. False if not there."""
        with self._transaction() as tx:
            tx.rows("DELETE FROM leases WHERE device = ?", id)
            return bool(tx.rows("DELETE FROM devices WHERE id = ? RETURNING id", id))

    def withdraw(self, id: str) -> bool:
        """Take out a device that this process registered, unless somebody holds it."""
        with self._transaction() as tx:
            gone = tx.rows(
                "DELETE FROM devices WHERE id = ? AND owner_pid = ? "
                "AND id NOT IN (SELECT device FROM leases) RETURNING id",
                id,
                os.getpid(),
            )
        return bool(gone)

    def devices(self) -> list[DeviceStatus]:
        """All devices, by id."""
        with self._transaction() as tx:
            found = tables.devices(tx, self._stale_ns)
        return sorted(found, key=lambda device: device.id)

    def request(self, holder: str, selectors: str | Sequence[Selector], ttl_s: float = 10.0) -> int:
        """Queue up for devices, to be leased for ttl_s at a time; the request's id, for `poll`."""
        wanted = checked(selectors)
        if not holder or not holder.isprintable() or len(holder) > _LONGEST_TEXT:
            raise ConfigError(
                f"holder is {holder!r}; it must be printable text, such as run7/actor"
            )
        if not 0 < ttl_s <= _LONGEST_TTL_S:
            raise ConfigError(f"ttl_s is {ttl_s}; it must be above 0 and at most {_LONGEST_TTL_S}")
        with self._transaction() as tx:
            return tables.enqueue(tx, holder, wanted, round(ttl_s * 1e9))

    def poll(self, request: int) -> Allocation | None:
        """The request's devices once it has them, else None. Poll at least every PATIENCE_S.

        LeaseError if the request has left the queue, or its lease has ended.
        """
        with self._transaction() as tx:
            found = tx.rows("SELECT granted_ns FROM requests WHERE id = ?", request)
            if not found:
                raise LeaseError(
                    f"request {request} is not known: it was cancelled, not polled for "
                    f"{PATIENCE_S:.0f} s, or its lease has ended"
                )
            if found[0][0] is None:
                tx.rows("UPDATE requests SET polled_ns = ? WHERE id = ?", tx.now_ns, request)
                if not tables.serve(tx, request, tables.devices(tx, self._stale_ns)):
                    return None
            return tables.allocation(tx, request)

    def waiting(self, request: int) -> Waiting:
        """A request's place in the queue; LeaseError if it does not wait. This is no polling."""
        for waiting in self.queue():
            if waiting.request == request:
                return waiting
        raise LeaseError(f"request {request} does not wait in the queue")

    def queue(self) -> list[Waiting]:
        """All requests that wait, next one first."""
        with self._transaction() as tx:
            devices = tables.devices(tx, self._stale_ns)
            queued = tables.queue(tx, devices)
        return [
            Waiting(
                request.id,
                request.holder,
                text(request.selectors),
                position,
                (tx.now_ns - request.asked_ns) / 1e9,
                missing(request.selectors, devices),
            )
            for position, request in enumerate(queued, start=1)
        ]

    def acquire(
        self,
        holder: str,
        selectors: str | Sequence[Selector],
        ttl_s: float = 10.0,
        timeout_s: float = 10.0,
    ) -> Allocation:
        """Request and poll until the devices are there. timeout_s: 0 asks once, inf for ever.

        LeaseError after timeout_s; it says who holds what, who is first, and what is missing.
        """
        wanted = checked(selectors)
        request = self.request(holder, wanted, ttl_s)
        end_ns = self.clock.now_ns() + timeout_s * 1e9
        pause_s, longest_s = _POLL_S
        try:
            while (allocation := self.poll(request)) is None:
                now_ns = self.clock.now_ns()
                if now_ns >= end_ns:
                    raise self._refusal(request, wanted, timeout_s)
                self.clock.sleep_until(int(min(end_ns, now_ns + pause_s * 1e9)))
                pause_s = min(2 * pause_s, longest_s)
        except BaseException:
            with suppress(EmbodiedError):
                self.cancel(request)
            raise
        return allocation

    def renew(self, allocation: Allocation) -> Allocation:
        """Lease for another ttl_s from now; devices come back with their present addresses.

        LeaseError if the lease has ended or a device was removed. PoolBusyError and
        StorageFullError leave the lease as it was: try again while it lasts.
        """
        with self._transaction() as tx:
            if tables.tokens(tx, allocation) is None:
                raise _ended(allocation, tx.now_ns)
            expires_ns = tx.now_ns + round(allocation.ttl_s * 1e9)
            tx.rows(
                "UPDATE requests SET expires_ns = ? WHERE id = ?", expires_ns, allocation.request
            )
            return tables.allocation(tx, allocation.request)

    def release(self, allocation: Allocation) -> bool:
        """Give the devices back; False if the lease had ended before."""
        with self._transaction() as tx:
            if tables.tokens(tx, allocation) is None:
                return False
            return tables.end(tx, allocation.request, tx.now_ns)

    def cancel(self, request: int) -> bool:
        """Leave the queue, or give back what was granted; False if the request is not known."""
        with self._transaction() as tx:
            return tables.end(tx, request, tx.now_ns)

    @contextmanager
    def _transaction(self) -> Generator[Transaction]:
        with self._file.transaction() as tx:
            tables.expire(tx, round(PATIENCE_S * 1e9), self._forget_ns)
            yield tx

    def _check_owner(self, tx: Transaction, record: DeviceRecord) -> None:
        found = tx.rows("SELECT owner_pid, seen_ns FROM devices WHERE id = ?", record.id)
        if not found:
            return
        [[owner, seen_ns]] = found
        silent_ns = math.inf if seen_ns is None else tx.now_ns - seen_ns
        if owner != record.owner_pid and silent_ns <= self._stale_ns and alive(owner):
            raise LeaseError(
                f"device {record.id} is registered by process {owner}, last heard of "
                f"{silent_ns / 1e9:.1f} s ago; end that process first, or choose another id"
            )

    def _refusal(self, request: int, wanted: Sequence[Selector], timeout_s: float) -> LeaseError:
        devices, queue = self.devices(), self.queue()
        mine = next((waiting for waiting in queue if waiting.request == request), None)
        parts = [
            device.state()
            for device in devices
            if not device.free and any(selector.fits(device) for selector in wanted)
        ]
        if len(parts) > _SHOWN:
            parts[_SHOWN:] = [f"{len(parts) - _SHOWN} more are not free"]
        if mine is not None:
            first = queue[: mine.position - 1]
            if first:
                names = [f"{other.holder} ('{other.selectors}')" for other in first[:_SHOWN]]
                more = f" and {len(first) - _SHOWN} more" if len(first) > _SHOWN else ""
                parts.append(f"before it in the queue: {', '.join(names)}{more}")
            if mine.reason:
                parts.append(f"the pool cannot fulfil it: {mine.reason}")
        return LeaseError(
            f"no devices for '{text(wanted)}' within {timeout_s:g} s"
            + "".join(f"; {part}" for part in parts)
        )


def _ended(allocation: Allocation, now_ns: int) -> LeaseError:
    names = ", ".join(device.id for device in allocation.devices)
    late_s = (now_ns - allocation.expires_ns) / 1e9
    why = (
        f"it was not renewed and ended {late_s:.1f} s ago"
        if late_s >= 0
        else "it was released, or the host was restarted"
    )
    return LeaseError(f"{allocation.holder} no longer holds {names}: {why}")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _clipped(given: str) -> str:
    """Text that UTF-8 can carry, not too long."""
    return given[:_LONGEST_TEXT].encode(errors="replace").decode()
