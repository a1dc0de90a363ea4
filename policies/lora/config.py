"""Options of low-rank adaptation; apart, so that reading them does not load torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from embodied.core.config import convert, options_of
from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK
from embodied.core.registry import unknown
from embodied.core.specs import DeviceSpec, PolicySpec
from policies.configs import ChunkConfig
from policies.folder import CONFIG, digest, find_folder, read_config, spec_from_data
from policies.lerobot.config import LeRobotConfig
from policies.lerobot.export import export_sha256

WHERE = "policy.base"


class LoRAConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Low-rank adaptation of a trained policy (Hu et al. 2021, arXiv:2106.09685).

    base: a policy's folder or a run's, or {name: lerobot, path: DIR} for an exported one; every
    host that makes the policy reads it. rank, alpha: a layer's weights become W + alpha / rank B A
    with B A of this rank. targets: patterns of the names of linear layers, such as
    "network.blocks.*"; None for all of them. base_sha256: what the base's files hashed to when
    training began, None before that.
    """

    base: str | dict[str, Any]
    rank: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    alpha: Annotated[float, msgspec.Meta(gt=0)] = 16.0
    targets: tuple[str, ...] | None = None
    base_sha256: str | None = None

    has_density: ClassVar[bool] = False
    acts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Find the base. ConfigError if it is not here."""
        found: str | dict[str, Any]
        if isinstance(self.base, str):
            found = str(find_folder(Path(self.base), WHERE).resolve())
        else:
            found = {"name": "lerobot", **msgspec.to_builtins(_exported(self.base))}
        msgspec.structs.force_setattr(self, "base", found)

    @property
    def exported(self) -> LeRobotConfig | None:
        """Options of a base that LeRobot exported, None for one of ours."""
        return _exported(self.base) if isinstance(self.base, dict) else None

    @property
    def folder(self) -> Path:
        """Where the base's files are."""
        return Path(self.base) if isinstance(self.base, str) else Path(str(self.base["path"]))

    def found_sha256(self) -> str:
        """What the base's files hash to now; of our own folders, what their seal says."""
        if isinstance(self.base, str):
            return digest(read_config(self.folder / CONFIG))
        return export_sha256(self.folder)

    @property
    def learns_without_actions(self) -> bool:
        """As the base."""
        return self._chunks is not None and self._chunks.learns_without_actions

    @property
    def future(self) -> tuple[int, ...]:
        """The base's."""
        return () if self._chunks is None else self._chunks.future

    def future_keys(self, observation_keys: Iterable[str]) -> tuple[str, ...]:
        """The base's."""
        return () if self._chunks is None else self._chunks.future_keys(observation_keys)

    @property
    def _chunks(self) -> ChunkConfig | None:
        """Options of a base of ours that is no composition."""
        if self.exported is not None:
            return None
        found = read_config(self.folder / CONFIG)
        options = options_of("policies", {**found["options"], "name": found["policy"]}, WHERE)
        return options if isinstance(options, ChunkConfig) else None

    def parts(self) -> list[tuple[str, Any, str]]:
        """It names no components."""
        return []

    def policy_spec(self, device: DeviceSpec, observation_keys: Iterable[str]) -> PolicySpec:
        """The base's; ConfigError if it does not fit the device."""
        if self.exported is not None:
            return self.exported.policy_spec(device, observation_keys)
        spec = spec_from_data(read_config(self.folder / CONFIG).get("spec"), "base")
        known = tuple(observation_keys)
        for key, array in spec.observation.items():
            if key == TASK:
                continue
            sensed = key.removeprefix(GOAL)
            if sensed not in known:
                raise unknown(f"observation key of {WHERE}", sensed, known)
            if device.observation[sensed] != array:
                raise ConfigError(
                    f"{WHERE} reads {sensed} as {array}; the robot has {device.observation[sensed]}"
                )
        if device.action != spec.action:
            raise ConfigError(f"{WHERE} commands {spec.action}; the robot takes {device.action}")
        return spec


def _exported(base: dict[str, Any]) -> LeRobotConfig:
    options = dict(base)
    if options.pop("name", None) != "lerobot":
        raise ConfigError(f"{WHERE} is a folder, or {{name: lerobot, path: DIR}}; got {base}")
    return convert(options, LeRobotConfig, WHERE)
