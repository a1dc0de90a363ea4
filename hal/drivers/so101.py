"""The SO-101 arm on its servo bus: the follower as a driver, the leader as a teleoperator."""

import contextlib
from collections.abc import Mapping
from typing import ClassVar

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, DeviceLostError
from embodied.core.frames import Observation
from embodied.core.protocols import Condition, Event
from embodied.core.specs import DeviceSpec
from hal.drivers import calibration as calibrations
from hal.drivers.feetech import OVERLOAD, STS3215, Answer, FeetechBus, faults
from hal.drivers.so101_arm import (
    HIGH_RAD,
    JOINTS,
    LOW_RAD,
    SERVO_IDS,
    SPEC,
    radians,
    raw_positions,
)

_IDS: tuple[int, ...] = tuple(SERVO_IDS.values())
_NAMES: dict[int, str] = {servo: joint for joint, servo in SERVO_IDS.items()}
_GRIPPER = SERVO_IDS["gripper"]

_MODEL, _MODE, _TORQUE, _GOAL, _LOCK, _PRESENT = 3, 33, 40, 42, 55, 56
_MEASURED = np.dtype(
    [
        ("position", "<u2"),
        ("velocity", "<u2"),
        ("load", "<u2"),
        ("voltage", "u1"),
        ("celsius", "u1"),
    ]
)
_BLOCKS = ((_MODEL, 21), (28, 9), (_TORQUE, 16), (85, 1))
_EEPROM_END = 40
_FACTORY = 80
_TORQUE_CHECK_EVERY = 10
_OPENING_ANSWER_MS = 10.0


class SO101Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """port: serial port of the arm. calibration: its file, as `embodied calibrate` writes it.

    torque_off_on_close: let the arm go limp when closed; it falls. p, i, d: position gains of the
    servos. max_temperature_c: a hotter servo is a fault. overload_is_normal: joints whose servo
    may stop itself under load without that being a fault: a gripper that holds something does.
    retries, answer_ms: see FeetechBus.
    """

    port: str
    calibration: str
    torque_off_on_close: bool = False
    baudrate: int = 1_000_000
    p: int = 16
    i: int = 0
    d: int = 32
    max_temperature_c: float = 65.0
    overload_is_normal: tuple[str, ...] = ("gripper",)
    retries: int = 2
    answer_ms: float = 4.0

    def __post_init__(self) -> None:
        for name in ("p", "i", "d"):
            if not 0 <= getattr(self, name) <= 254:
                raise ConfigError(f"so101.{name} is {getattr(self, name)}; it must be 0 to 254")
        _check_bus(self.retries, self.answer_ms)
        if unknown := set(self.overload_is_normal) - set(JOINTS):
            raise ConfigError(
                f"so101.overload_is_normal: no joint {', '.join(sorted(unknown))}; "
                f"the joints are {', '.join(JOINTS)}"
            )


class SO101:
    """Driver of a follower arm. It never lets the arm drop, nor jump.

    `open` leaves torque as it is where it is on, with the goal that the servos have, and switches
    it on where it is off with the measured position as goal. `close` holds and leaves torque on.
    All angles are radians; see so101_arm. The condition names joint and fault when a servo
    reports one or is too hot. Raises DeviceLostError if servos do not answer or lost torque.
    """

    Config: ClassVar = SO101Config

    def __init__(self, config: SO101Config) -> None:
        self.spec: DeviceSpec = SPEC
        self._config = config
        self._bus = FeetechBus(
            config.port,
            baudrate=config.baudrate,
            retries=config.retries,
            answer_ms=config.answer_ms,
            names=_NAMES,
        )
        self._normal = {SERVO_IDS[j]: OVERLOAD for j in JOINTS if j in config.overload_is_normal}
        self._low_D = self._high_D = np.zeros(len(_IDS))
        self._held: dict[int, int] | None = None
        self._senses = 1
        self._condition = Condition()

    def open(self) -> None:
        """Connect, check servos and calibration, configure, and have every joint hold.

        Raises ConfigError if the calibration file does not fit the servos.
        """
        file = calibrations.load(self._config.calibration)
        self._low_D, self._high_D = calibrations.ranges(file)
        self._bus.open()
        try:
            self._bus.answer_ms = max(self._config.answer_ms, _OPENING_ANSWER_MS)
            registers = _registers(self._bus)
            _check_calibration(self._bus, file, self._config.calibration)
            self._engage(registers)
            self._bus.answer_ms = self._config.answer_ms
        except BaseException:
            self._bus.close()
            raise
        self._held = None
        self._senses = 1

    def sense(self) -> Observation:
        """observation.state: joint angles [6], rad, float32. One request to all servos.

        Every tenth time a second one asks whether torque is still on, until it is.
        """
        answers = self._bus.sync_read(_IDS, _PRESENT, _MEASURED.itemsize)
        measured = np.frombuffer(b"".join(answers[servo].data for servo in _IDS), _MEASURED)
        load = measured["load"] & 0x3FF
        self._condition = Condition(
            temperature_c=float(measured["celsius"].max()),
            load=float(load.max()) / 1000,
            voltage_v=float(measured["voltage"].min()) / 10,
            retries=self._bus.repeated,
            fault=self._fault(answers, measured["celsius"]),
        )
        if self._senses % _TORQUE_CHECK_EVERY == 0:
            self._check_torque()
        self._senses += 1
        angles_D = radians(_signed(measured["position"]), self._low_D, self._high_D)
        return {"observation.state": angles_D.astype(np.float32)}

    def drive(self, action_D: np.ndarray) -> None:
        """Set the servos' goals: joint angles [6], rad. One request, not acknowledged."""
        self._held = None
        raw_D = raw_positions(np.asarray(action_D, np.float64), self._low_D, self._high_D)
        self._bus.sync_write(_GOAL, 2, dict(zip(_IDS, raw_D.tolist(), strict=True)))

    def hold(self) -> None:
        """Make the measured position the goal; again and again, the same goal.

        A goal measured anew each time would sink, because gravity keeps every joint below its goal.
        """
        if self._held is not None:
            self._bus.sync_write(_GOAL, 2, self._held)
            return
        present = self._present()
        self._set_goals(present)
        self._held = present

    def close(self) -> None:
        """Hold, let torque go if so configured, and disconnect."""
        if not self._bus.is_open:
            return
        with contextlib.suppress(DeviceLostError):
            if self._config.torque_off_on_close:
                for servo in _IDS:
                    self._bus.write(servo, _TORQUE, 1, 0)
            else:
                self.hold()
        self._bus.close()

    def condition(self) -> Condition:
        """Hottest servo, greatest load as a share of stall torque, lowest voltage."""
        return self._condition

    def _present(self) -> dict[int, int]:
        answers = self._bus.sync_read(_IDS, _PRESENT, 2)
        position_D = _signed(np.frombuffer(b"".join(answers[s].data for s in _IDS), "<u2"))
        goal_D = np.clip(position_D, self._low_D, self._high_D).astype(np.int64)
        return dict(zip(_IDS, goal_D.tolist(), strict=True))

    def _set_goals(self, goals: Mapping[int, int]) -> None:
        """Set goals and see that they have arrived."""
        for _ in range(self._config.retries + 1):
            self._bus.sync_write(_GOAL, 2, goals)
            answers = self._bus.sync_read(list(goals), _GOAL, 2)
            if all(int.from_bytes(answers[s].data, "little") == g for s, g in goals.items()):
                return
            self._bus.repeated += 1
        raise DeviceLostError(f"{self._bus.port}: the servos do not take a goal position")

    def _engage(self, registers: Mapping[int, Mapping[int, int]]) -> None:
        """Configure the servos, and switch torque on where it is off, without a movement."""
        limp = [servo for servo in _IDS if registers[servo][_TORQUE] != 1]
        stray = [servo for servo in _IDS if registers[servo][_MODE] != 0]
        if limp or stray:
            present = self._present()
            self._set_goals({servo: present[servo] for servo in {*limp, *stray}})
        self._configure(registers)
        for servo in limp:
            self._bus.write(servo, _TORQUE, 1, 1)

    def _configure(self, registers: Mapping[int, Mapping[int, int]]) -> None:
        """Write the settings that differ; the permanent ones wear the servo's memory out."""
        config = self._config
        everyone = {
            (7, 1): 0,
            (21, 1): config.p,
            (22, 1): config.d,
            (23, 1): config.i,
            (_MODE, 1): 0,
            (41, 1): 254,
            (85, 1): 254,
        }
        gripper = {(16, 2): 500, (28, 2): 250, (36, 1): 25}
        for servo in _IDS:
            wanted = everyone | gripper if servo == _GRIPPER else everyone
            unlike = {
                (address, size): value
                for (address, size), value in wanted.items()
                if _value(registers[servo], address, size) != value
            }
            permanent = any(not _EEPROM_END <= address < _FACTORY for address, _ in unlike)
            if permanent:
                self._bus.write(servo, _LOCK, 1, 0)
            for (address, size), value in unlike.items():
                self._bus.write(servo, address, size, value)
            if permanent or registers[servo][_LOCK] != 1:
                self._bus.write(servo, _LOCK, 1, 1)

    def _fault(self, answers: Mapping[int, Answer], celsius: np.ndarray) -> str:
        found: list[str] = []
        for servo, degrees in zip(_IDS, celsius.tolist(), strict=True):
            status = answers[servo].status & ~self._normal.get(servo, 0)
            found += [f"{_NAMES[servo]}: {name}" for name in faults(status)]
            if degrees > self._config.max_temperature_c:
                limit = self._config.max_temperature_c
                found.append(f"{_NAMES[servo]}: {degrees} °C, more than {limit:g} °C")
        return "; ".join(found)

    def _check_torque(self) -> None:
        answers = self._bus.sync_read(_IDS, _TORQUE, 1)
        limp = [_NAMES[servo] for servo in _IDS if answers[servo].data != b"\x01"]
        if limp:
            raise DeviceLostError(
                f"{self._bus.port}: {', '.join(limp)} lost torque; did the power supply dip?"
            )


class SO101Leader:
    """Teleoperator: a leader arm that a person moves, its torque off.

    `read` gives joint angles [6], rad, float32, within the follower's bounds. The gripper's handle
    travels less than the follower's gripper: its calibrated range is spread over those bounds.
    Errors as those of SO101.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """port: serial port of the leader. calibration: its file. The rest: see FeetechBus."""

        port: str
        calibration: str
        baudrate: int = 1_000_000
        retries: int = 2
        answer_ms: float = 4.0

        def __post_init__(self) -> None:
            _check_bus(self.retries, self.answer_ms)

    def __init__(self, config: Config) -> None:
        self._config = config
        self._bus = FeetechBus(
            config.port,
            baudrate=config.baudrate,
            retries=config.retries,
            answer_ms=config.answer_ms,
            names=_NAMES,
        )
        self._low_D = self._high_D = np.zeros(len(_IDS))

    def open(self) -> None:
        """Connect, check servos and calibration, switch torque off."""
        file = calibrations.load(self._config.calibration)
        self._low_D, self._high_D = calibrations.ranges(file)
        self._bus.open()
        try:
            self._bus.answer_ms = max(self._config.answer_ms, _OPENING_ANSWER_MS)
            _registers(self._bus)
            _check_calibration(self._bus, file, self._config.calibration)
            for servo in _IDS:
                self._bus.write(servo, _TORQUE, 1, 0)
            self._bus.answer_ms = self._config.answer_ms
        except BaseException:
            self._bus.close()
            raise

    def read(self, observation: Observation) -> np.ndarray | None:
        """Where the person has moved the leader to."""
        answers = self._bus.sync_read(_IDS, _PRESENT, 2)
        raw_D = _signed(np.frombuffer(b"".join(answers[s].data for s in _IDS), "<u2"))
        angles_D = radians(raw_D, self._low_D, self._high_D)
        share = (raw_D[-1] - self._low_D[-1]) / (self._high_D[-1] - self._low_D[-1])
        angles_D[-1] = LOW_RAD[-1] + share * (HIGH_RAD[-1] - LOW_RAD[-1])
        return np.clip(angles_D, LOW_RAD, HIGH_RAD).astype(np.float32)

    def events(self) -> list[Event]:
        """A leader arm has no buttons."""
        return []

    def close(self) -> None:
        """Disconnect; the arm stays limp."""
        self._bus.close()


def _check_bus(retries: int, answer_ms: float) -> None:
    if not 0 <= retries <= 10:
        raise ConfigError(f"so101.retries is {retries}; it must be 0 to 10")
    if not 0.5 <= answer_ms <= 1000:
        raise ConfigError(f"so101.answer_ms is {answer_ms}; it must be 0.5 to 1000")


def _registers(bus: FeetechBus) -> dict[int, dict[int, int]]:
    """Bytes of the settings by servo and address; all six must answer and be STS3215."""
    table: dict[int, dict[int, int]] = {servo: {} for servo in _IDS}
    for address, size in _BLOCKS:
        for servo, answer in bus.sync_read(_IDS, address, size).items():
            table[servo].update(enumerate(answer.data, address))
    for servo in _IDS:
        model = _value(table[servo], _MODEL, 2)
        if model != STS3215:
            raise ConfigError(
                f"{bus.port}: servo {servo} ({_NAMES[servo]}) is model {model}; "
                f"an SO-101 has STS3215 servos (model {STS3215})"
            )
    return table


def _check_calibration(bus: FeetechBus, file: calibrations.Calibration, path: str) -> None:
    unlike = calibrations.differences(file, calibrations.stored(bus))
    if unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise ConfigError(
            f"{bus.port}: the arm is not the one of calibration file {path}: {unlike[0]}{more}. "
            "Name the file of this arm, or run `embodied calibrate` on it"
        )


def _value(registers: Mapping[int, int], address: int, size: int) -> int:
    return sum(registers[address + k] << (8 * k) for k in range(size))


def _signed(raw_D: np.ndarray) -> np.ndarray:
    magnitude_D = (raw_D & 0x7FFF).astype(np.int64)
    return np.where(raw_D & 0x8000, -magnitude_D, magnitude_D)
