"""A person at a robot: hands that move it, and a voice, the terminal's keys and the buttons."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from embodied.core.config import component
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.frames import Observation
from embodied.core.protocols import Event, Teleoperator
from embodied.core.specs import DeviceSpec
from hal.teleop.align import Alignment
from hal.teleop.asking import wait_for_person
from hal.teleop.gamepad import Gamepad
from hal.teleop.keyboard import Keyboard, KeyboardConfig, foreground_terminal

_WATCH_S = 0.02
_RETRY_S = 1.0


@runtime_checkable
class Begins(Protocol):
    """A teleoperator that needs to know what it moves, and when it starts anew."""

    def begin(self, spec: DeviceSpec) -> None:
        """Move a device of this spec from now on, from where it stands."""
        ...


class Session:
    """Teleoperator and operator in one: what rollouts and tasks are given.

    hands: what moves the robot; where it is not the keyboard, keyboard is for the voice. When the
    hands take over, the robot is led from where it stands to where they are at `speed`, a share of
    its velocity limits. Hands that fail do not take part until they can be opened again.
    on_estop: called from a thread of its own as soon as an emergency stop is signalled, whatever
    the thread that moves the robot is waiting for.
    """

    def __init__(
        self,
        hands: Teleoperator,
        *,
        keyboard: Keyboard | None = None,
        speed: float = 0.4,
        on_estop: Callable[[], None] = lambda: None,
    ) -> None:
        check_speed(speed, "align_speed")
        self.hands = hands
        self._voices: list[Keyboard | Gamepad] = [] if keyboard is None else [keyboard]
        if isinstance(hands, Keyboard | Gamepad):
            self._voices.append(hands)
        self._speed = speed
        self._on_estop = on_estop
        self._spec: DeviceSpec | None = None
        self._alignment: Alignment | None = None
        self._judgements: list[Event] = []
        self._controls: list[Event] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._lost = ""
        self._tried_s = 0.0
        self.engaged = False
        """Whether the person took part at the last `read`."""
        self.say: Callable[[str], None] = _write
        self.meanwhile: Callable[[], None] = lambda: None
        """Called again and again while `ask` waits."""

    @property
    def can_ask(self) -> bool:
        """Whether there is anything with which a person can answer."""
        return bool(self._voices)

    @property
    def keyboard(self) -> Keyboard | None:
        """The terminal's keyboard, if it is there."""
        return next((voice for voice in self._voices if isinstance(voice, Keyboard)), None)

    @property
    def state(self) -> str:
        """What the hands do now, in a few words."""
        fault = self._lost or getattr(self.hands, "fault", "")
        if fault:
            return f"not there: {fault}"
        if not self.engaged:
            return "let go"
        aligning = self._alignment is not None and self._alignment.running
        return "aligning" if aligning else "moving"

    def begin(self, spec: DeviceSpec) -> None:
        """Start anew on a device of this spec: another one, or another episode."""
        if spec != self._spec or self._alignment is None:
            self._spec = spec
            self._alignment = Alignment(spec, self._speed)
        self._alignment.begin()
        self.engaged = False
        if isinstance(self.hands, Begins):
            self.hands.begin(spec)

    def open(self) -> None:
        """Open hands and voice, and begin to watch for events."""
        try:
            for voice in self._voices:
                voice.open()
            if self.hands not in self._voices:
                self.hands.open()
        except BaseException:
            self.close()
            raise
        if self._voices:
            self._closing.clear()
            self._watcher = threading.Thread(target=self._watch, name="events", daemon=True)
            self._watcher.start()

    def read(self, observation: Observation) -> np.ndarray | None:
        """Action [D] for the coming tick; None while the person does not take part."""
        if self._alignment is None or self._spec is None:
            raise ConfigError("begin(spec) comes before read()")
        wanted_D = self._read_hands(observation)
        self.engaged = wanted_D is not None
        if wanted_D is None:
            self._alignment.let_go()
            return None
        if wanted_D.shape != self._spec.action.shape:
            raise ConfigError(
                f"teleoperator: its actions have shape {wanted_D.shape}; the device takes "
                f"{self._spec.action.shape} ({', '.join(self._spec.action.names)})"
            )
        return self._alignment.target(wanted_D, observation)

    def events(self) -> list[Event]:
        """Judgements (success, failure) since the last call."""
        with self._lock:
            found, self._judgements = self._judgements, []
        return found

    def controls(self) -> list[Event]:
        """Everything else that was signalled since the last call: rerecord, stop, estop."""
        with self._lock:
            found, self._controls = self._controls, []
        return found

    def ask(self, text: str) -> None:
        """Show a text and wait for Enter or the success button. Raises PersonStopped."""
        if not self.can_ask:
            raise ConfigError(f"nobody can answer: {text} Run it in a terminal")
        self.say(text)
        wait_for_person(self._everything, self.meanwhile)

    def close(self) -> None:
        """Let go of everything; safe to call twice."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        self.hands.close()
        for voice in self._voices:
            voice.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _everything(self) -> list[Event]:
        return [*self.events(), *self.controls()]

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH_S):
            for voice in self._voices:
                self._note(voice.events())

    def _note(self, events: list[Event]) -> None:
        for event in events:
            with self._lock:
                judged = event in ("success", "failure")
                (self._judgements if judged else self._controls).append(event)
            if event == "estop":
                try:
                    self._on_estop()
                except (EmbodiedError, OSError) as error:
                    self.say(f"the halt could not be latched ({error}): cut the power")

    def _read_hands(self, observation: Observation) -> np.ndarray | None:
        if self._lost and not self._found():
            return None
        try:
            wanted_D = self.hands.read(observation)
            if self.hands not in self._voices:
                self._note(self.hands.events())
        except ConfigError:
            raise
        except (EmbodiedError, OSError) as error:
            self._lost = str(error)
            with contextlib.suppress(EmbodiedError, OSError):
                self.hands.close()
            return None
        return wanted_D

    def _found(self) -> bool:
        """Open lost hands again, at most once a second."""
        now_s = time.monotonic()
        if now_s - self._tried_s < _RETRY_S:
            return False
        self._tried_s = now_s
        try:
            self.hands.open()
        except (EmbodiedError, OSError) as error:
            self._lost = str(error)
        else:
            self._lost = ""
        return not self._lost


def check_speed(speed: float, name: str) -> None:
    """Raise ConfigError for a share of the velocity limits that is none."""
    if not 0 < speed <= 1:
        raise ConfigError(f"{name} is {speed}; it must be above 0 and at most 1")


def make_session(
    teleoperator: Mapping[str, Any], *, speed: float, on_estop: Callable[[], None]
) -> Session:
    """A session by configuration, not open. The terminal, if there is one, is its voice."""
    found, options = component("teleoperators", teleoperator, "teleoperator")
    hands: Teleoperator = found(options)
    keyboard = None
    if not isinstance(hands, Keyboard) and not foreground_terminal(0):
        keyboard = Keyboard(KeyboardConfig())
    return Session(hands, keyboard=keyboard, speed=speed, on_estop=on_estop)


def _write(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
