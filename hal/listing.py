"""Lines of the device table, and those that other hosts tell: shown here, leased only there."""

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from embodied.core.errors import CorruptDataError
from embodied.core.files import write_atomic
from hal.pool.state import state_dir

SILENT_S = 5.0
"""A host that has told nothing for so long is lost."""

FORGOTTEN_S = 3600.0
_MAX_BYTES = 1 << 20


class DeviceRow(msgspec.Struct, frozen=True):
    """One line of the device table.

    holder: who has leased it. rate_hz: ticks per second achieved, of tick_hz meant. load: share
    of the rated one (of a GPU: of its time). detail: anything else worth knowing.
    """

    id: str
    kind: str
    host: str
    health: str
    reason: str = ""
    holder: str = ""
    rate_hz: float = 0.0
    tick_hz: float = 0.0
    load: float | None = None
    temperature_c: float | None = None
    detail: str = ""


class HostDevices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one host told last, and when (seconds since this host's start)."""

    host: str
    heard_s: float
    devices: tuple[DeviceRow, ...]


def note_host(host: str, devices: Iterable[DeviceRow]) -> None:
    """Keep what a host tells of its devices, in the place of what it told before."""
    rows = tuple(msgspec.structs.replace(row, host=host) for row in devices)
    told = HostDevices(host, _since_boot_s(), rows)
    write_atomic(_path(host), msgspec.json.encode(told))


def devices_of_hosts() -> list[DeviceRow]:
    """Every device of every host that was heard within the hour; lost where it is silent now.

    CorruptDataError names a file that cannot be read.
    """
    rows: list[DeviceRow] = []
    for path in sorted(_folder().glob("*.json")):
        try:
            told = _read(path)
        except FileNotFoundError:  # another process has just forgotten the host
            continue
        silent_s = _since_boot_s() - told.heard_s
        if not 0 <= silent_s <= FORGOTTEN_S:
            path.unlink(missing_ok=True)
            continue
        reason = f"host {told.host} is silent for {silent_s:.0f} s" if silent_s > SILENT_S else ""
        for row in told.devices:
            lost = msgspec.structs.replace(row, health="lost", reason=reason, holder="")
            rows.append(lost if reason else row)
    return rows


def _read(path: Path) -> HostDevices:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=HostDevices)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise CorruptDataError(f"{path} is damaged: {error}; delete it") from error


def _path(host: str) -> Path:
    name = hashlib.sha256(host.encode()).hexdigest()[:24]
    return _folder() / f"{name}.json"


def _folder() -> Path:
    folder = state_dir() / "hosts"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
