"""A servo process that has outlived its watchdog: found by what it wrote down when it started."""

import contextlib
import os
import signal
import sys
import time
import urllib.parse
from pathlib import Path

import msgspec

_POLL_S = 0.02
_KILLED_S = 5.0
_STOPPED, _DEAD = "T", "ZX"


class Record(msgspec.Struct, frozen=True):
    """A servo process: its number, when it was started (clock ticks since boot), its watchdog's."""

    pid: int
    started: int
    watchdog: int


def write_record(folder: Path, device_id: str, watchdog: int) -> None:
    """Note that this process serves the device, before it opens the bus; a full disk is said."""
    _, _, started = _stat(os.getpid())
    record = Record(os.getpid(), started, watchdog)
    try:
        _file(folder, device_id).write_bytes(msgspec.json.encode(record))
    except OSError as error:
        with contextlib.suppress(OSError):  # the log may be on the same full disk
            sys.stderr.write(
                f"servo process of {device_id}: its number cannot be noted ({error}): if its "
                "watchdog dies while this process is stopped, a person must end it\n"
            )


def remove_record(folder: Path, device_id: str) -> None:
    """This process has let go of the device."""
    _file(folder, device_id).unlink(missing_ok=True)


def find_orphan(folder: Path, device_id: str) -> Record | None:
    """The device's servo process if it is there while its watchdog is not."""
    try:
        record = msgspec.json.decode(_file(folder, device_id).read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    return record if _orphaned(record) else None


def end_orphan(record: Record, patience_s: float) -> str:
    """Wait for the process to end by itself, as its watchdog's death makes it; kill it at once if
    it is stopped, or after patience_s. "" or why it was killed."""
    until_s = time.monotonic() + patience_s
    while state := _orphaned(record):
        if state == _STOPPED:
            why = "the servo process was stopped when its watchdog died"
        elif time.monotonic() > until_s:
            why = f"the servo process did not end within {patience_s:g} s of its watchdog's death"
        else:
            time.sleep(_POLL_S)
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGKILL)
        until_s = time.monotonic() + _KILLED_S
        while _orphaned(record) and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        return why
    return ""


def _file(folder: Path, device_id: str) -> Path:
    return folder / f"{urllib.parse.quote(device_id, safe='')}.servo"


def _orphaned(record: Record) -> str:
    """State of the process as the kernel's letter; "" if it has ended or its watchdog lives."""
    try:
        state, parent, started = _stat(record.pid)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    gone = state in _DEAD or started != record.started or parent == record.watchdog
    return "" if gone else state


def _stat(pid: int) -> tuple[str, int, int]:
    """State, parent and start of a process; proc(5): its name, in brackets, may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
