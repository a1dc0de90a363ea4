"""What a host allows its robot to do: limits that remote parties can only tighten.

These are functional protections, not a certified safety function (docs/safety.md).
"""

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, MissingDependencyError
from embodied.core.specs import DeviceSpec


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits per action element in the action's unit (per s, s², s³); one value stands for all.

    None leaves what the driver's spec says.
    """

    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    velocity: tuple[float, ...] | None = None
    acceleration: tuple[float, ...] | None = None
    jerk: tuple[float, ...] | None = None


class WorkspaceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A box (m, in the model's world frame) that a site of the robot must not leave.

    model: MJCF file whose first joints are the action's elements, in order, in radians or metres.
    """

    model: str
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    site: str = "tool"


class SafetyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A robot's protections, from a file on its own host.

    heartbeat_s: silence of the lease holder after which the robot stops; null for none.
    committed_ticks: what may still be executed after the link is lost.
    max_obs_age_s: greatest age of the observation that a chunk was computed from.
    max_ahead_s: how far ahead a chunk may reach. start_tolerance: greatest distance of a lease's
    first command from where the robot is (action's unit); null for no check.
    overruns: missed ticks in a row until the halt is latched; 0 for never.
    position_margin, velocity_factor: a measured position beyond the limits by the margin, or a
    velocity beyond the limit times the factor, for `violations` ticks in a row latches the halt.
    tracking_error: greatest distance between commanded and measured position (null for none),
    likewise. lost_after: failed reads in a row until the device counts as lost.
    """

    heartbeat_s: float | None = 0.5
    committed_ticks: int = 2
    max_obs_age_s: float = 0.3
    max_ahead_s: float = 5.0
    start_tolerance: float | None = 0.02
    overruns: int = 3
    position_margin: float = 0.1
    velocity_factor: float = 2.0
    tracking_error: float | None = 0.5
    violations: int = 5
    lost_after: int = 3
    bounds: Bounds = Bounds()
    workspace: WorkspaceConfig | None = None

    def __post_init__(self) -> None:
        positive = ("max_obs_age_s", "max_ahead_s", "velocity_factor", "violations", "lost_after")
        for name in positive:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"safety.{name} is {value}; it must be positive and finite")
        for name in ("committed_ticks", "overruns", "position_margin"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"safety.{name} is {value}; it must be 0 or more, and finite")
        for name in ("heartbeat_s", "start_tolerance", "tracking_error"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"safety.{name} is {value}; it must be positive, or null")


SIMULATED = SafetyConfig(
    heartbeat_s=None,
    max_obs_age_s=3.0,
    max_ahead_s=60.0,
    start_tolerance=None,
    overruns=0,
    tracking_error=None,
    lost_after=1,
)
"""What a simulator in its user's own process needs: commands are checked, nobody is watched."""


def check_fit(spec: DeviceSpec, safety: SafetyConfig) -> None:
    """Raise ConfigError for protections that a device without set points cannot have."""
    if spec.motion is not None:
        return
    for name in ("start_tolerance", "tracking_error", "workspace"):
        if getattr(safety, name) is not None:
            raise ConfigError(
                f"safety.{name} protects position-controlled devices, and this one declares no "
                f"motion: give its driver velocity, acceleration and jerk, or set safety.{name} "
                "to null and know that it is not there"
            )


class Envelope:
    """The limits in force: arrays [D] low, high and, with motion, velocity, acceleration, jerk."""

    def __init__(self, limits: dict[str, np.ndarray]) -> None:
        self._limits = limits
        self.low, self.high = limits["low"], limits["high"]

    @classmethod
    def of(cls, spec: DeviceSpec) -> "Envelope":
        """What the driver declares."""
        low, high = spec.action.bounds()
        limits = {"low": low, "high": high}
        if spec.motion is not None:
            for name in ("velocity", "acceleration", "jerk"):
                limits[name] = np.array(getattr(spec.motion, name), np.float64)
        return cls(limits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Envelope) or self._limits.keys() != other._limits.keys():
            return False
        return all(np.array_equal(self._limits[k], other._limits[k]) for k in self._limits)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._limits[name]

    def tightened(self, bounds: Bounds, where: str) -> "Envelope":
        """These limits made narrower. Raises ConfigError where `bounds` would widen them."""
        limits = dict(self._limits)
        for name in Bounds.__struct_fields__:
            values = getattr(bounds, name)
            if values is None:
                continue
            if name not in limits:
                raise ConfigError(f"{where}.{name}: this device takes no {name} limit")
            present = limits[name]
            if len(values) not in (1, present.size) or not np.isfinite(values).all():
                raise ConfigError(
                    f"{where}.{name} is {values}; it needs 1 or {present.size} finite values"
                )
            asked = np.broadcast_to(np.asarray(values, np.float64), present.shape).copy()
            wider = asked < present if name == "low" else asked > present
            if wider.any():
                k = int(np.argmax(wider))
                raise ConfigError(
                    f"{where}.{name}[{k}] is {asked[k]:g}, wider than {present[k]:g} in force: "
                    "limits can only be tightened"
                )
            if name not in ("low", "high") and (asked <= 0).any():
                raise ConfigError(f"{where}.{name} is {values}; every value must be positive")
            limits[name] = asked
        if (limits["low"] >= limits["high"]).any():
            raise ConfigError(f"{where}: low is not below high")
        return Envelope(limits)


_BOX_SLACK_M = 1e-6


class Workspace:
    """Where a site of the robot is, by MuJoCo's forward kinematics, and whether it may be there."""

    def __init__(self, config: WorkspaceConfig, joints: int = 1) -> None:
        mujoco = _mujoco()
        path = Path(config.model)
        if not path.is_file():
            raise ConfigError(f"safety.workspace.model: there is no file {path}")
        self._model: Any = mujoco.MjModel.from_xml_path(str(path))
        self._data: Any = mujoco.MjData(self._model)
        self._kinematics: Any = mujoco.mj_kinematics
        self._site: int = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_SITE, config.site)
        if self._site < 0:
            raise ConfigError(f"safety.workspace.site: {path} has no site '{config.site}'")
        self._low = np.array(config.low)
        self._high = np.array(config.high)
        if not (self._low < self._high).all():
            raise ConfigError(f"safety.workspace: low {config.low} is not below high {config.high}")
        if self._model.nq < joints:
            raise ConfigError(
                f"safety.workspace.model: {path} has {self._model.nq} joint positions; the robot's "
                f"action has {joints}"
            )

    def tool(self, position_D: np.ndarray) -> np.ndarray:
        """Position [3] (m) of the site at joint positions [D]."""
        self._data.qpos[: len(position_D)] = position_D
        self._kinematics(self._model, self._data)
        return self._data.site_xpos[self._site]

    def outside_m(self, position_D: np.ndarray) -> float:
        """How far outside of the box the site is, 0 inside."""
        tool = self.tool(position_D)
        return float(np.maximum(np.maximum(self._low - tool, tool - self._high), 0.0).max())

    def fault(self, position_D: np.ndarray, allowed_m: float = 0.0) -> str:
        """Why the robot must not be there; "" if it may. allowed_m: how far outside it is now."""
        if self.outside_m(position_D) > allowed_m + _BOX_SLACK_M:
            at = ", ".join(f"{x:.3f}" for x in self.tool(position_D))
            return f"tool would be at ({at}) m, outside of the workspace"
        return ""


def _mujoco() -> Any:
    try:
        import mujoco  # pyright: ignore[reportMissingTypeStubs]
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "a workspace limit needs MuJoCo's kinematics: pip install embodied-stack"
        ) from error
    return mujoco
