"""What a virtual arm's control channel understands, and what it answers."""

from typing import Annotated

import msgspec
import numpy as np

from sim.so101.arm import ArmState, Peaks
from sim.so101.bus import Faults
from sim.so101.servo import ServoFault

Angle = Annotated[float, msgspec.Meta(ge=-3.2, le=3.2)]


class SetFaults(msgspec.Struct, frozen=True, tag="faults", forbid_unknown_fields=True):
    """Make the bus this unreliable from now on."""

    faults: Faults


class SetPlug(msgspec.Struct, frozen=True, tag="plug", forbid_unknown_fields=True):
    """Plug the USB adapter in or out."""

    on: bool


class SetPower(msgspec.Struct, frozen=True, tag="power", forbid_unknown_fields=True):
    """Switch the servos' supply."""

    on: bool


class SetServoFault(msgspec.Struct, frozen=True, tag="servo_fault", forbid_unknown_fields=True):
    """Bring about a fault of one servo or end it."""

    joint: str
    kind: ServoFault
    on: bool


class Lead(msgspec.Struct, frozen=True, tag="lead", forbid_unknown_fields=True):
    """A leader's pose (6 angles), and the greatest excursion of its motion about it."""

    pose_rad: Annotated[tuple[Angle, ...], msgspec.Meta(min_length=6, max_length=6)]
    amplitude_rad: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0


class ClearPeaks(msgspec.Struct, frozen=True, tag="clear_peaks", forbid_unknown_fields=True):
    """Take extremes from now on."""


class ReadState(msgspec.Struct, frozen=True, tag="read", forbid_unknown_fields=True):
    """Ask for the true state; every other request is answered with it too."""


Request = SetFaults | SetPlug | SetPower | SetServoFault | Lead | ClearPeaks | ReadState


class State(msgspec.Struct, frozen=True, tag="state", forbid_unknown_fields=True):
    """The answer; the arrays travel beside it.

    t_s: the arm's time. executed: instructions carried out on the bus. bad: packets that came
    damaged from the host. camera_port: of the pictures' HTTP server, None without one.
    """

    t_s: float
    plugged: bool
    powered: bool
    executed: int
    bad: int
    camera_port: int | None


_ARRAYS = ("q_rad", "dq_rad_s", "goal_rad", "load", "powered")
_PEAKS = ("q_low_rad", "q_high_rad", "dq_rad_s", "step_rad")


def to_arrays(state: ArmState) -> dict[str, np.ndarray]:
    """The arrays of a state, by name."""
    arrays = {name: getattr(state, name) for name in _ARRAYS}
    return arrays | {f"peaks.{name}": getattr(state.peaks, name) for name in _PEAKS}


def from_arrays(t_s: float, arrays: dict[str, np.ndarray]) -> ArmState:
    """The state that `to_arrays` took apart."""
    peaks = Peaks(**{name: arrays[f"peaks.{name}"].copy() for name in _PEAKS})
    return ArmState(t_s, **{name: arrays[name].copy() for name in _ARRAYS}, peaks=peaks)
