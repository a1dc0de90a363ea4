"""Scripted OSC_POSE experts and seeded resets for single-arm Panda tasks of robosuite 1.5.1.

An expert is a proportional servo on the observation with one phase variable. After ``reset()`` the
phase is inferred from the next observation alone, so an expert may take over in mid-episode. For
the Panda's default BASIC composite controller (OSC_POSE deltas along the world's axes) at 20 Hz.
Lengths are in metres, angles in radians, quaternions (x, y, z, w), positions in the world frame.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray

GAIN = np.repeat((12.0, 1.5), 3)  # action per m and rad; an action of 1 gives 0.31 m/s, 3.1 rad/s
OPEN, CLOSE = -1.0, 1.0
OPEN_GAP = 0.07  # the gripper counts as open above this; its stop is at 0.08
GRASP_STEPS = (10, 25)  # steps until closed fingers press hard, until a grasp is given up

# Modified Denavit-Hartenberg parameters of the Panda; the last offset ends at the grip site.
DH_LENGTH = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088)
DH_OFFSET = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.204)
DH_TWIST = np.array((0.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0)) * np.pi / 2
JOINT_LOW = np.array((-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973))
JOINT_HIGH = np.array((2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973))
JOINT_HOME = np.array((0.0, np.pi / 16, 0.0, -5 * np.pi / 6, 0.0, np.pi - 0.2, np.pi / 4))


@contextmanager
def seeded_numpy(seed: int) -> Generator[None]:
    """Seed NumPy's legacy global generator for a while, then put its state back.

    robosuite 1.5.1 draws placements, joint noise and, when it is made, the size of Lift's cube from
    there; ``env.rng`` and the ``seed`` argument do nothing.
    """
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def seed_reset(env: Any, seed: int) -> dict[str, np.ndarray]:
    """Reset ``env`` to the initial state that belongs to ``seed``; return its first observation."""
    with seeded_numpy(seed):
        return dict(env.reset())


Phase = Enum("Phase", "REACH GRASP CARRY RELEASE UNWIND")  # last: away from a joint limit


@dataclass(frozen=True)
class Scene:
    """One observation, in the quantities the control law uses."""

    joints: Array  # arm joint angles, [7]
    eef: Array  # grip site position, [3]
    rotation: Array  # hand frame: x forward, y closing axis, z approach, [3, 3]
    gap: float  # distance between the finger pads
    object: Array  # object body position, [3]
    object_rotation: Array  # [3, 3]
    support: Array  # position of the object to stack on; the object's own elsewhere, [3]


def rotation_matrix(quaternion: np.ndarray) -> Array:
    """Rotation matrix [3, 3] of a unit quaternion (x, y, z, w)."""
    v, w = np.asarray(quaternion[:3], dtype=np.float64), float(quaternion[3])
    return (w * w - v @ v) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * np.cross(np.eye(3), v)


def heading(vector: Array) -> float:
    """Angle of a vector's horizontal part from the world's x axis."""
    return float(np.arctan2(vector[1], vector[0]))


def nearest_angle(angle: float, period: float, reference: float) -> float:
    """Of ``angle + k * period``, the one nearest to ``reference``."""
    return angle + period * float(np.round((reference - angle) / period))


def ramp(value: float, low: float, high: float) -> float:
    """0 below ``low``, 1 above ``high``, smooth (C1) in between."""
    t = float(np.clip((value - low) / (high - low), 0.0, 1.0))
    return t * t * (3.0 - 2.0 * t)


def turn_to(yaw: float, rotation: Array) -> Array:
    """Rotation vector that turns the hand to pointing down at ``yaw``; its norm is sin(angle)."""
    c, s = np.cos(yaw), np.sin(yaw)
    target = np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])
    return 0.5 * np.cross(rotation.T, target.T).sum(axis=0)


def jacobian(joints: Array) -> Array:
    """Geometric Jacobian [6, 7] of the Panda's grip site, linear rows first."""
    rotation, position, origins, axes = np.eye(3), np.zeros(3), [], []
    for length, offset, twist, angle in zip(DH_LENGTH, DH_OFFSET, DH_TWIST, joints, strict=True):
        position = position + length * rotation[:, 0]
        ct, st, ca, sa = np.cos(angle), np.sin(angle), np.cos(twist), np.sin(twist)
        rotation = rotation @ [[ct, -st, 0.0], [ca * st, ca * ct, -sa], [sa * st, sa * ct, ca]]
        position = position + offset * rotation[:, 2]
        origins.append(position)
        axes.append(rotation[:, 2])
    return np.vstack([np.cross(axes, position - np.array(origins)).T, np.array(axes).T])


class Expert:
    """Pick up one object and bring it to a goal; the tasks give the geometry."""

    object_name: ClassVar[str]
    support_name: ClassVar[str | None] = None
    target: ClassVar[tuple[float, float, float]]  # goal of the object's body, where it is fixed
    object_width: ClassVar[float]  # gap of the fingers once they hold the object
    long_axis: ClassVar[int | None] = None  # axis of the object to grip across; None for a cube
    yaw_period: ClassVar[float] = np.pi / 2  # grasps a period apart are equivalent
    # Height to travel at above the grasp or goal; horizontal errors that end and begin the descent
    reach_path: ClassVar[tuple[float, float, float]] = (0.08, 0.008, 0.04)
    carry_path: ClassVar[tuple[float, float, float]] = (0.06, 0.006, 0.03)
    grip_box: ClassVar[tuple[float, float, float]] = (0.022, 0.02, 0.025)  # half sizes, hand frame
    place_box: ClassVar[tuple[float, float]]  # release within: radius, height above the goal
    goal_box: ClassVar[tuple[float, float]]  # never grasp again within, likewise

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the episode; the next observation may be any state of the task."""
        self._phase: Phase | None = None
        self._yaw = 0.0  # hand yaw to hold
        self._steps = 0  # since the phase was entered
        self._anchor = np.zeros(3)
        self._gripper = OPEN

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Action for ``observation``: position, rotation, gripper; float32 [7] in [-1, 1]."""
        fingers = observation["robot0_gripper_qpos"]
        scene = Scene(
            joints=np.asarray(observation["robot0_joint_pos"], dtype=np.float64),
            eef=np.asarray(observation["robot0_eef_pos"], dtype=np.float64),
            rotation=rotation_matrix(observation["robot0_eef_quat"]),
            gap=float(fingers[0] - fingers[1]),
            object=np.asarray(observation[f"{self.object_name}_pos"], dtype=np.float64),
            object_rotation=rotation_matrix(observation[f"{self.object_name}_quat"]),
            support=np.asarray(observation[f"{self.support_name or self.object_name}_pos"]),
        )
        self._phase = self._next_phase(scene)
        if self._phase is Phase.UNWIND:
            arm = GAIN * (jacobian(scene.joints) @ (JOINT_HOME - scene.joints))
        else:
            self._gripper = CLOSE if self._phase in (Phase.GRASP, Phase.CARRY) else OPEN
            move, turn = self._displacement(scene), turn_to(self._yaw, scene.rotation)
            arm = GAIN * np.concatenate([move, turn])
        arm /= max(1.0, float(np.abs(arm).max()))
        return np.array([*arm, self._gripper], dtype=np.float32)

    def _grasp_point(self, scene: Scene) -> Array:
        return scene.object  # where the grip site belongs, [3]

    def _grasp_yaw(self, scene: Scene) -> float:
        """Hand yaw of a good grasp, up to ``yaw_period``."""
        rises = np.abs(scene.object_rotation[2])
        axis = int(np.argmin(rises)) if self.long_axis is None else self.long_axis
        return heading(scene.object_rotation[:, axis]) if rises[axis] < 0.7 else self._yaw

    def _preferred_yaw(self, scene: Scene) -> float:
        return 0.0  # picks among the equivalent grasps; the hand's yaw in the initial posture

    def _goal(self, scene: Scene) -> Array:
        return np.array(self.target)  # of the object's body position, [3]

    def _carry_yaw(self, scene: Scene) -> float:
        return self._yaw  # asked for when carrying begins

    def _within(self, scene: Scene, box: tuple[float, float]) -> bool:
        offset = scene.object - self._goal(scene)
        return bool(np.hypot(offset[0], offset[1]) < box[0] and offset[2] < box[1])

    def _in_grip(self, scene: Scene, slack: float = 1.0) -> bool:
        """Whether the grasp point lies between the fingers, a gap of the object's width apart."""
        offset = scene.rotation.T @ (self._grasp_point(scene) - scene.eef)
        between = bool(np.all(np.abs(offset) < slack * np.array(self.grip_box)))
        return between and abs(scene.gap - self.object_width) < slack * 0.007

    def _enter(self, phase: Phase, scene: Scene) -> Phase:
        self._steps, self._anchor = 0, scene.eef
        if phase is Phase.REACH:
            self._yaw = self._preferred_yaw(scene)
        elif phase is Phase.CARRY:
            self._yaw = self._carry_yaw(scene)
        return phase

    def _next_phase(self, scene: Scene) -> Phase:
        phase = self._phase
        if phase is Phase.UNWIND and np.abs(scene.joints - JOINT_HOME)[[2, 4, 5, 6]].max() < 0.6:
            phase = None
        if phase is None:
            held = self._in_grip(scene)
            self._yaw, self._gripper = heading(scene.rotation[:, 0]), CLOSE if held else OPEN
            phase = self._enter(Phase.GRASP if held else Phase.REACH, scene)
        self._steps += 1
        apart = scene.eef - self._grasp_point(scene)
        sideways = np.hypot(apart[0], apart[1])
        if phase in (Phase.REACH, Phase.GRASP) and self._within(scene, self.goal_box):
            return Phase.RELEASE
        margin = min((scene.joints - JOINT_LOW).min(), (JOINT_HIGH - scene.joints).min())
        if phase in (Phase.REACH, Phase.GRASP, Phase.CARRY) and margin < 0.01:
            return Phase.UNWIND
        if phase is Phase.REACH:
            if sideways < 0.01 and abs(apart[2]) < 0.008 and scene.gap > OPEN_GAP:
                return self._enter(Phase.GRASP, scene)
        elif phase is Phase.GRASP:
            if self._in_grip(scene, slack=1.3) and self._steps > GRASP_STEPS[0]:
                return self._enter(Phase.CARRY, scene)
            if scene.gap < 0.7 * self.object_width or self._steps > GRASP_STEPS[1]:
                return self._enter(Phase.REACH, scene)
        elif phase is Phase.CARRY:
            if not self._in_grip(scene, slack=1.8):
                return self._enter(Phase.REACH, scene)
            if self._within(scene, self.place_box):
                return Phase.RELEASE
        elif phase is Phase.RELEASE and not self._within(scene, self.goal_box):
            return self._enter(Phase.REACH, scene) if max(apart[2], sideways) > 0.05 else phase
        return phase

    def _displacement(self, scene: Scene) -> Array:
        """Where to move the hand in the current phase: up, across, then down; updates the yaw."""
        error = self._grasp_point(scene) - scene.eef
        if self._phase is Phase.GRASP:
            return self._anchor - scene.eef
        if self._phase is Phase.RELEASE:
            freed = ramp(scene.gap, self.object_width + 0.006, self.object_width + 0.016)
            return np.array([0.0, 0.0, freed * (error[2] + 0.12)])
        if self._phase is Phase.REACH:
            self._yaw = nearest_angle(self._grasp_yaw(scene), self.yaw_period, self._yaw)
            (clearance, near, far), closed = self.reach_path, 1.0 - ramp(scene.gap, 0.05, OPEN_GAP)
        else:
            (clearance, near, far), closed = self.carry_path, 0.0
            error = self._goal(scene) - scene.object
        turned = ramp(float(np.linalg.norm(turn_to(self._yaw, scene.rotation))), 0.1, 0.4)
        away = ramp(float(np.hypot(error[0], error[1])), near, far)
        error[:2] *= max(1.0 - away, ramp(-error[2], clearance - 0.04, clearance - 0.01))
        error[2] += clearance * max(away, turned, closed)
        return error


class LiftExpert(Expert):
    """Lift: hold the cube 0.12 above the table, whose top is at 0.8 (``Lift.table_offset``)."""

    object_name = "cube"
    object_width = 0.042  # edges are drawn from 0.040..0.044 when the model is built
    place_box = goal_box = (0.0, 0.0)  # never let go

    def _goal(self, scene: Scene) -> Array:
        return np.array([scene.object[0], scene.object[1], 0.92])


class PickPlaceCanExpert(Expert):
    """PickPlaceCan: drop the can into its quarter of bin 2 (``PickPlace.not_in_bin``, id 3).

    ``target`` is nearer than that quarter's middle, where the arm is stretched out and powerless.
    """

    object_name = "Can"
    target = (0.15, 0.355, 0.88)
    object_width = 0.05
    long_axis = 2
    yaw_period = np.pi
    grip_box = (0.03, 0.02, 0.04)
    carry_path = (0.105, 0.02, 0.06)  # the bins' walls end at 0.9, a can 0.041 below its centre
    place_box = (0.025, 0.02)
    goal_box = (0.06, 0.015)

    def _grasp_point(self, scene: Scene) -> Array:
        return scene.object + np.array([0.0, 0.0, 0.012 * abs(scene.object_rotation[2, 2])])

    def _preferred_yaw(self, scene: Scene) -> float:
        walls = np.abs(scene.object[1] - np.array([-0.5, 0.0, 0.03, 0.28, 0.53]))
        return np.pi / 2 if walls.min() < 0.08 else 0.0  # keeps the fingers off the bins' walls


class StackExpert(Expert):
    """Stack: put cube A (edge 0.04) on cube B (edge 0.05)."""

    object_name = "cubeA"
    support_name = "cubeB"
    object_width = 0.04
    place_box = (0.008, 0.003)
    goal_box = (0.022, 0.0035)

    def _preferred_yaw(self, scene: Scene) -> float:
        away = scene.support - scene.object
        # next to cube B, the fingers straddle the line to it
        return nearest_angle(heading(away), np.pi, 0.0) if np.hypot(*away[:2]) < 0.11 else 0.0

    def _goal(self, scene: Scene) -> Array:
        return scene.support + np.array([0.0, 0.0, 0.0455])


class NutAssemblySquareExpert(Expert):
    """NutAssemblySquare: grip the square nut's handle and thread it onto the square peg.

    ``target`` is on the axis of body ``peg1``, whose top is at 0.95; the table's is at 0.82.
    """

    object_name = "SquareNut"
    target = (0.23, 0.1, 0.835)
    object_width = 0.032
    long_axis = 0
    yaw_period = np.pi
    carry_path = (0.145, 0.006, 0.02)
    place_box = (0.012, 0.006)
    goal_box = (0.02, 0.025)
    handle: ClassVar[tuple[float, float, float]] = (0.06, 0.0, 0.0)  # grasp point, nut frame

    def _grasp_point(self, scene: Scene) -> Array:
        return scene.object + scene.object_rotation @ np.array(self.handle)

    def _carry_yaw(self, scene: Scene) -> float:
        nut_yaw = heading(scene.object_rotation[:, 0])
        yaws = (np.pi / 2, np.pi, -np.pi / 2, -np.pi)  # the hole fits 0 too, but out of reach
        return heading(scene.rotation[:, 0]) + min((yaw - nut_yaw for yaw in yaws), key=abs)


EXPERTS: dict[str, type] = {
    "Lift": LiftExpert,
    "PickPlaceCan": PickPlaceCanExpert,
    "Stack": StackExpert,
    "NutAssemblySquare": NutAssemblySquareExpert,
}
