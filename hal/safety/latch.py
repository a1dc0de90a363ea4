"""The halt that survives a restart: a file on the robot's host that only a person removes.

Whatever is unclear counts as halted: a file without contents, one that cannot be read, a folder
that is gone.
"""

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

_NO_REASON = "no reason given"
_RETRY_S = 1.0
_JOIN_S = 5.0


class _Record(msgspec.Struct, frozen=True):
    reason: str
    unix_s: float


class Latch:
    """Latched halts of one device: its own, and the host's emergency stop.

    Any process can set either, without asking the one that drives the robot, which looks for
    both files at every tick. folder None: a latch in memory, for simulators.
    """

    def __init__(self, folder: Path | None, device_id: str) -> None:
        self._own = self._host = ""
        self._durable = False
        self._writing: threading.Thread | None = None
        self._lock = threading.Lock()
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._own_file = latch_file(folder, device_id)
            self._host_file = latch_file(folder, HOST_STOP)

    @property
    def reason(self) -> str:
        """Why the device is halted, as of the last look; "" if it is not."""
        return self._own or self._host

    def look(self) -> None:
        """Read the files: a halt is new, or a person has removed one."""
        if self._folder is None:
            return
        was_durable = self._durable  # else the file may appear after it was looked for
        self._host = self._seen(self._host_file, self._host)
        own = self._seen(self._own_file, self._own)
        with self._lock:
            if own:
                self._own, self._durable = own, True
            elif was_durable:
                self._own, self._durable = "", False

    def set(self, reason: str) -> None:
        """Latch, in memory at once and on disk by a thread; a reason that stands is kept."""
        with self._lock:
            if self._own:
                return
            self._own = reason or _NO_REASON
            if self._folder is None:
                return
            self._writing = threading.Thread(target=self._persist, args=(self._own,), daemon=True)
        self._writing.start()

    def clear(self) -> None:
        """Remove the device's own latch; for a person on the host. Not the host's stop."""
        with self._lock:
            self._own, self._durable = "", False
        if self._writing is not None:
            self._writing.join(timeout=_JOIN_S)
        if self._folder is not None:
            self._own_file.unlink(missing_ok=True)

    def _persist(self, reason: str) -> None:
        while self._own and not self._durable:
            try:
                set_latch(self._own_file, reason)
            except (OSError, StorageFullError):
                time.sleep(_RETRY_S)
            else:
                with self._lock:
                    self._durable = bool(self._own)

    def _seen(self, file: Path, known: str) -> str:
        """The file's reason; "" only if it is certain that there is none."""
        try:
            os.lstat(file)
        except FileNotFoundError:
            return "" if os.path.isdir(file.parent) else "the folder of the latches is gone"
        except OSError as error:
            return known or f"{file} cannot be looked for: {error.strerror}"
        return known or latch_reason(file) or _NO_REASON


def latch_file(folder: Path, device_id: str) -> Path:
    """File of a device's latch; the id is made a safe name."""
    return folder / f"{urllib.parse.quote(device_id, safe='')}.halt"


def latched(folder: Path) -> list[str]:
    """Ids with a latch of their own, HOST_STOP among them if it is set."""
    return sorted(urllib.parse.unquote(path.stem) for path in folder.glob("*.halt"))


def set_latch(file: Path, reason: str) -> None:
    """Write a latch durably; one that stands is left as it is. On a full disk one without words.

    Raises OSError or StorageFullError if not even that can be made.
    """
    if os.path.lexists(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomic(file, msgspec.json.encode(_Record(reason or _NO_REASON, time.time())))
    except (OSError, StorageFullError):
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))


def latch_reason(file: Path) -> str:
    """Reason in a latch file, "" if there is none; one that cannot be read halts all the same."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Record).reason or _NO_REASON
    except FileNotFoundError:
        return "latched" if os.path.lexists(file) else ""
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return f"latched ({file.name} cannot be read)"
