"""Any robot or teleoperator that LeRobot 0.4 knows, its third-party plugins included."""

import contextlib
import importlib
import inspect
import pkgutil
import termios
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, DeviceLostError, MissingDependencyError
from embodied.core.frames import Observation
from embodied.core.protocols import Event
from embodied.core.registry import unknown
from embodied.core.specs import ArraySpec, DeviceSpec, MotionSpec

_Kind = Literal["robot", "teleoperator"]
_NUMBERS = (float, int, bool)
_EVENTS: dict[str, Event] = {
    "success": "success",
    "failure": "failure",
    "rerecord_episode": "rerecord",
}


class LeRobotConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """type: the robot's registered name. config: its other options, as LeRobot has them.

    low, high, max_step: bounds of the action and its largest change a tick, in LeRobot's units
    and the order of the robot's action features; one value stands for all. velocity,
    acceleration, jerk: of a position-controlled robot, see MotionSpec; all three or none.
    servo_hz: None means tick_hz.
    """

    type: str
    config: dict[str, Any] = {}
    tick_hz: float = 30.0
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    max_step: tuple[float, ...] | None = None
    velocity: tuple[float, ...] | None = None
    acceleration: tuple[float, ...] | None = None
    jerk: tuple[float, ...] | None = None
    servo_hz: float | None = None

    def __post_init__(self) -> None:
        if self.tick_hz <= 0:
            raise ConfigError(f"lerobot.tick_hz is {self.tick_hz}; it must be positive")
        given = [value is not None for value in (self.velocity, self.acceleration, self.jerk)]
        if any(given) and not all(given):
            raise ConfigError("lerobot: give velocity, acceleration and jerk, or none of them")


class LeRobot:
    """Driver around a LeRobot robot.

    Its number features are observation.state (float32, in their order, names kept), pictures
    observation.images.<name> (uint8), other arrays observation.<name>. Units are LeRobot's. The
    calibration must exist: nothing is ever asked. What the robot does with torque when it
    connects and disconnects is LeRobot's: an SO-101 goes limp on `close` unless its config says
    disable_torque_on_disconnect: false.
    """

    Config: ClassVar = LeRobotConfig
    SLOW_TO_MAKE: ClassVar = True

    def __init__(self, config: LeRobotConfig) -> None:
        self._config = config
        self._robot: Any = _make("robot", config.type, config.config)
        observed: dict[str, Any] = self._robot.observation_features
        self._state = [key for key, kind in observed.items() if kind in _NUMBERS]
        self._arrays = {key: kind for key, kind in observed.items() if kind not in _NUMBERS}
        self._actions = _action_names(self._robot, config.type)
        self.spec = self._make_spec()
        self._measured: dict[str, float] = {}
        self._sent: dict[str, float] = {}
        self._holding = False

    def open(self) -> None:
        """Connect; ConfigError if the robot has no calibration, or another than its file."""
        if self._robot is None:
            self._robot = _make("robot", self._config.type, self._config.config)
        self._measured, self._sent, self._holding = {}, {}, False
        try:
            _connect(self._robot, "robot", self._config.type)
        except BaseException:
            self.close()
            raise

    def sense(self) -> Observation:
        """Every declared observation."""
        values: dict[str, Any] = self._opened().get_observation()
        if missing := [key for key in (*self._state, *self._arrays) if key not in values]:
            raise DeviceLostError(f"{self._config.type} did not report {', '.join(missing)}")
        self._measured = {key: float(values[key]) for key in self._state}
        found: Observation = {}
        if self._state:
            found["observation.state"] = np.array(list(self._measured.values()), np.float32)
        for key, shape in self._arrays.items():
            name = _array_key(key, shape)
            found[name] = np.asarray(values[key], self.spec.observation[name].dtype)
        return found

    def drive(self, action_D: np.ndarray) -> None:
        """Send one action [D] in the order of the robot's action features."""
        self._holding = False
        self._send(dict(zip(self._actions, np.asarray(action_D).tolist(), strict=True)))

    def hold(self) -> None:
        """Send what was measured last as goal, and zero for velocities and torques.

        Again and again, the same goal: one measured anew would sink under gravity. What is
        neither measured nor to be zero keeps its last command.
        """
        if not self._holding:
            if not self._measured:
                self.sense()
            known = self._sent | {k: v for k, v in self._measured.items() if k in self._actions}
            known |= {key: 0.0 for key in self._actions if _is_rate(key)}
            if any(key not in known for key in self._actions):
                return
            self._sent = {key: known[key] for key in self._actions}
        self._holding = True
        self._send(self._sent)

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        robot, self._robot = self._robot, None
        _disconnect(robot)

    def _send(self, action: dict[str, float]) -> None:
        self._opened().send_action(dict(action))
        self._sent = action

    def _opened(self) -> Any:
        if self._robot is None:
            raise DeviceLostError(f"{self._config.type} is not open: call open() first")
        return self._robot

    def _make_spec(self) -> DeviceSpec:
        config, size = self._config, len(self._actions)
        observation: dict[str, ArraySpec] = {}
        if self._state:
            observation["observation.state"] = ArraySpec(
                (len(self._state),), names=tuple(self._state)
            )
        for key, shape in self._arrays.items():
            if not isinstance(shape, tuple):
                raise ConfigError(
                    f"{config.type}: observation '{key}' is a {shape}; only numbers and arrays "
                    "are supported"
                )
            sides = cast("tuple[int, ...]", shape)
            dtype = "uint8" if len(sides) == 3 else "float32"
            observation[_array_key(key, sides)] = ArraySpec(sides, dtype)
        motion = None
        if config.velocity and config.acceleration and config.jerk:
            if self._state != self._actions:
                raise ConfigError(
                    f"lerobot.velocity is for robots that measure what they are sent; "
                    f"{config.type} measures {self._state} and takes {self._actions}"
                )
            motion = MotionSpec(
                velocity=_for_all(config.velocity, size),
                acceleration=_for_all(config.acceleration, size),
                jerk=_for_all(config.jerk, size),
                servo_hz=config.servo_hz or config.tick_hz,
            )
        return DeviceSpec(
            observation=observation,
            action=ArraySpec((size,), low=config.low, high=config.high, names=tuple(self._actions)),
            tick_hz=config.tick_hz,
            max_step=_for_all(config.max_step, size) if config.max_step else None,
            motion=motion,
        )


class LeRobotTeleoperator:
    """Teleoperator around a LeRobot teleoperator: for robots of the driver `lerobot`.

    Actions are in LeRobot's units and the order of the teleoperator's action features.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """type: registered name. config: its other options, as LeRobot has them."""

        type: str
        config: dict[str, Any] = {}

    def __init__(self, config: Config) -> None:
        self._config = config
        self._device: Any = _make("teleoperator", config.type, config.config)
        self.names = tuple(_action_names(self._device, config.type))
        self._raised: set[str] = set()
        self._events: list[Event] = []

    def open(self) -> None:
        """Connect; ConfigError if the teleoperator needs a calibration and has none."""
        if self._device is None:
            self._device = _make("teleoperator", self._config.type, self._config.config)
        try:
            _connect(self._device, "teleoperator", self._config.type)
        except BaseException:
            self.close()
            raise

    def read(self, observation: Observation) -> np.ndarray | None:
        """Action [D], float32; None while the teleoperator says that nobody intervenes."""
        if self._device is None:
            raise DeviceLostError(f"{self._config.type} is not open: call open() first")
        flags: dict[str, bool] = {}
        if hasattr(self._device, "get_teleop_events"):
            said: Mapping[Any, Any] = self._device.get_teleop_events()
            flags = {str(getattr(key, "value", key)): bool(said[key]) for key in said}
            self._note(flags)
        values: dict[str, Any] = self._device.get_action()
        if flags.get("is_intervention") is False:
            return None
        if missing := [name for name in self.names if name not in values]:
            raise DeviceLostError(f"{self._config.type} did not report {', '.join(missing)}")
        return np.array([float(values[name]) for name in self.names], np.float32)

    def events(self) -> list[Event]:
        """What has been signalled since the last call, as `read` saw it."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        device, self._device = self._device, None
        _disconnect(device)

    def _note(self, flags: Mapping[str, bool]) -> None:
        raised = {name for name in _EVENTS if flags.get(name)}
        if flags.get("terminate_episode") and not raised:
            raised = {"failure"}
        self._events.extend(_EVENTS[name] for name in sorted(raised - self._raised))
        self._raised = raised


def _make(kind: _Kind, name: str, options: Mapping[str, Any]) -> Any:
    """A LeRobot device of a registered type, not connected."""
    registry = _registry(kind, name)
    choices: dict[str, Any] = registry.get_known_choices()
    if name not in choices:
        raise unknown(f"LeRobot {kind}", name, choices)
    draccus: Any = importlib.import_module("draccus")
    utils: Any = importlib.import_module(f"lerobot.{kind}s.utils")
    try:
        config = draccus.decode(registry, {"type": name, **options})
        return getattr(utils, f"make_{kind}_from_config")(config)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"LeRobot {kind} '{name}' needs the package '{error.name}', which is not installed"
        ) from error
    except (draccus.utils.DecodingError, TypeError, ValueError) as error:
        raise ConfigError(f"LeRobot {kind} '{name}': {error}") from error


def _registry(kind: _Kind, name: str) -> Any:
    """LeRobot's registry of configurations, with `name` in it if it can be imported."""
    try:
        package: Any = importlib.import_module(f"lerobot.{kind}s")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lerobot":
            raise
        raise MissingDependencyError(
            f"{kind} '{name}' needs LeRobot; pip install 'embodied-stack[lerobot]' brings it"
        ) from error
    registry: Any = package.RobotConfig if kind == "robot" else package.TeleoperatorConfig
    _import_all("lerobot.cameras")
    _import_all(f"lerobot.{kind}s")
    if name not in registry.get_known_choices():
        importlib.import_module("lerobot.utils.import_utils").register_third_party_plugins()
    return registry


def _import_all(name: str) -> None:
    """Import the packages in a package, which registers them; those that need more are left out."""
    package: Any = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{name}.{module.name}")


def _connect(device: Any, kind: _Kind, name: str) -> None:
    options = (
        {"calibrate": False} if "calibrate" in inspect.signature(device.connect).parameters else {}
    )
    device.connect(**options)
    if not device.is_connected:
        raise DeviceLostError(f"LeRobot {kind} '{name}' did not connect; is it there?")
    # Where there is nothing to calibrate, LeRobot has None, or a method in a property's place.
    if device.is_calibrated is False:
        option = "robot" if kind == "robot" else "teleop"
        raise ConfigError(
            f"LeRobot {kind} '{name}' is not calibrated, or otherwise than its file "
            f"{device.calibration_fpath} says; run `lerobot-calibrate --{option}.type={name} "
            f"--{option}.id={device.id} ...`, then name the same id and calibration_dir here"
        )


def _disconnect(device: Any) -> None:
    if device is not None and device.is_connected:
        # Of a device that is gone LeRobot cannot switch the torque off; its port closes with it.
        with contextlib.suppress(OSError, RuntimeError, termios.error):
            device.disconnect()


def _action_names(device: Any, name: str) -> list[str]:
    try:
        features: Mapping[str, Any] = device.action_features
    except AttributeError as error:
        raise ConfigError(f"{name} does not say what its actions are: {error}") from error
    places = features.get("names")
    if "shape" in features and isinstance(places, Mapping):
        by_name = cast("Mapping[str, Any]", places)
        if all(isinstance(place, int) for place in by_name.values()):
            return sorted(by_name, key=lambda key: by_name[key])
    elif all(kind in _NUMBERS for kind in features.values()):
        return list(features)
    raise ConfigError(f"{name} has the actions {dict(features)}; only numbers are supported")


def _is_rate(action: str) -> bool:
    """Whether an action is a velocity or torque: base.vx, joint_1.vel, joint_1.torque."""
    quantity = action.rpartition(".")[2]
    return quantity.startswith("v") or quantity == "torque"


def _array_key(key: str, shape: tuple[int, ...]) -> str:
    return f"observation.images.{key}" if len(shape) == 3 else f"observation.{key}"


def _for_all(values: tuple[float, ...], size: int) -> tuple[float, ...]:
    return values * size if len(values) == 1 else values
