"""Virtual hardware that is as punctual as real hardware, whatever else this machine does."""

import contextlib
import os
from pathlib import Path

from sim.so101.virtual import VirtualArm

_PRIORITY = 20


def punctual(arm: VirtualArm) -> VirtualArm:
    """Give an arm's process real-time priority where that is allowed: servos have processors of
    their own, and a late answer of theirs would be a robot's missed deadline."""
    with contextlib.suppress(PermissionError):
        for thread in Path(f"/proc/{arm.pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(_PRIORITY))
    return arm
