"""The halt that survives a restart: a file on the robot's host that only a person removes."""

import os
import threading
import time
import urllib.parse
from pathlib import Path

import msgspec

from embodied.core.errors import StorageFullError
from embodied.core.files import write_atomic

HOST_STOP = "estop"
"""Name of the latch that halts every device of the host."""


class _Record(msgspec.Struct, frozen=True):
    reason: str
    unix_s: float


class Latch:
    """Latched halts of one device: its own file, and the host's emergency stop.

    Any process can set either, without asking the one that drives the robot, which looks for
    both files at every tick. path None: a latch in memory, for simulators.
    """

    def __init__(self, folder: Path | None, device_id: str) -> None:
        self._memory = ""
        self._on_disk = False
        self._files: tuple[Path, ...] = ()
        if folder is not None:
            self._files = (latch_file(folder, device_id), latch_file(folder, HOST_STOP))

    @property
    def reason(self) -> str:
        """Why the device is halted; "" if it is not."""
        if self._memory:
            return self._memory
        for file in self._files:
            if os.path.exists(file):
                self._memory = latch_reason(file)
                self._on_disk = True
                return self._memory
        return ""

    def set(self, reason: str) -> None:
        """Latch, in memory at once and on disk by a thread; a reason that stands is kept."""
        if self.reason:
            return
        self._memory = reason
        if self._files:
            threading.Thread(target=self._persist, args=(reason,), name="latch").start()

    def _persist(self, reason: str) -> None:
        try:
            set_latch(self._files[0], reason)
            self._on_disk = True
        except (OSError, StorageFullError) as error:
            self._memory = f"{reason} (will not survive a restart: {error})"

    def refresh(self) -> None:
        """Forget what memory holds if a person has removed the files."""
        if self._on_disk and not any(map(os.path.exists, self._files)):
            self._memory, self._on_disk = "", False

    def clear(self) -> None:
        """Remove the device's own latch; for a person on the host. Not the host's stop."""
        self._memory, self._on_disk = "", False
        if self._files:
            self._files[0].unlink(missing_ok=True)


def latch_file(folder: Path, device_id: str) -> Path:
    """File of a device's latch; the id is made a safe name."""
    return folder / f"{urllib.parse.quote(device_id, safe='')}.halt"


def set_latch(file: Path, reason: str) -> None:
    """Write a latch durably; one that stands is left as it is."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, msgspec.json.encode(_Record(reason, time.time())))


def latch_reason(file: Path) -> str:
    """Reason in a latch file; a file that cannot be read halts all the same."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Record).reason
    except FileNotFoundError:
        return ""
    except (OSError, msgspec.DecodeError):
        return f"latched ({file.name} cannot be read)"
