"""Any gymnasium environment whose actions are a Box, as a simulated robot."""

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, EmbodiedError, MissingDependencyError
from embodied.core.frames import Observation
from embodied.core.specs import ArraySpec, DeviceSpec

_DEFAULT_HZ = 20.0
_SUCCESS = ("is_success", "success")
_STATE = ("state", "agent_pos")


class GymnasiumConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """id: registered name, "module:Name-v0" to import its module first. kwargs: for the maker.

    tick_hz: None takes the environment's render_fps, 20 if it has none.
    """

    id: str
    kwargs: dict[str, Any] = {}
    tick_hz: float | None = None

    def __post_init__(self) -> None:
        if self.tick_hz is not None and self.tick_hz <= 0:
            raise ConfigError(f"gymnasium.tick_hz is {self.tick_hz}; it must be positive")


class Gymnasium:
    """Driver around one environment; one step a tick, without the environment's time limit.

    A Box observation is observation.state. In a Dict, "state" or "agent_pos" is
    observation.state, pictures are observation.images.<key>, the rest observation.<key>; nested
    keys are joined by "_". A bare picture is observation.images.pixels. Numbers are float32,
    pictures uint8 [height, width, channels]. Actions are flat, float32. Holding is the action
    nearest to zero. Signals: reward; success, 1 if the environment's info says so under
    "is_success" or "success", where it says nothing if it has terminated; terminated. After
    termination the environment stands still until it is reset.
    """

    Config: ClassVar = GymnasiumConfig

    def __init__(self, config: GymnasiumConfig) -> None:
        self._config = config
        self._gym = _import()
        self._env: Any = self._make()
        self._action_box = self._env.action_space
        self._keys = _observation_keys(self._env.observation_space, self._name)
        self.spec = self._make_spec()
        self._idle_D = np.clip(np.zeros(self.spec.action.size), *self._bounds())
        self._action_D = self._idle_D
        self._observation: Any = None
        self._signals = dict.fromkeys(self.spec.signals, 0.0)

    def open(self) -> None:
        """Make the environment and reset it with seed 0."""
        if self._env is None:
            self._env = self._make()
        self.reset(0)

    def sense(self) -> Observation:
        """Every declared observation."""
        if self._observation is None:
            raise EmbodiedError(f"{self._name} is not open: call open() first")
        found: Observation = {}
        for key, path in self._keys.items():
            value: Any = self._observation
            for part in path:
                value = value[part]
            spec = self.spec.observation[key]
            found[key] = np.array(value, spec.dtype).reshape(spec.shape)
        return found

    def drive(self, action_D: np.ndarray) -> None:
        """Set the action [D] of the next step."""
        self._action_D = np.asarray(action_D)

    def hold(self) -> None:
        """Set the action nearest to zero."""
        self._action_D = self._idle_D

    def step_time(self) -> None:
        """One step of the environment; none after it has terminated."""
        if self._signals["terminated"]:
            self._signals["reward"] = 0.0
            return
        box = self._action_box
        action = self._action_D.reshape(box.shape)
        if np.issubdtype(box.dtype, np.integer):
            action = np.rint(action)
        observation, reward, terminated, _, info = self._env.step(action.astype(box.dtype))
        self._observation = observation
        said = [float(bool(info[key])) for key in _SUCCESS if key in info]
        self._signals = {
            "reward": float(reward),
            "success": said[0] if said else float(terminated),
            "terminated": float(terminated),
        }

    def reset(self, seed: int) -> None:
        """Go to the start state of `seed`."""
        self._observation, _ = self._env.reset(seed=seed)
        self._action_D = self._idle_D
        self._signals = dict.fromkeys(self.spec.signals, 0.0)

    def signals(self) -> dict[str, float]:
        """reward, success, terminated."""
        return dict(self._signals)

    def render(self, width: int, height: int) -> np.ndarray:
        """Picture [height, width, 3], uint8; EmbodiedError if the environment draws none."""
        if self._env is None or self._env.render_mode != "rgb_array":
            raise EmbodiedError(f"{self._name} is not open, or does not draw itself as 'rgb_array'")
        try:
            picture = np.asarray(self._env.render(), np.uint8)
        except self._gym.error.DependencyNotInstalled as error:
            raise MissingDependencyError(f"{self._name} cannot draw itself: {error}") from error
        rows = np.arange(height) * picture.shape[0] // height
        columns = np.arange(width) * picture.shape[1] // width
        return picture[rows][:, columns, :3]

    def close(self) -> None:
        """End the environment; safe to call twice."""
        env, self._env, self._observation = self._env, None, None
        if env is not None:
            env.close()

    @property
    def _name(self) -> str:
        return f"environment {self._config.id}"

    def _make(self) -> Any:
        kwargs = dict(self._config.kwargs)
        module, _, name = self._config.id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            entry = self._gym.spec(name)
            modes: list[str] = getattr(_entry_class(entry), "metadata", {}).get("render_modes", [])
            if "rgb_array" in modes:
                kwargs.setdefault("render_mode", "rgb_array")
            return self._gym.make(name, max_episode_steps=-1, disable_env_checker=True, **kwargs)
        except self._gym.error.DependencyNotInstalled as error:
            raise MissingDependencyError(f"{self._name}: {error}") from error
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"{self._name} needs the package '{error.name}', which is not installed"
            ) from error
        except (self._gym.error.Error, TypeError) as error:
            raise ConfigError(f"{self._name} cannot be made: {error}") from error

    def _make_spec(self) -> DeviceSpec:
        spaces = self._gym.spaces
        box = self._action_box
        if not isinstance(box, spaces.Box):
            self.close()
            raise ConfigError(f"{self._name} has the action space {box}; only Box is supported")
        observation: dict[str, ArraySpec] = {}
        for key, path in self._keys.items():
            space = self._env.observation_space
            for part in path:
                space = space[part]
            observation[key] = _array_spec(space, picture=_is_picture(space))
        fps = self._env.metadata.get("render_fps")
        return DeviceSpec(
            observation=observation,
            action=_array_spec(box, picture=False, flat=True),
            tick_hz=float(self._config.tick_hz or fps or _DEFAULT_HZ),
            signals=("reward", "success", "terminated"),
        )

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        box = self._action_box
        return box.low.reshape(-1).astype(np.float64), box.high.reshape(-1).astype(np.float64)


def _import() -> Any:
    try:
        return importlib.import_module("gymnasium")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "driver gymnasium needs the package 'gymnasium'; "
            "pip install 'embodied-stack[sim]' brings it"
        ) from error


def _entry_class(entry: Any) -> Any:
    """The class of a registered environment, or what makes it."""
    maker = entry.entry_point
    if not isinstance(maker, str):
        return maker
    module, _, name = maker.partition(":")
    return getattr(importlib.import_module(module), name)


def _is_picture(space: Any) -> bool:
    return space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] in (1, 3, 4)


def _array_spec(space: Any, *, picture: bool, flat: bool = False) -> ArraySpec:
    if picture:
        return ArraySpec(space.shape, "uint8")
    low, high = (bound.reshape(-1).astype(float).tolist() for bound in (space.low, space.high))
    bounded = bool(np.isfinite(low).all() and np.isfinite(high).all())
    shape = (len(low),) if flat or not space.shape else space.shape
    return ArraySpec(
        shape, low=tuple(low) if bounded else None, high=tuple(high) if bounded else None
    )


def _observation_keys(space: Any, name: str) -> dict[str, tuple[str, ...]]:
    """Our key of every observation, and the way to it in the environment's."""
    spaces: Any = importlib.import_module("gymnasium.spaces")
    keys: dict[str, tuple[str, ...]] = {}

    def visit(part: Any, path: tuple[str, ...]) -> None:
        if isinstance(part, spaces.Dict):
            children: Mapping[str, Any] = part.spaces
            for key, child in children.items():
                visit(child, (*path, str(key)))
            return
        if not isinstance(part, spaces.Box):
            where = f" at '{'.'.join(path)}'" if path else ""
            raise ConfigError(
                f"{name} has the observation space {part}{where}; "
                "only Box, and Dict of Box, is supported"
            )
        if _is_picture(part):
            short = path[1:] if len(path) > 1 and path[0] == "pixels" else path
            key = f"observation.images.{'_'.join(short) or 'pixels'}"
        elif not path or path[-1] in _STATE:
            key = "observation.state"
        else:
            key = f"observation.{'_'.join(path)}"
        if key in keys:
            raise ConfigError(f"{name}: '{'.'.join(path)}' and another observation are both {key}")
        keys[key] = path

    visit(space, ())
    return keys
