"""What the pool's transactions do with its tables: expiry, the queue, granting and ending."""

import functools
import math
from collections import Counter
from typing import NamedTuple, TypeVar

import msgspec

from embodied.core.errors import CorruptDataError, LeaseError
from embodied.core.processes import alive
from hal.pool.file import Transaction
from hal.pool.leases import Allocation, DeviceRecord, DeviceStatus, LeasedDevice, Report
from hal.pool.selectors import Selector, assign, match, parse, text

T = TypeVar("T")

_LAST_TURN = "(SELECT coalesce(max(turn), 0) FROM requests WHERE granted_ns IS NULL)"


class Queued(NamedTuple):
    """A request that waits. ready: whether it only waits for devices to be given back."""

    id: int
    holder: str
    selectors: tuple[Selector, ...]
    asked_ns: int
    ready: bool


def expire(tx: Transaction, patience_ns: int, forget_ns: int) -> None:
    """End leases past their time, requests nobody polls, devices nobody has heard of for long."""
    ended = tx.rows(
        "SELECT id, expires_ns FROM requests "
        "WHERE expires_ns <= ? OR (granted_ns IS NULL AND polled_ns <= ?)",
        tx.now_ns,
        tx.now_ns - patience_ns,
    )
    for request, expires_ns in ended:
        end(tx, request, expires_ns or 0)
    tx.rows(
        "DELETE FROM devices WHERE coalesce(seen_ns, 0) <= ? "
        "AND id NOT IN (SELECT device FROM leases)",
        tx.now_ns - forget_ns,
    )


def devices(tx: Transaction, stale_ns: int) -> list[DeviceStatus]:
    """All devices, least recently used first."""
    rows = tx.rows(
        "SELECT d.record, d.report, d.seen_ns, d.used_ns, r.holder, l.token, "
        "r.granted_ns, r.expires_ns "
        "FROM devices d LEFT JOIN leases l ON l.device = d.id "
        "LEFT JOIN requests r ON r.id = l.request ORDER BY d.used_ns, d.id"
    )
    return [_status(tx.now_ns, stale_ns, *row) for row in rows]


def enqueue(tx: Transaction, holder: str, selectors: tuple[Selector, ...], ttl_ns: int) -> int:
    """Add a request at the queue's end; its id."""
    [[request]] = tx.rows(
        "INSERT INTO requests (turn, holder, selectors, devices, ttl_ns, asked_ns, polled_ns) "
        f"VALUES ({_LAST_TURN} + 1, ?, ?, ?, ?, ?, ?) RETURNING id",
        holder,
        text(selectors),
        sum(selector.count for selector in selectors),
        ttl_ns,
        tx.now_ns,
        tx.now_ns,
    )
    return request


def queue(tx: Transaction, everything: list[DeviceStatus]) -> list[Queued]:
    """Requests that wait, in the order in which they are served.

    Each holder's first, then each one's second, and so on; among these by turn: since when the
    request has waited, or since when an older one of its holder was granted. A request whose
    devices are out of order delays no other of its holder.
    """
    usable = [device for device in everything if device.usable]
    rows = tx.rows(
        "SELECT id, turn, holder, selectors, asked_ns FROM requests WHERE granted_ns IS NULL "
        "ORDER BY id"
    )
    ahead: Counter[str] = Counter()
    ranked: list[tuple[int, int, Queued]] = []
    for id, turn, holder, stored, asked_ns in rows:
        wanted = _parsed(stored)
        queued = Queued(id, holder, wanted, asked_ns, match(wanted, usable) is not None)
        ranked.append((ahead[holder], turn, queued))
        ahead[holder] += queued.ready
    return [queued for *_, queued in sorted(ranked)]


def serve(tx: Transaction, request: int, everything: list[DeviceStatus]) -> bool:
    """Grant a request that waits if it is its turn and its devices are free.

    everything: all devices, preferred ones first.

    Those before it in the queue take theirs first, whether or not they are complete: a maximum
    matching of a request over the free devices can only grow while others give devices back, so
    each comes to its end. One whose devices are out of order takes nothing.
    """
    free = {device.id: device for device in everything if device.free}
    for queued in queue(tx, everything):
        placed = assign(queued.selectors, list(free.values()))
        taken = [device for held in placed for device in held]
        if queued.id == request:
            whole = len(taken) == sum(selector.count for selector in queued.selectors)
            if whole:
                _grant(tx, queued, taken)
            return whole
        if queued.ready:
            for device in taken:
                del free[device.id]
    return False


def allocation(tx: Transaction, request: int) -> Allocation:
    """What a granted request holds; LeaseError if a device was taken out of the pool since."""
    [[holder, count, ttl_ns, expires_ns]] = tx.rows(
        "SELECT holder, devices, ttl_ns, expires_ns FROM requests WHERE id = ?", request
    )
    rows = tx.rows(
        "SELECT d.record, l.token FROM leases l JOIN devices d ON d.id = l.device "
        "WHERE l.request = ? ORDER BY l.place",
        request,
    )
    leased = tuple(_leased(decoded(record, DeviceRecord), token) for record, token in rows)
    if len(leased) < count:
        raise LeaseError(
            f"request {request} of {holder} has lost {count - len(leased)} of its {count} "
            "devices: they were taken out of the pool"
        )
    return Allocation(request, holder, leased, ttl_ns / 1e9, expires_ns)


def tokens(tx: Transaction, held: Allocation) -> list[int] | None:
    """Tokens of an allocation that still count; None if its lease has ended."""
    if not tx.rows(
        "SELECT id FROM requests WHERE id = ? AND holder = ? AND granted_ns IS NOT NULL",
        held.request,
        held.holder,
    ):
        return None
    rows = tx.rows("SELECT token FROM leases WHERE request = ? ORDER BY place", held.request)
    found = [token for (token,) in rows]
    return found if set(found) <= {device.token for device in held.devices} else None


def end(tx: Transaction, request: int, now_ns: int) -> bool:
    """Free a request's devices, last used at now_ns, and forget it; False if it is not known."""
    tx.rows(
        "UPDATE devices SET used_ns = ? WHERE id IN (SELECT device FROM leases WHERE request = ?)",
        now_ns,
        request,
    )
    tx.rows("DELETE FROM leases WHERE request = ?", request)
    return bool(tx.rows("DELETE FROM requests WHERE id = ? RETURNING id", request))


@functools.lru_cache(maxsize=1024)
def decoded(stored: bytes, kind: type[T]) -> T:
    """A stored struct; CorruptDataError if the bytes are none."""
    try:
        return msgspec.json.decode(stored, type=kind)
    except msgspec.MsgspecError as error:
        raise CorruptDataError(f"the pool holds a damaged {kind.__name__}: {error}") from error


@functools.lru_cache(maxsize=1024)
def _parsed(stored: str) -> tuple[Selector, ...]:
    return parse(stored)


def _grant(tx: Transaction, queued: Queued, taken: list[DeviceStatus]) -> None:
    for place, device in enumerate(taken):
        token = tx.next_token()
        tx.rows("INSERT INTO leases VALUES (?, ?, ?, ?)", device.id, queued.id, place, token)
    tx.rows(
        f"UPDATE requests SET turn = {_LAST_TURN} + 1 "
        "WHERE holder = ? AND id > ? AND granted_ns IS NULL",
        queued.holder,
        queued.id,
    )
    tx.rows(
        "UPDATE requests SET granted_ns = ?, expires_ns = ? + ttl_ns WHERE id = ?",
        tx.now_ns,
        tx.now_ns,
        queued.id,
    )


_QUIET_NS = 1_000_000_000


def _leased(record: DeviceRecord, token: int) -> LeasedDevice:
    return LeasedDevice(record.id, record.kind, record.host, record.address, token)


def _status(
    now_ns: int,
    stale_ns: int,
    record: bytes,
    report: bytes,
    seen_ns: int | None,
    used_ns: int,
    holder: str | None,
    token: int | None,
    granted_ns: int | None,
    expires_ns: int | None,
) -> DeviceStatus:
    described, told = decoded(record, DeviceRecord), decoded(report, Report)
    silent_s = math.inf if seen_ns is None else (now_ns - seen_ns) / 1e9
    health, reason = told.health, told.reason
    if seen_ns is None:
        health, reason = "lost", "host process silent since the host was started"
    elif now_ns - seen_ns > stale_ns:
        health, reason = "lost", f"host process silent for {silent_s:.0f} s"
    elif now_ns - seen_ns > _QUIET_NS and not alive(described.owner_pid):
        health, reason = "lost", "host process has ended"
    elif health in ("ready", "leased"):
        health = "leased" if holder else "ready"
    return DeviceStatus(
        id=described.id,
        kind=described.kind,
        classes=described.classes,
        host=described.host,
        capabilities=described.capabilities,
        labels=described.labels,
        address=described.address,
        owner_pid=described.owner_pid,
        health=health,
        reason=reason,
        rate_hz=told.rate_hz,
        tick_hz=told.tick_hz,
        load=told.load,
        temperature_c=told.temperature_c,
        detail=told.detail,
        silent_s=silent_s,
        used_ns=used_ns,
        holder=holder or "",
        token=token or 0,
        lease_age_s=(now_ns - (granted_ns or now_ns)) / 1e9,
        lease_remaining_s=((expires_ns or now_ns) - now_ns) / 1e9,
    )
