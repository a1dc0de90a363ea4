"""What every role of a run has, and how it ends."""

import os
import signal
from typing import Any

from embodied.core.config import convert
from embodied.core.rundir import RunDir
from embodied.run.config import TrainConfig
from embodied.run.telemetry import Pulse

FAILED = 3
"""Exit status of a role that met an error a restart cannot mend."""

STOPPED = 4
"""Exit status of a role that was asked to end; one that was not asked by us is restarted."""


class Stop(Exception):
    """The supervisor asked this role to end."""


class Context:
    """What every role has: its run, its configuration, its pulse, and when to end."""

    def __init__(self, role: str, run: RunDir, socket_dir: str, supervisor_pid: int) -> None:
        self.role = role
        self.run = run
        run.attach()
        self.socket_dir = socket_dir
        self.config = convert(run.read_config(), TrainConfig)
        self.pulse = Pulse(socket_dir, role, os.getpid())
        self.stopping = False
        self._supervisor_pid = supervisor_pid
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _stop(self, signum: int, frame: Any) -> None:
        self.stopping = True

    def check(self, **values: float | int | str | bool | None) -> None:
        """Send the pulse; raise Stop if the role should end."""
        self.pulse.note(**values)
        if self.stopping or self.orphaned:
            raise Stop

    @property
    def orphaned(self) -> bool:
        """Whether the supervisor is gone."""
        return os.getppid() != self._supervisor_pid

    @property
    def index(self) -> int:
        """Number of this role among those of its kind."""
        return int("".join(filter(str.isdigit, self.role)) or 0)


def kind_of(role: str) -> str:
    """What a role does: its name without its number."""
    return role.rstrip("0123456789")
