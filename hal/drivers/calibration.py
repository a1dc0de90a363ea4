"""Calibration of an SO-101 arm, follower or leader, in LeRobot's file format."""

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.files import write_atomic
from hal.drivers.feetech import FeetechBus, decode_sign, encode_sign
from hal.drivers.so101_arm import JOINTS, SERVO_IDS, TICKS_PER_TURN

FULL_TURN = frozenset({"wrist_roll"})
"""Joints without end stops: their range is the whole turn."""

_IDS: dict[str, int] = {joint: servo for joint, servo in SERVO_IDS.items()}
_TAKES_EFFECT_S = 0.02
_HALF_TURN = (TICKS_PER_TURN - 1) // 2
_LEAST_TRAVEL = 300
_LIMITS, _PRESENT, _OFFSET, _OFFSET_SIGN = 9, 56, 31, 11
_MODE, _TORQUE, _LOCK = 33, 40, 55


class JointCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One servo of a calibration file, in encoder steps (4096 a turn).

    homing_offset: what the servo subtracts from its encoder. range_min, range_max: the ends of
    the joint's travel, measured after that.
    """

    id: int
    drive_mode: int
    homing_offset: int
    range_min: int
    range_max: int


Calibration = dict[str, JointCalibration]


def load(path: str | Path) -> Calibration:
    """The calibration file of an arm; ConfigError if it is missing, malformed or of another arm."""
    path = Path(path)
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except FileNotFoundError:
        raise ConfigError(f"no calibration file {path}; `embodied calibrate` makes one") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"calibration file {path} cannot be read: {error}") from error
    if calibration.keys() != _IDS.keys():
        raise ConfigError(
            f"calibration file {path} has the joints {', '.join(calibration)}; "
            f"an SO-101 has {', '.join(JOINTS)}"
        )
    for joint, row in calibration.items():
        if fault := _fault(joint, row):
            raise ConfigError(f"calibration file {path}: {joint}.{fault}")
    return calibration


def save(path: str | Path, calibration: Calibration) -> None:
    """Write a calibration file, whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(calibration), indent=4))


def stored(bus: FeetechBus) -> Calibration:
    """The calibration that the servos themselves hold."""
    ids = list(_IDS.values())
    limits = bus.sync_read(ids, _LIMITS, 4)
    offsets = bus.sync_read(ids, _OFFSET, 2)
    calibration: Calibration = {}
    for joint, servo in _IDS.items():
        low, high = np.frombuffer(limits[servo].data, "<u2").tolist()
        offset = int.from_bytes(offsets[servo].data, "little")
        calibration[joint] = JointCalibration(
            servo, 0, decode_sign(offset, _OFFSET_SIGN), low, high
        )
    return calibration


def differences(file: Calibration, servos: Calibration) -> list[str]:
    """What differs, as text, joint by joint; empty if nothing does."""
    return [
        f"{joint}.{field} is {getattr(servos[joint], field)} in the servo, "
        f"{getattr(file[joint], field)} in the file"
        for joint in JOINTS
        for field in ("homing_offset", "range_min", "range_max")
        if getattr(servos[joint], field) != getattr(file[joint], field)
    ]


def ranges(calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """range_min and range_max [6] in the order of JOINTS, float64."""
    low_D = np.array([calibration[joint].range_min for joint in JOINTS], np.float64)
    high_D = np.array([calibration[joint].range_max for joint in JOINTS], np.float64)
    return low_D, high_D


@dataclass(frozen=True, slots=True)
class JointRange:
    """Where a joint is and how far it has been moved, in encoder steps."""

    joint: str
    present: int
    low: int
    high: int
    enough: bool
    """Whether it has been moved far enough to be an arm's joint."""


class Calibrator:
    """The calibration of one arm, step by step, for whoever talks to the person.

    `release` (the arm goes limp: the person must hold it), the person moves every joint to the
    middle of its travel, `center`, the person moves every joint to both its ends while `sample`
    is called again and again, `finish`. Nothing asks or prints. Requests that fail raise
    DeviceLostError; every step may be repeated.
    """

    def __init__(self, bus: FeetechBus) -> None:
        self._bus = bus
        self._ids = list(_IDS.values())
        self._offsets: dict[str, int] | None = None
        self._present: dict[str, int] = {}
        self._low: dict[str, int] = {}
        self._high: dict[str, int] = {}

    def release(self) -> None:
        """Switch torque off, allow permanent settings, and choose position mode."""
        for servo in self._ids:
            self._bus.write(servo, _TORQUE, 1, 0)
            self._bus.write(servo, _LOCK, 1, 0)
            self._bus.write(servo, _MODE, 1, 0)

    def center(self) -> None:
        """Make the present pose the middle of every joint's turn (2047)."""
        self.release()
        for servo in self._ids:
            self._store(servo, offset=0, low=0, high=TICKS_PER_TURN - 1)
        time.sleep(_TAKES_EFFECT_S)
        # One step short of half a turn: the register has 11 bits and a sign.
        offsets = {
            joint: min(position - _HALF_TURN, _HALF_TURN)
            for joint, position in self._positions().items()
        }
        for joint, offset in offsets.items():
            self._bus.write(_IDS[joint], _OFFSET, 2, encode_sign(offset, _OFFSET_SIGN))
        time.sleep(_TAKES_EFFECT_S)
        self._offsets = offsets
        self._present = self._positions()
        self._low, self._high = dict(self._present), dict(self._present)

    def sample(self) -> list[JointRange]:
        """Read where the joints are and widen their ranges; the whole table, in joint order."""
        if self._offsets is None:
            raise EmbodiedError("calibration: call center() in the middle pose before sample()")
        present = self._positions()
        for joint, position in present.items():
            if joint in FULL_TURN:
                continue
            if abs(position - self._present[joint]) > TICKS_PER_TURN // 2:
                raise EmbodiedError(
                    f"calibration: {joint} has passed the end of its turn. It was not near the "
                    "middle of its travel when the middle was set; begin again"
                )
            self._low[joint] = min(self._low[joint], position)
            self._high[joint] = max(self._high[joint], position)
        self._present = present
        return [self._row(joint) for joint in JOINTS]

    def finish(self, path: str | Path) -> Calibration:
        """Store the ranges in the servos, check them, and write the file; torque stays off.

        Raises EmbodiedError, and stores nothing, if a joint has hardly been moved.
        """
        if self._offsets is None:
            raise EmbodiedError("calibration: call center() and sample() before finish()")
        still = [joint for joint in JOINTS if not self._row(joint).enough]
        if still:
            raise EmbodiedError(
                f"calibration: {', '.join(still)} moved less than {_LEAST_TRAVEL} steps; "
                "move every joint to both its ends"
            )
        calibration: Calibration = {}
        for joint, servo in _IDS.items():
            row = self._row(joint)
            offset = self._offsets[joint]
            calibration[joint] = JointCalibration(servo, 0, offset, row.low, row.high)
            self._store(servo, offset=offset, low=row.low, high=row.high)
            self._bus.write(servo, _LOCK, 1, 1)
        if unlike := differences(calibration, stored(self._bus)):
            raise EmbodiedError(f"calibration: a servo did not store it: {unlike[0]}; try again")
        save(path, calibration)
        return calibration

    def _row(self, joint: str) -> JointRange:
        if joint in FULL_TURN:
            return JointRange(joint, self._present[joint], 0, TICKS_PER_TURN - 1, True)
        low, high = self._low[joint], self._high[joint]
        return JointRange(joint, self._present[joint], low, high, high - low >= _LEAST_TRAVEL)

    def _positions(self) -> dict[str, int]:
        answers = self._bus.sync_read(self._ids, _PRESENT, 2)
        return {
            joint: decode_sign(int.from_bytes(answers[servo].data, "little"), 15)
            for joint, servo in _IDS.items()
        }

    def _store(self, servo: int, *, offset: int, low: int, high: int) -> None:
        self._bus.write(servo, _OFFSET, 2, encode_sign(offset, _OFFSET_SIGN))
        self._bus.write(servo, _LIMITS, 2, low)
        self._bus.write(servo, _LIMITS + 2, 2, high)


def _fault(joint: str, row: JointCalibration) -> str:
    if row.id != _IDS[joint]:
        return f"id is {row.id}; it must be {_IDS[joint]}"
    if row.drive_mode != 0:
        return f"drive_mode is {row.drive_mode}; only 0 is supported"
    if abs(row.homing_offset) >= 1 << _OFFSET_SIGN:
        return f"homing_offset is {row.homing_offset}; it must be within ±2047"
    if not 0 <= row.range_min < row.range_max < TICKS_PER_TURN:
        return f"range is {row.range_min}..{row.range_max}; it must grow, within 0..4095"
    return ""
