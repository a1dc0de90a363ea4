"""A program on a pseudo-terminal, and the keys that a person would press."""

import fcntl
import os
import re
import select
import signal
import subprocess
import termios
import threading
import time

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """Runs a command as the foreground process of a new terminal, 200 columns wide."""

    def __init__(self, command, env=None) -> None:
        self._master, self._slave = os.openpty()
        termios.tcsetwinsize(self._slave, (50, 200))
        self.before = termios.tcgetattr(self._slave)
        self._output = bytearray()
        self.process = subprocess.Popen(
            command,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200", **(env or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._closing = False
        self._reader.start()

    def _read(self) -> None:
        while not self._closing:
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self._output += os.read(self._master, 65536)
                except OSError:
                    return

    @property
    def output(self) -> str:
        return _CONTROL.sub("", bytes(self._output).decode(errors="replace"))

    @property
    def restored(self) -> bool:
        """Whether the terminal's mode is as it was before the program."""
        return termios.tcgetattr(self._slave) == self.before

    @property
    def cooked(self) -> bool:
        return bool(termios.tcgetattr(self._slave)[3] & termios.ICANON)

    def keys(self, text: str | bytes) -> None:
        os.write(self._master, text.encode() if isinstance(text, str) else text)

    def hold(self, key: str, seconds: float) -> None:
        """Hold a key down: 30 repeats a second."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.keys(key)
            time.sleep(1 / 30)

    def wait(self, text: str, timeout_s: float = 20.0) -> None:
        """Return when the program has said this."""
        self.until(lambda: text in self.output, f"'{text}'", timeout_s)

    def until(self, true, what: str, timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"no {what} in {timeout_s} s; said: {self.output[-3000:]}")
            time.sleep(0.01)

    def end(self, timeout_s: float = 20.0) -> int:
        """Wait for the program's end; its exit status."""
        return self.process.wait(timeout_s)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def hang_up(self) -> None:
        """Close our end: what reads from the terminal finds it gone."""
        self._closing = True
        self._reader.join()
        os.close(self._slave)
        os.close(self._master)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if not self._closing:
            self.hang_up()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
