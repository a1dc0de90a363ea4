"""The SO-101 arm as numbers: joints, servo ids, limits, kinematic model.

Angles are radians. The middle of a joint's calibrated range is the middle of its limits: zero for
all but the gripper, which opens with growing angle. Velocity and acceleration limits leave the
STS3215 servos (12 V) a wide margin.
"""

from pathlib import Path

import numpy as np

from embodied.core.specs import ArraySpec, DeviceSpec, MotionSpec

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
SERVO_IDS = dict(zip(JOINTS, range(1, 7), strict=True))
LOW_RAD = (-1.92, -1.75, -1.69, -1.66, -2.79, -0.17)
HIGH_RAD = (1.92, 1.75, 1.69, 1.66, 2.79, 1.75)
MODEL = Path(__file__).with_name("so101.xml")
"""MJCF of the arm: joints named as in JOINTS, in that order; site "tool" between the fingers."""

_MIDDLE_RAD = (np.array(LOW_RAD) + np.array(HIGH_RAD)) / 2
TICKS_PER_TURN = 4096

SPEC = DeviceSpec(
    observation={"observation.state": ArraySpec((6,), unit="rad", names=JOINTS)},
    action=ArraySpec((6,), low=LOW_RAD, high=HIGH_RAD, unit="rad", names=JOINTS),
    tick_hz=50.0,
    motion=MotionSpec(
        velocity=(2.5,) * 6, acceleration=(20.0,) * 6, jerk=(400.0,) * 6, servo_hz=100.0
    ),
)


def radians(raw_D: np.ndarray, low_D: np.ndarray, high_D: np.ndarray) -> np.ndarray:
    """Joint angles [6] of raw servo positions, given the calibrated ranges."""
    return (raw_D - (low_D + high_D) / 2) * (2 * np.pi / TICKS_PER_TURN) + _MIDDLE_RAD


def raw_positions(angle_D: np.ndarray, low_D: np.ndarray, high_D: np.ndarray) -> np.ndarray:
    """Raw servo positions of joint angles: the inverse of `radians`, rounded and kept in range."""
    from_middle_D = (angle_D - _MIDDLE_RAD) * (TICKS_PER_TURN / (2 * np.pi))
    raw_D = np.rint(from_middle_D + (low_D + high_D) / 2)
    return np.clip(raw_D, low_D, high_D).astype(np.int64)
