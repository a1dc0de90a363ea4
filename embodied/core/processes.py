"""Processes: their end, and their urgency."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PRIORITY = 10
_SESSION = Path("/proc/self/autogroup")
_SESSION_TRIES, _SESSION_WAIT_S = 20, 0.11


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process (SIGTERM) when its parent dies, however that dies (Linux).

    parent: the parent's number, as it told it itself. If it has died before this call, the same
    signal comes at once. Whoever adopts orphans here tells nothing: it need not be process 1, and
    process 1 may well be a parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def alive(pid: int) -> bool:
    """Whether a process of this number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def run_urgently() -> bool:
    """Give this thread, and those it starts, real-time priority; False where that is not allowed.

    Allowed to root, and to users with an rtprio limit (docs/devices.md).
    """
    if sys.platform != "linux":
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except PermissionError:
        return False
    return True


def run_normally() -> None:
    """Take real-time priority from this thread."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def leave_cores(count: int) -> None:
    """Keep all threads of this process, and what they start, off `count` of the cores that it may
    use, the last ones; one at least it keeps."""
    if sys.platform != "linux":
        return
    cores = sorted(os.sched_getaffinity(0))
    kept = cores[: max(1, len(cores) - count)]
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread), kept)


def give_way(niceness: int) -> None:
    """Let other processes have the cores first; niceness: from 0 to 19, as in nice(2).

    Where Linux shares its cores among sessions (sched(7), autogroup), a process's niceness counts
    among those of its session alone, and the session's against all others: that is set as well.
    """
    os.nice(niceness)
    with contextlib.suppress(FileNotFoundError, PermissionError):  # not grouped, or not ours
        for _ in range(_SESSION_TRIES):
            try:
                _SESSION.write_text(str(niceness))
            except BlockingIOError:  # ten changes a second are allowed, of all users together
                time.sleep(_SESSION_WAIT_S)
            else:
                return
