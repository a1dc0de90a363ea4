"""A gamepad on Linux's joystick interface, /dev/input/js*."""

import errno
import glob
import os
import re
import struct
import threading
import time
from pathlib import Path
from typing import Any, ClassVar, get_args

import msgspec
import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.frames import Observation
from embodied.core.protocols import Event
from embodied.core.registry import unknown
from embodied.core.specs import DeviceSpec
from hal.teleop.jog import Jog

_DEVICES = "/dev/input/js*"
_EVENT = struct.Struct("<IhBB")
_BUTTON, _AXIS, _INITIAL = 1, 2, 0x80
_FULL = 32767
_RETRY_S = 0.5
_SOURCE = re.compile(r"(-?)([ab])(\d{1,2})(?:-([ab])(\d{1,2}))?")


def enumerate_gamepads() -> list[dict[str, Any]]:
    """Gamepads of this machine, as rows {"id", "kind", "detail" or "fault"}."""
    rows: list[dict[str, Any]] = []
    for path in sorted(glob.glob(_DEVICES), key=lambda path: (len(path), path)):
        row: dict[str, Any] = {"id": f"gamepad:{path}", "kind": "teleoperator"}
        if os.access(path, os.R_OK):
            rows.append(row | {"detail": _name(path)})
        else:
            fault = f"{path} may not be read; is this user in the group 'input'?"
            rows.append(row | {"fault": fault})
    return rows


def _name(path: str) -> str:
    try:
        return (Path("/sys/class/input") / Path(path).name / "device/name").read_text().strip()
    except OSError:
        return path


class GamepadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """device: path, None for the first one found. takeover: button to hold while moving.

    axes: what moves each action element, in order: "a1" an axis, "-a1" the same the other way,
    "b4-b5" two buttons, "a5-a2" two triggers, "" nothing. speed: at full deflection, share of the
    velocity limit (of half the action's range where there is none). dead_zone: deflection, of 1,
    that counts as none. buttons: number of each event's button. The numbers are those of an Xbox
    controller.
    """

    device: str | None = None
    takeover: int = 5
    axes: tuple[str, ...] = ("-a0", "-a1", "-a4", "-a7", "a3", "a5-a2")
    speed: float = 0.3
    dead_zone: float = 0.15
    buttons: dict[str, int] = msgspec.field(
        default_factory=lambda: {"success": 0, "failure": 1, "rerecord": 2, "estop": 3, "stop": 6}
    )

    def __post_init__(self) -> None:
        if not 0 < self.speed <= 1:
            raise ConfigError(f"gamepad.speed is {self.speed}; it must be above 0 and at most 1")
        if not 0 <= self.dead_zone < 1:
            raise ConfigError(f"gamepad.dead_zone is {self.dead_zone}; it must be 0 to below 1")
        for text in filter(None, self.axes):
            if not _SOURCE.fullmatch(text):
                raise ConfigError(
                    f"gamepad.axes: '{text}' is none of a1, -a1, b4-b5, a5-a2 (axis, button)"
                )
        for name in self.buttons:
            if name not in get_args(Event):
                raise unknown("gamepad.buttons event", name, get_args(Event))
        numbers = [self.takeover, *self.buttons.values()]
        if len(set(numbers)) < len(numbers):
            raise ConfigError("gamepad: one button has two meanings (takeover, buttons)")


class Pad:
    """The pure part: bytes of js_event structs to deflections, buttons and events.

    What is held while it connects counts only once it is released and pressed again.
    """

    def __init__(self, config: GamepadConfig) -> None:
        self._config = config
        self._meanings = {number: name for name, number in config.buttons.items()}
        self._events: list[Event] = []
        self.disconnect()

    def disconnect(self) -> None:
        """Forget what is pressed and deflected; events stay until they are read."""
        self._rest = b""
        self._axes: dict[int, float] = {}
        self._buttons: set[int] = set()

    def feed(self, data: bytes) -> None:
        """Take bytes as they were read; a part of a struct waits for its rest."""
        data = self._rest + data
        whole = len(data) - len(data) % _EVENT.size
        self._rest = data[whole:]
        for _, value, kind, number in _EVENT.iter_unpack(data[:whole]):
            if kind & ~_INITIAL == _AXIS:
                self._axes[number] = max(-1.0, value / _FULL)
            elif kind == _BUTTON:
                self._press(number, down=bool(value))

    def _press(self, number: int, *, down: bool) -> None:
        if not down:
            self._buttons.discard(number)
            return
        self._buttons.add(number)
        meaning = self._meanings.get(number)
        self._events.extend(event for event in get_args(Event) if event == meaning)

    @property
    def engaged(self) -> bool:
        """Whether the takeover button is held."""
        return self._config.takeover in self._buttons

    def rates(self, size: int) -> np.ndarray:
        """How far each action element is deflected, [D] within -1 to 1."""
        found = [self._rate(text) for text in self._config.axes[:size]]
        return np.array(found + [0.0] * (size - len(found)))

    def events(self) -> list[Event]:
        """Buttons pressed since the last call."""
        events, self._events = self._events, []
        return events

    def _rate(self, text: str) -> float:
        match = _SOURCE.fullmatch(text)
        if match is None:
            return 0.0
        value = self._value(match[2], int(match[3]))
        if match[4]:
            value -= self._value(match[4], int(match[5]))
            value = value / 2 if match[4] == "a" else value
        value = float(np.clip(value, -1.0, 1.0))
        dead = self._config.dead_zone
        size = max(0.0, (abs(value) - dead) / (1 - dead))
        return float(np.copysign(size, -value if match[1] else value))

    def _value(self, kind: str, number: int) -> float:
        return self._axes.get(number, 0.0) if kind == "a" else float(number in self._buttons)


class Gamepad:
    """Teleoperator: moves the device while the takeover button is held, signals by buttons.

    It is opened again when it comes back after it was unplugged; until then it does not take
    part. `events` may be called from another thread than `read`.
    """

    Config: ClassVar = GamepadConfig

    def __init__(self, config: GamepadConfig) -> None:
        self._config = config
        self._pad = Pad(config)
        self._handle: int | None = None
        self._tried_s = -_RETRY_S
        self._lock = threading.Lock()
        self._opened = False
        self._jog: Jog | None = None
        self._size = 0
        self.fault = ""
        """Why it does not work now, "" if it does."""

    def begin(self, spec: DeviceSpec) -> None:
        """Move a device of this spec from now on, from where it stands."""
        self._size = spec.action.size
        if len(self._config.axes) < self._size and spec.motion is None:
            raise ConfigError(
                f"gamepad.axes names {len(self._config.axes)} sources; the device's action has "
                f"{self._size} elements: name each, '' for one that stays in the middle"
            )
        low_D, high_D = spec.action.bounds()
        step_D = self._config.speed * (high_D - low_D) / 2 / spec.tick_hz
        if spec.motion is not None:
            step_D = self._config.speed * np.asarray(spec.motion.velocity) / spec.tick_hz
        self._jog = Jog(spec, step_D, self._config.speed)

    def open(self) -> None:
        """Connect. Raises ConfigError if there is no gamepad."""
        with self._lock:
            self._opened = True
            self._connect()
            if self._handle is None:
                self._opened = False
                raise ConfigError(f"gamepad: {self.fault}")

    def read(self, observation: Observation) -> np.ndarray | None:
        """Action [D] while the takeover button is held, else None."""
        with self._lock:
            self._pump()
            engaged, rates_D = self._pad.engaged, self._pad.rates(self._size)
        if self._jog is None:
            raise ConfigError("gamepad: begin(spec) comes before read()")
        if not engaged:
            self._jog.rest()
            return None
        return self._jog.act(rates_D, observation)

    def events(self) -> list[Event]:
        """Buttons pressed since the last call."""
        with self._lock:
            self._pump()
            return self._pad.events()

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        with self._lock:
            self._opened = False
            self._lose("closed")

    def _connect(self) -> None:
        """Open the device if half a second has passed since the last attempt."""
        now_s = time.monotonic()
        if self._handle is not None or now_s - self._tried_s < _RETRY_S:
            return
        self._tried_s = now_s
        path = self._config.device
        if path is None:
            found = [row["id"].partition(":")[2] for row in enumerate_gamepads()]
            if not found:
                self.fault = f"there is none: no device {_DEVICES}"
                return
            path = found[0]
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            hint = "; is this user in the group 'input'?" if error.errno == errno.EACCES else ""
            self.fault = f"{path}: {error.strerror}{hint}"
            return
        self._pad.disconnect()
        self.fault = ""

    def _pump(self) -> None:
        if not self._opened:
            return
        self._connect()
        while self._handle is not None:
            try:
                data = os.read(self._handle, 64 * _EVENT.size)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"unplugged: {error.strerror}")
                return
            if not data:
                self._lose("unplugged")
            self._pad.feed(data)

    def _lose(self, why: str) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None
        self._pad.disconnect()
        self.fault = why
