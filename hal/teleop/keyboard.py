"""The keyboard of a terminal as a teleoperator, and as a person's voice."""

import atexit
import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any, ClassVar

import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.frames import Observation
from embodied.core.protocols import Event
from embodied.core.specs import DeviceSpec
from hal.teleop.asking import wait_for_person
from hal.teleop.jog import Jog
from hal.teleop.keys import EVENT_HELP, KeyboardConfig, Keys

__all__ = ["EVENT_HELP", "Keyboard", "KeyboardConfig", "foreground_terminal", "mode_kept"]

_DEADLY = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def foreground_terminal(handle: int) -> str:
    """Why keys cannot be read from this file descriptor; "" if it is our terminal."""
    if not os.isatty(handle):
        return "standard input is not a terminal"
    try:
        ours = os.tcgetpgrp(handle) == os.getpgrp()
    except OSError:
        return "standard input is not this process's terminal"
    return "" if ours else "this process runs in the background of its terminal"


@contextlib.contextmanager
def mode_kept(handle: int = 0) -> Generator[None]:
    """Give the terminal back at the end as it is now, whatever processes that read keys left."""
    if foreground_terminal(handle):
        yield
        return
    saved = termios.tcgetattr(handle)
    try:
        yield
    finally:
        _set_mode(handle, saved)


class Keyboard:
    """Teleoperator and operator on a terminal, in cbreak mode from `open` to `close`.

    The terminal gets its mode back in any case: after an exception, at exit, and when a signal
    ends the process. handle: file descriptor of the terminal. say: how `ask` shows its text.
    `events` may be called from another thread than `read`.
    """

    Config: ClassVar = KeyboardConfig

    def __init__(self, config: KeyboardConfig, handle: int = 0) -> None:
        self._config = config
        self._handle = handle
        self._keys = Keys(config)
        self._lock = threading.Lock()
        self._saved: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._gone = False
        self._jog: Jog | None = None
        self._size = 0
        self.say: Callable[[str], None] = _write
        self.help = ""
        """What the keys do on the device that it has begun with."""

    def begin(self, spec: DeviceSpec) -> None:
        """Move a device of this spec from now on, from where it stands."""
        self._jog = Jog(spec, self._config.steps(spec), self._config.push)
        self._size = spec.action.size
        self.help = self._config.help(spec)

    def open(self) -> None:
        """Take the terminal. Raises ConfigError if there is none, or not for this process."""
        if self._saved is not None:
            return
        if fault := foreground_terminal(self._handle):
            raise ConfigError(f"keyboard: {fault}; run it in a terminal, in the foreground")
        self._saved = termios.tcgetattr(self._handle)
        atexit.register(self.close)
        if threading.current_thread() is threading.main_thread():
            self._take_signals()
        self._take_terminal()

    def read(self, observation: Observation) -> np.ndarray | None:
        """Action [D] while the person takes part, else None."""
        now_s = time.monotonic()
        with self._lock:
            self._pump()
            engaged = self._keys.engaged(now_s)
            rates_D = self._keys.rates(self._size, now_s)
        if self._jog is None:
            raise ConfigError("keyboard: begin(spec) comes before read()")
        if not engaged:
            self._jog.rest()
            return None
        return self._jog.act(rates_D, observation)

    def events(self) -> list[Event]:
        """What has been signalled since the last call; a terminal that is gone signals a stop."""
        with self._lock:
            self._pump()
            return self._keys.events(time.monotonic())

    def ask(self, text: str) -> None:
        """Show a text and wait for Enter. Raises PersonStopped after Esc or Space."""
        self.say(text)
        wait_for_person(self.events)

    def close(self) -> None:
        """Give the terminal back as it was; safe to call twice."""
        saved, self._saved = self._saved, None
        if saved is not None:
            _set_mode(self._handle, saved)
            atexit.unregister(self.close)
            if threading.current_thread() is threading.main_thread():
                for number, handler in self._handlers.items():
                    signal.signal(number, handler)
            self._handlers = {}

    def _pump(self) -> None:
        """Read what there is, without waiting."""
        while self._saved is not None and not self._gone:
            if not select.select([self._handle], [], [], 0)[0]:
                return
            try:
                data = os.read(self._handle, 1024)
            except OSError:
                data = b""
            if not data:
                self._gone = True
                data = b"\x1b"
            self._keys.feed(data, time.monotonic())

    def _take_terminal(self) -> None:
        mode = termios.tcgetattr(self._handle)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        _set_mode(self._handle, mode)

    def _take_signals(self) -> None:
        """Where a signal would end the process at once, give the terminal back before."""

        def end(number: int, frame: FrameType | None) -> None:
            self.close()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        def go_on(number: int, frame: FrameType | None) -> None:
            if self._saved is not None and not foreground_terminal(self._handle):
                self._take_terminal()

        for number in _DEADLY:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, end)
        self._handlers[signal.SIGCONT] = signal.signal(signal.SIGCONT, go_on)


def _set_mode(handle: int, mode: list[Any]) -> None:
    """Set a terminal's mode and drop what was typed; also from the background, where the kernel
    would stop us for it, and without waiting for output that nobody reads."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(handle, termios.TCSANOW, mode)
            termios.tcflush(handle, termios.TCIFLUSH)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _write(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
