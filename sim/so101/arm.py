"""The arm's physics: MuJoCo in steps of 1 ms, motors with limits, brakes, and what was extreme."""

import importlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from hal.drivers.so101_arm import JOINTS, MODEL
from sim.family import require
from sim.rendering import choose_backend

require("mujoco")
choose_backend()
mujoco: Any = importlib.import_module("mujoco")

STEP_S = 0.001
STEPS_PER_QUANTUM = 2
QUANTUM_S = STEP_S * STEPS_PER_QUANTUM
"""How often goals move and extremes are taken: time passes in whole quanta."""

MAX_SPEED_RAD_S = 4.71
REST_RAD = np.array([0.0, -1.40, 1.30, 0.80, 0.0, 0.15])
"""Folded, the forearm above the upper arm: a pose from which a fall is short."""

N = len(JOINTS)
_BRAKE_DAMPING = 1e4


@dataclass
class Peaks:
    """Extremes since they were last cleared, by joint.

    q_low_rad, q_high_rad: angles; dq_rad_s: greatest speed; step_rad: greatest jump of a powered
    motor's goal, from where it was or, when torque comes on, from where the joint is.
    """

    q_low_rad: np.ndarray
    q_high_rad: np.ndarray
    dq_rad_s: np.ndarray
    step_rad: np.ndarray

    @property
    def q_rad(self) -> np.ndarray:
        """Greatest magnitude of each angle."""
        return np.maximum(-self.q_low_rad, self.q_high_rad)

    @classmethod
    def start(cls, q_rad: np.ndarray, dq_rad_s: np.ndarray) -> "Peaks":
        """Extremes from this state on."""
        return cls(q_rad.copy(), q_rad.copy(), np.abs(dq_rad_s), np.zeros(N))

    def take(self, q_rad: np.ndarray, dq_rad_s: np.ndarray) -> None:
        """Count one more state."""
        np.minimum(self.q_low_rad, q_rad, out=self.q_low_rad)
        np.maximum(self.q_high_rad, q_rad, out=self.q_high_rad)
        np.maximum(self.dq_rad_s, np.abs(dq_rad_s), out=self.dq_rad_s)

    def copy(self) -> "Peaks":
        """The extremes so far."""
        return Peaks(*(getattr(self, field.name).copy() for field in fields(self)))


@dataclass
class ArmState:
    """True state by joint: angles, speeds, goals, motor torque as a share of stall, power."""

    t_s: float
    q_rad: np.ndarray
    dq_rad_s: np.ndarray
    goal_rad: np.ndarray
    load: np.ndarray
    powered: np.ndarray
    peaks: Peaks


@dataclass
class Motors:
    """What the motors may do, by joint. stiffness, damping: in units of the model's gains."""

    share: np.ndarray
    stiffness: np.ndarray
    damping: np.ndarray
    speed_rad_s: np.ndarray

    @classmethod
    def nominal(cls) -> "Motors":
        """Full torque, the model's gains, free speed."""
        return cls(np.ones(N), np.ones(N), np.ones(N), np.full(N, MAX_SPEED_RAD_S))


def load_model(*, cube: bool = False) -> Any:
    """The arm's model; with cube, a 25 mm cube with body and free joint "cube" lies before it."""
    spec = mujoco.MjSpec.from_file(str(MODEL))
    if cube:
        body = spec.worldbody.add_body(name="cube", pos=[0.25, 0.0, 0.0125])
        body.add_freejoint(name="cube")
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[0.0125] * 3,
            mass=0.02,
            friction=[1.2, 0.01, 0.0001],
            contype=2,
            conaffinity=3,
            rgba=[0.8, 0.15, 0.15, 1.0],
        )
    return spec.compile()


class Arm:
    """Six joints with motors; time passes only in `advance`. Joints come first in qpos and qvel.

    Gains, torque limits and brakes are parameters of `model` that this class changes.
    """

    def __init__(self, model: Any = None) -> None:
        self.model = load_model() if model is None else model
        self.data = mujoco.MjData(self.model)
        self._stall_nm = self.model.actuator_forcerange[:N, 1].copy()
        self._gain = self.model.actuator_gainprm[:N, 0].copy()
        self._damping = self.model.actuator_biasprm[:N, 2].copy()
        self._joint_damping = self.model.dof_damping[:N].copy()
        self._motors = Motors.nominal()
        self.place(REST_RAD)

    def place(self, q_rad: np.ndarray) -> None:
        """Start anew at rest at these angles, holding them."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:N] = q_rad
        self.goal_rad = np.array(q_rad, np.float64)
        self._command = self.goal_rad.copy()
        self.data.ctrl[:N] = self._command
        mujoco.mj_forward(self.model, self.data)
        self.clear_peaks()

    def drive(self, goal_rad: np.ndarray, motors: Motors | None = None) -> None:
        """Take new goals and, if given, new motor limits; a goal is approached at limited speed."""
        was_on = self._motors.share > 0
        if motors is not None:
            self._motors = motors
            model = self.model
            limit_nm = motors.share * self._stall_nm
            model.actuator_forcerange[:N, 0], model.actuator_forcerange[:N, 1] = -limit_nm, limit_nm
            model.actuator_gainprm[:N, 0] = motors.stiffness * self._gain
            model.actuator_biasprm[:N, 1] = -motors.stiffness * self._gain
            model.actuator_biasprm[:N, 2] = motors.damping * self._damping
        self._command = np.where(was_on, self._command, self.data.qpos[:N])
        before = np.where(was_on, self.goal_rad, self.data.qpos[:N])
        self.goal_rad = np.array(goal_rad, np.float64)
        jump = np.where(self._motors.share > 0, np.abs(self.goal_rad - before), 0.0)
        np.maximum(self.peaks.step_rad, jump, out=self.peaks.step_rad)

    def brake(self, joint: int, on: bool) -> None:
        """Block a joint, as something in its gears would, or free it."""
        self.model.dof_damping[joint] = _BRAKE_DAMPING if on else self._joint_damping[joint]

    def advance(self, quanta: int) -> None:
        """Let `quanta` times QUANTUM_S pass."""
        data, peaks = self.data, self.peaks
        q, dq = data.qpos[:N], data.qvel[:N]
        reach = self._motors.speed_rad_s * QUANTUM_S
        for _ in range(quanta):
            self._command += np.clip(self.goal_rad - self._command, -reach, reach)
            data.ctrl[:N] = self._command
            mujoco.mj_step(self.model, data, STEPS_PER_QUANTUM)
            peaks.take(q, dq)

    def state(self) -> ArmState:
        """True state; the arrays are copies."""
        data = self.data
        return ArmState(
            t_s=data.time,
            q_rad=data.qpos[:N].copy(),
            dq_rad_s=data.qvel[:N].copy(),
            goal_rad=self.goal_rad.copy(),
            load=data.actuator_force[:N] / self._stall_nm,
            powered=self._motors.share > 0,
            peaks=self.peaks.copy(),
        )

    def clear_peaks(self) -> None:
        """Take extremes from now on."""
        self.peaks = Peaks.start(self.data.qpos[:N], self.data.qvel[:N])
