"""What keys mean, as a function of bytes and time: the part of the keyboard without a terminal.

A terminal tells of key presses, never of releases: a key counts as held for a moment after each
byte, and repeats while it is held down.
"""

from typing import Literal

import msgspec
import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.protocols import Event
from embodied.core.specs import DeviceSpec

_ESCAPE, _TAB = 0x1B, 0x09
_ESCAPE_S = 0.05
_EVENTS: dict[int, Event] = {
    0x0A: "success",
    0x0D: "success",
    ord("x"): "failure",
    0x7F: "failure",
    0x08: "failure",
    ord("u"): "rerecord",
    ord(" "): "estop",
}


class KeyboardConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """keys: for each action element the key that moves it up and the one that moves it down.

    step: how far an element moves a tick while its key is held. unit: of step, "share" of the
    element's range or "own", the action's own unit. push: on devices that are not
    position-controlled, the share of half the range that a key commands. held_s: a key counts as
    held for so long after its last repeat. engaged_s: the person takes part for so long.
    """

    keys: tuple[str, ...] = ("qa", "ws", "ed", "rf", "tg", "yh", "ik", "ol", "pm")
    step: float = 0.005
    unit: Literal["share", "own"] = "share"
    push: float = 0.5
    held_s: float = 0.12
    engaged_s: float = 0.3

    def __post_init__(self) -> None:
        for name in ("step", "push", "held_s", "engaged_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"keyboard.{name} is {getattr(self, name)}; it must be positive")
        seen: set[str] = set()
        for pair in self.keys:
            if len(pair) != 2 or not (pair.isascii() and pair.isprintable()):
                raise ConfigError(f"keyboard.keys: '{pair}' is no pair of keys such as 'qa'")
            for key in pair:
                if key.isupper() or ord(key) in _EVENTS:
                    raise ConfigError(
                        f"keyboard.keys: '{key}' in '{pair}' cannot move: take small letters "
                        "other than x and u, digits or signs"
                    )
                if key in seen:
                    raise ConfigError(f"keyboard.keys: '{key}' stands there twice")
                seen.add(key)

    def steps(self, spec: DeviceSpec) -> np.ndarray:
        """Movement [D] a tick in the action's unit; ConfigError if there are too few keys."""
        size = spec.action.size
        if len(self.keys) < size:
            raise ConfigError(
                f"keyboard.keys has {len(self.keys)} pairs; the device's action has {size} elements"
            )
        low_D, high_D = spec.action.bounds()
        return np.full(size, self.step) if self.unit == "own" else self.step * (high_D - low_D)

    def help(self, spec: DeviceSpec) -> str:
        """One line that says what the keys do on a device of this spec."""
        names = spec.action.names or tuple(str(k) for k in range(spec.action.size))
        pairs = self.keys[: len(names)]
        moves = " ".join(f"{p[0]}/{p[1]} {name}" for p, name in zip(pairs, names, strict=True))
        return f"{moves} · Tab take over/let go"


EVENT_HELP = "Enter success · x failure · u once more · Esc end · Space EMERGENCY STOP"


class Keys:
    """Bytes in; rates, engagement and events out. Times are seconds of one monotonic clock."""

    def __init__(self, config: KeyboardConfig) -> None:
        self._config = config
        self._last_s: dict[str, float] = {}
        self._moved_s = -np.inf
        self._escape_s: float | None = None
        self._sequence = False
        self._events: list[Event] = []
        self._movers = {key for pair in config.keys for key in pair}
        self.takeover = False
        """Whether the person has taken over until the next Tab."""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take bytes that have just been read."""
        self._expire(now_s)
        for byte in data:
            self._take(byte, now_s)

    def engaged(self, now_s: float) -> bool:
        """Whether the person takes part: for a moment after a movement key, or by Tab."""
        return self.takeover or now_s - self._moved_s < self._config.engaged_s

    def rates(self, size: int, now_s: float) -> np.ndarray:
        """Direction of each action element [D]: -1, 0 or 1."""
        held = {k for k, at_s in self._last_s.items() if now_s - at_s < self._config.held_s}
        pairs = self._config.keys[:size]
        return np.array([float(up in held) - float(down in held) for up, down in pairs])

    def events(self, now_s: float) -> list[Event]:
        """Events since the last call, oldest first."""
        self._expire(now_s)
        events, self._events = self._events, []
        return events

    def _expire(self, now_s: float) -> None:
        """An escape byte that nothing has followed for a moment was the Esc key."""
        if self._escape_s is not None and now_s - self._escape_s >= _ESCAPE_S:
            self._escape_s = None
            self._event("stop")

    def _take(self, byte: int, now_s: float) -> None:
        if self._sequence:
            self._sequence = not 0x40 <= byte <= 0x7E
            return
        if self._escape_s is not None:
            self._escape_s = None
            if byte in b"[O":
                self._sequence = True
                return
            self._event("stop")
        if byte == _ESCAPE:
            self._escape_s = now_s
        elif byte == _TAB:
            self.takeover = not self.takeover
            self._moved_s = -np.inf
        elif (key := chr(byte).lower()) in self._movers:
            self._last_s[key] = self._moved_s = now_s
        elif (event := _EVENTS.get(ord(key))) is not None:
            self._event(event)

    def _event(self, event: Event) -> None:
        self._events.append(event)
        if event in ("stop", "estop"):
            self.takeover = False
            self._moved_s = -np.inf
