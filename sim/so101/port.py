"""A pseudo-terminal under a fixed name: the USB adapter of a virtual bus."""

import contextlib
import os
import select
import termios
import time
import tty
from pathlib import Path

from embodied.core.errors import ConfigError

_CHUNK = 4096


class Port:
    """The bus's end of a serial port; the host opens `link` as if it were /dev/ttyACM0.

    Unplugged, it does not exist: open handles see an error, and there is no file.
    """

    def __init__(self, link: Path) -> None:
        if link.exists() and not link.is_symlink():
            raise ConfigError(f"{link} exists and is no link; choose another path for the port")
        if not link.parent.is_dir():
            raise ConfigError(f"{link.parent} is no directory; make it before the port {link.name}")
        self.link = link
        self._master: int | None = None
        self._slave = -1

    @property
    def plugged(self) -> bool:
        """Whether the port exists."""
        return self._master is not None

    def plug(self) -> None:
        """Make the port, new, under the same name."""
        if self._master is not None:
            return
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave, termios.TCSANOW)
        os.set_blocking(self._master, False)
        fresh = self.link.with_name(f".{self.link.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.ttyname(self._slave))
        fresh.replace(self.link)

    def unplug(self) -> None:
        """Take the port away."""
        if self._master is None:
            return
        target = os.ttyname(self._slave)
        os.close(self._master)
        os.close(self._slave)
        self._master = None
        with contextlib.suppress(OSError):
            if os.readlink(self.link) == target:
                self.link.unlink()

    def read(self, timeout_s: float) -> bytes:
        """What the host has sent, at once or within timeout_s; empty if nothing."""
        if self._master is None:
            time.sleep(max(0.0, timeout_s))
            return b""
        if not select.select([self._master], [], [], max(0.0, timeout_s))[0]:
            return b""
        try:
            return os.read(self._master, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return b""

    def write(self, data: bytes) -> None:
        """Send to the host. What a host that does not read has no room for is lost."""
        if self._master is None:
            return
        with contextlib.suppress(BlockingIOError):
            os.write(self._master, data)
