"""PushT: push a T-shaped block onto its mark with a round end effector (Chi et al. 2023)."""

import copy
import math
import warnings
from typing import Any

import numpy as np

from embodied.core.errors import ConfigError, MissingDependencyError
from embodied.core.frames import Observation
from embodied.core.specs import ArraySpec, DeviceSpec
from sim import rendering
from sim.family import SimConfig, SimTask, require
from sim.pictures import Pictures

_TICK_HZ = 10.0
_HORIZON = 300
_SIDE = 512.0
_CAMERA = "top"


def block_features(x: Any, y: Any, angle_rad: Any) -> np.ndarray:
    """Block pose as [..., 4]: position in pixels and (sin, cos) of its angle times 100 pixels."""
    return np.stack([x, y, 100 * np.sin(angle_rad), 100 * np.cos(angle_rad)], -1).astype(np.float32)


class PushTFamily:
    """The one task "pusht"; people demonstrate it, no script does."""

    def names(self) -> tuple[str, ...]:
        require("gym_pusht")
        return ("pusht",)

    def make_task(self, task: str, config: SimConfig) -> SimTask:
        instruction = "push the T block onto its mark"
        return SimTask("pusht", instruction, config.horizon or _HORIZON)

    def make_driver(self, task: str, config: SimConfig) -> "PushTDriver":
        return PushTDriver(config)

    def make_expert(self, task: str, spec: DeviceSpec) -> None:
        return None


class PushTDriver:
    """The end effector under position control at 10 Hz on a field of 512 × 512 pixels.

    observation.state [2]: end effector (pixels). observation.environment_state [4]: see
    `block_features`. action [2]: where the end effector should go (pixels).
    Signals: coverage (share of the mark that the block covers), reward = min(1, coverage / 0.95)
    as published, success (coverage > 0.95).
    """

    def __init__(self, config: SimConfig) -> None:
        if set(config.cameras) - {_CAMERA}:
            raise ConfigError(f"sim.cameras is {list(config.cameras)}; pusht has only '{_CAMERA}'")
        self.spec = DeviceSpec(
            observation={
                "observation.state": ArraySpec((2,), unit="px", names=("agent_x", "agent_y")),
                "observation.environment_state": ArraySpec(
                    (4,), unit="px", names=("block_x", "block_y", "block_sin", "block_cos")
                ),
                **config.picture_specs(_TICK_HZ),
            },
            action=ArraySpec((2,), low=(0.0,), high=(_SIDE,), unit="px", names=("x", "y")),
            tick_hz=_TICK_HZ,
            signals=("reward", "success", "coverage"),
        )
        self._pictures = Pictures(config, lambda _, width, height: self.render(width, height))
        self._env: Any = None
        self._target = np.zeros(2, np.float32)
        self._signals: dict[str, float] = {}

    def open(self) -> None:
        rendering.choose_backend()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from gym_pusht.envs.pusht import PushTEnv
        except ImportError as error:
            raise MissingDependencyError(
                f"pusht cannot be loaded ({error}). If a system library is missing, install it "
                "with: apt-get install -y libgl1 libglib2.0-0"
            ) from error

        self._env = PushTEnv(obs_type="state", render_mode="rgb_array")
        self.reset(0)

    def reset(self, seed: int) -> None:
        self._env.reset(seed=seed)
        self._settle()

    def set_state(self, agent_xy: np.ndarray, block_xy: np.ndarray, angle_rad: float) -> None:
        """Put agent and block where a demonstration had them (pixels, radians)."""
        self._env.reset(seed=0)
        self._env.agent.position = tuple(map(float, agent_xy))
        self._env.block.angle = float(angle_rad)
        self._env.block.position = tuple(map(float, block_xy))
        self._env.space.step(self._env.dt)
        self._settle()

    def twin(self) -> "PushTDriver":
        """Another open driver in the same state, contacts included: what follows is the same to a
        tenth of a pixel."""
        made = copy.copy(self)
        made._env = env = copy.copy(self._env)
        memo: dict[int, Any] = {id(self._env): env}
        env.space = copy.deepcopy(self._env.space, memo)
        env.agent, env.block = (memo[id(body)] for body in (self._env.agent, self._env.block))
        # pymunk copies the position before the centre of gravity, which moves it.
        env.block.position = self._env.block.position
        env.space.reindex_shapes_for_body(env.block)
        return made

    def _settle(self) -> None:
        self._pictures.begin()
        self._target = np.array(self._env.agent.position, np.float32)
        self._signals = {
            "reward": 0.0,
            "success": 0.0,
            "coverage": float(self._env._get_coverage()),
        }

    def sense(self) -> Observation:
        block = self._env.block
        observation = {
            "observation.state": np.array(self._env.agent.position, np.float32),
            "observation.environment_state": block_features(
                block.position.x, block.position.y, math.remainder(block.angle, math.tau)
            ),
        }
        return {**observation, **self._pictures.observe()}

    def drive(self, action_D: np.ndarray) -> None:
        self._target = action_D

    def hold(self) -> None:
        """Keep the last target: the end effector comes to rest there."""

    def step_time(self) -> None:
        self._pictures.step()
        _, reward, success, _, info = self._env.step(self._target.astype(np.float64))
        self._signals = {
            "reward": float(reward),
            "success": float(success),
            "coverage": float(info["coverage"]),
        }

    def signals(self) -> dict[str, float]:
        return dict(self._signals)

    def render(self, width: int, height: int) -> np.ndarray:
        return np.asarray(self._env._get_img(self._env._draw(), width, height), np.uint8)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = None
