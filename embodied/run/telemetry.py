"""What roles tell the supervisor: that they live, and a few numbers."""

import time
from typing import Any

import msgspec

from embodied.comms.channels import PushChannel

_BEAT_S = 0.5


class Beat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="beat"):
    """A heartbeat of `role`; values: its latest numbers."""

    role: str
    pid: int
    values: dict[str, float | int | str | bool | None]


def address(socket_dir: str, name: str) -> str:
    """Address of a channel of this run on this host."""
    return f"ipc://{socket_dir}/{name}"


class Pulse:
    """A role's end: sends a beat at most every half second; never blocks the role."""

    def __init__(self, socket_dir: str, role: str, pid: int) -> None:
        self._channel = PushChannel(address(socket_dir, "telemetry"))
        self._role = role
        self._pid = pid
        self._values: dict[str, Any] = {}
        self._due_s = 0.0

    def note(self, **values: float | int | str | bool | None) -> None:
        """Update numbers and send a beat if one is due."""
        self._values.update(values)
        if time.monotonic() >= self._due_s:
            self.send()

    def send(self) -> None:
        """Send a beat now."""
        self._due_s = time.monotonic() + _BEAT_S
        self._channel.send(Beat(self._role, self._pid, self._values), {})

    def close(self) -> None:
        """Send the last numbers and close."""
        self.send()
        self._channel.close()
