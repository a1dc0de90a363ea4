"""Meta-World's 50 manipulation tasks, one Sawyer arm each, with the library's scripted experts."""

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

_TICK_HZ = 80.0
_HORIZON = 250
_VERSION = "-v3"
_STATE = ("hand_x", "hand_y", "hand_z", "gripper")
_VIDEO_CAMERA = "corner2"


def _library() -> tuple[dict[str, Any], dict[str, Any]]:
    rendering.choose_backend()
    require("metaworld")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    return dict(ALL_V3_ENVIRONMENTS), dict(ENV_POLICY_MAP)


class MetaWorldFamily:
    """Tasks "metaworld/<name>" without the library's version suffix."""

    def names(self) -> tuple[str, ...]:
        environments, _ = _library()
        return tuple(sorted("metaworld/" + name.removesuffix(_VERSION) for name in environments))

    def make_task(self, task: str, config: SimConfig) -> SimTask:
        instruction = task.replace("-", " ")
        return SimTask(f"metaworld/{task}", instruction, config.horizon or _HORIZON)

    def make_driver(self, task: str, config: SimConfig) -> "MetaWorldDriver":
        return MetaWorldDriver(task, config)

    def make_expert(self, task: str, spec: DeviceSpec) -> Expert:
        _, experts = _library()
        return MetaWorldExpert(experts[task + _VERSION])


class MetaWorldDriver:
    """A Sawyer arm under position-delta control at 80 Hz.

    observation.state [4]: hand position (m) and gripper opening (0 to 1).
    observation.environment_state [35]: objects [14], the previous tick's hand and objects [18] and
    the goal position [3]. action [4]: hand displacement in units of 1 cm, gripper effort.
    Start states are drawn anew for every seed; the library's registered environments repeat
    50 frozen ones instead, whatever the seed.
    """

    def __init__(self, task: str, config: SimConfig) -> None:
        self.spec = DeviceSpec(
            observation={
                "observation.state": ArraySpec((4,), names=_STATE),
                "observation.environment_state": ArraySpec((35,)),
                **config.picture_specs(_TICK_HZ),
            },
            action=ArraySpec((4,), low=(-1.0,), high=(1.0,), names=("dx", "dy", "dz", "gripper")),
            tick_hz=_TICK_HZ,
            signals=("reward", "success"),
        )
        self._task = task
        self._config = config
        self._pictures = Pictures(config, self._picture)
        self._env: Any = None
        self._cameras: rendering.Cameras | None = None
        self._action_D = np.zeros(4, np.float32)
        self._raw = np.zeros(39)
        self._signals = {"reward": 0.0, "success": 0.0}

    def open(self) -> None:
        environments, _ = _library()
        env = environments[self._task + _VERSION]()
        # The goal is observed; _partially_observable would zero it. The cached space follows it.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env._set_task_called = True
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.max_path_length = 1 << 62  # truncation is the task's business
        self._env = env
        self._cameras = rendering.Cameras(env.model, shadows=self._config.shadows)
        for camera in self._config.cameras:
            self._cameras.check(camera)
        self.reset(0)

    def reset(self, seed: int) -> None:
        self._pictures.begin()
        self._env.seed(seed)
        self._raw, _ = self._env.reset()
        self._signals = {"reward": 0.0, "success": 0.0}
        self._action_D = np.zeros(4, np.float32)

    def sense(self) -> Observation:
        raw = self._raw.astype(np.float32)
        observation = {
            "observation.state": raw[:4],
            "observation.environment_state": raw[4:],
        }
        return {**observation, **self._pictures.observe()}

    def drive(self, action_D: np.ndarray) -> None:
        self._action_D = action_D

    def hold(self) -> None:
        self._action_D = np.array([0, 0, 0, self._action_D[3]], np.float32)

    def step_time(self) -> None:
        self._pictures.step()
        self._raw, reward, _, _, info = self._env.step(self._action_D)
        self._signals = {"reward": float(reward), "success": float(info["success"])}

    def signals(self) -> dict[str, float]:
        return dict(self._signals)

    def render(self, width: int, height: int) -> np.ndarray:
        return self._picture(_VIDEO_CAMERA, width, height)

    def snapshot(self, width: int, height: int) -> Callable[[], np.ndarray]:
        assert self._cameras is not None
        draw = self._cameras.snapshot(self._env.data, _VIDEO_CAMERA, width, height)
        return lambda: _upright(draw(), _VIDEO_CAMERA)

    def _picture(self, camera: str, width: int, height: int) -> np.ndarray:
        assert self._cameras is not None
        return _upright(self._cameras.render(self._env.data, camera, width, height), camera)

    def close(self) -> None:
        if self._cameras is not None:
            self._cameras.close()
        if self._env is not None:
            self._env.close()
        self._env = self._cameras = None


def _upright(picture: np.ndarray, camera: str) -> np.ndarray:
    """The "corner" cameras of the models are mounted upside down."""
    return picture[::-1, ::-1].copy() if camera.startswith("corner") else picture


class MetaWorldExpert:
    """The library's scripted policy for a task, fed from a device's observation."""

    def __init__(self, policy: type[Any]) -> None:
        self._make = policy
        self.reset()

    def reset(self) -> None:
        self._policy = self._make()

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        raw = np.concatenate(
            [observation["observation.state"], observation["observation.environment_state"]]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action_D = self._policy.get_action(raw.astype(np.float64))
        return np.clip(action_D, -1.0, 1.0).astype(np.float32)
