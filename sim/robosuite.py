"""robosuite's Lift, PickPlaceCan, Stack and NutAssemblySquare with a Panda arm."""

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embodied.core.frames import Observation
from embodied.core.specs import ArraySpec, DeviceSpec
from embodied.core.tasks import Expert
from sim import rendering
from sim.family import SimConfig, SimTask, require
from sim.pictures import Pictures
from sim.robosuite_experts import EXPERTS, seed_reset, seeded_numpy

_TICK_HZ = 20.0
_VIDEO_CAMERA = "frontview"
_PROPRIOCEPTION = {
    "robot0_joint_pos": 7,
    "robot0_eef_pos": 3,
    "robot0_eef_quat": 4,
    "robot0_gripper_qpos": 2,
    "robot0_gripper_qvel": 2,
}
_CAN = {"Can_pos": 3, "Can_quat": 4, "Can_to_robot0_eef_pos": 3, "Can_to_robot0_eef_quat": 4}
_NUT = {name.replace("Can", "SquareNut"): size for name, size in _CAN.items()}
_STACK = {"cubeA_pos": 3, "cubeA_quat": 4, "cubeB_pos": 3, "cubeB_quat": 4}
_STACK |= {"gripper_to_cubeA": 3, "gripper_to_cubeB": 3, "cubeA_to_cubeB": 3}
_TASKS: dict[str, tuple[str, int, dict[str, int]]] = {
    "Lift": ("lift the cube", 150, {"cube_pos": 3, "cube_quat": 4, "gripper_to_cube_pos": 3}),
    "PickPlaceCan": ("put the can into its bin", 300, _CAN),
    "Stack": ("stack the red cube on the green one", 300, _STACK),
    "NutAssemblySquare": ("put the square nut onto its peg", 400, _NUT),
}
_ACTION = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


class RobosuiteFamily:
    """Tasks "robosuite/<Name>", with the names that robosuite gives them."""

    def names(self) -> tuple[str, ...]:
        require("robosuite")
        return tuple(sorted(f"robosuite/{name}" for name in _TASKS))

    def make_task(self, task: str, config: SimConfig) -> SimTask:
        instruction, horizon, _ = _TASKS[task]
        return SimTask(f"robosuite/{task}", instruction, config.horizon or horizon)

    def make_driver(self, task: str, config: SimConfig) -> "RobosuiteDriver":
        return RobosuiteDriver(task, config)

    def make_expert(self, task: str, spec: DeviceSpec) -> Expert:
        return RobosuiteExpert(task)


class RobosuiteDriver:
    """A Panda arm under operational-space control at 20 Hz.

    observation.state [18]: joint angles (rad), end effector position (m) and quaternion (xyzw),
    finger positions (m) and velocities (m/s). observation.environment_state: the objects' poses and
    their positions relative to the gripper (m), as robosuite names them. action [7]: displacement
    and rotation of the end effector as shares of 5 cm and 0.5 rad, gripper (1 closes).
    """

    def __init__(self, task: str, config: SimConfig) -> None:
        self._objects = _TASKS[task][2]
        self.spec = DeviceSpec(
            observation={
                "observation.state": _vector(_PROPRIOCEPTION),
                "observation.environment_state": _vector(self._objects),
                **config.picture_specs(_TICK_HZ),
            },
            action=ArraySpec((7,), low=(-1.0,), high=(1.0,), names=_ACTION),
            tick_hz=_TICK_HZ,
            signals=("reward", "success"),
        )
        self._task = task
        self._config = config
        self._pictures = Pictures(config, self._picture)
        self._env: Any = None
        self._cameras: rendering.Cameras | None = None
        self._raw: dict[str, np.ndarray] = {}
        self._action_D = np.zeros(7, np.float32)
        self._signals = {"reward": 0.0, "success": 0.0}

    def open(self) -> None:
        rendering.choose_backend()
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
        # Lift draws the size of its cube when it is made.
        with warnings.catch_warnings(), seeded_numpy(0):
            warnings.simplefilter("ignore")
            import robosuite

            self._env = robosuite.make(
                self._task,
                robots="Panda",
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=True,
                control_freq=int(_TICK_HZ),
                horizon=1 << 30,
                ignore_done=True,
                hard_reset=False,
                reward_shaping=True,
            )
        self._cameras = rendering.Cameras(self._env.sim.model._model, shadows=self._config.shadows)
        for camera in self._config.cameras:
            self._cameras.check(camera)
        self.reset(0)

    def reset(self, seed: int) -> None:
        self._pictures.begin()
        self._raw = seed_reset(self._env, seed)
        self._action_D = np.zeros(7, np.float32)
        self._signals = {"reward": 0.0, "success": 0.0}

    def sense(self) -> Observation:
        observation = {
            "observation.state": _pack(self._raw, _PROPRIOCEPTION),
            "observation.environment_state": _pack(self._raw, self._objects),
        }
        return {**observation, **self._pictures.observe()}

    def drive(self, action_D: np.ndarray) -> None:
        self._action_D = action_D

    def hold(self) -> None:
        self._action_D = np.array([0, 0, 0, 0, 0, 0, self._action_D[6]], np.float32)

    def step_time(self) -> None:
        self._pictures.step()
        self._raw, reward, _, _ = self._env.step(self._action_D.astype(np.float64))
        self._signals = {"reward": float(reward), "success": float(self._env._check_success())}

    def signals(self) -> dict[str, float]:
        return dict(self._signals)

    def render(self, width: int, height: int) -> np.ndarray:
        return self._picture(_VIDEO_CAMERA, width, height)

    def snapshot(self, width: int, height: int) -> Callable[[], np.ndarray]:
        assert self._cameras is not None
        return self._cameras.snapshot(self._env.sim.data._data, _VIDEO_CAMERA, width, height)

    def _picture(self, camera: str, width: int, height: int) -> np.ndarray:
        assert self._cameras is not None
        return self._cameras.render(self._env.sim.data._data, camera, width, height)

    def close(self) -> None:
        if self._cameras is not None:
            self._cameras.close()
        if self._env is not None:
            self._env.close()
        self._env = self._cameras = None


class RobosuiteExpert:
    """A scripted expert fed from a device's observation."""

    def __init__(self, task: str) -> None:
        self._expert = EXPERTS[task]()
        self._objects = _TASKS[task][2]

    def reset(self) -> None:
        self._expert.reset()

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        raw = _unpack(observation["observation.state"], _PROPRIOCEPTION)
        raw |= _unpack(observation["observation.environment_state"], self._objects)
        return self._expert.act(raw)


def _vector(layout: Mapping[str, int]) -> ArraySpec:
    names = tuple(f"{key}.{i}" for key, size in layout.items() for i in range(size))
    return ArraySpec((len(names),), names=names)


def _pack(raw: Mapping[str, np.ndarray], layout: Mapping[str, int]) -> np.ndarray:
    return np.concatenate([raw[key] for key in layout]).astype(np.float32)


def _unpack(vector: np.ndarray, layout: Mapping[str, int]) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(layout.values()))[:-1]
    return dict(zip(layout, np.split(vector, ends), strict=True))
