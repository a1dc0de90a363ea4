"""Options of LeRobot's policies; apart, so that reading them does not load torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from embodied.core.errors import ConfigError
from embodied.core.instructions import TASK
from embodied.core.registry import unknown
from embodied.core.specs import ArraySpec, DeviceSpec, PolicySpec
from policies.lerobot.export import Export, Feature, backbone_sha256, read_export

NEVER = ("sac", "tdmpc", "vqbet", "reward_classifier", "sarm")
"""Types that predict no chunk from a batch of observations alone."""


class LeRobotConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a policy that LeRobot 0.4 exported.

    path: its folder on this host; a checkpoint needs it no more. backbone: folder with the
    configuration and tokenizer of its language model, if it has one; every host that makes the
    policy reads it. rename: from the robot's observation keys to the policy's. n_action_steps:
    None for the policy's own. statistics: by which it normalises, the exported ones or, but for
    pictures, those of the run's demonstrations. task_bytes: longest instruction, as UTF-8, of
    policies that are told one. exported: what the folder said; a checkpoint has it.
    """

    path: str | None = None
    backbone: str | None = None
    rename: dict[str, str] | None = None
    n_action_steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    statistics: Literal["exported", "data"] = "exported"
    task_bytes: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256
    exported: Export | None = None

    has_density: ClassVar[bool] = False
    learns_without_actions: ClassVar[bool] = False
    acts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Read the folder. ConfigError for one that cannot be used."""
        exported = self.exported
        if exported is None:
            if self.path is None:
                raise ConfigError("policy.path is missing: the folder of a LeRobot policy")
            exported = read_export(Path(self.path))
            backbone = _find_backbone(exported, self.backbone)
            if backbone is not None:
                msgspec.structs.force_setattr(self, "backbone", str(backbone.resolve()))
                seal = backbone_sha256(backbone)
                exported = msgspec.structs.replace(exported, backbone_sha256=seal)
            msgspec.structs.force_setattr(self, "path", str(Path(self.path).resolve()))
            msgspec.structs.force_setattr(self, "exported", exported)
        if exported.type in NEVER:
            raise ConfigError(
                f"LeRobot's '{exported.type}' predicts no chunks from observations alone; "
                "act, diffusion, smolvla and others that have a chunk_size do"
            )
        if self.statistics == "data":
            odd = [m for k, m in exported.normalization.items() if m == "QUANTILE10"]
            if odd:
                raise ConfigError("policy.statistics=data: QUANTILE10 is not known of data here")

    @property
    def export(self) -> Export:
        """What the folder said."""
        assert self.exported is not None
        return self.exported

    @property
    def n_obs_steps(self) -> int:
        """To."""
        return self._count("n_obs_steps")

    @property
    def horizon(self) -> int:
        """H, from the present step on; LeRobot's diffusion counts from the oldest observation."""
        if self.export.type == "diffusion":
            return self._count("horizon") - self.n_obs_steps + 1
        return self._count("chunk_size")

    @property
    def future(self) -> tuple[int, ...]:
        """It predicts no later observation."""
        return ()

    def future_keys(self, observation_keys: Iterable[str]) -> tuple[str, ...]:
        """See future."""
        return ()

    def parts(self) -> list[tuple[str, Any, str]]:
        """It names no components."""
        return []

    def model_key(self, key: str) -> str:
        """The model's name of a robot's observation."""
        return {**self.export.rename, **(self.rename or {})}.get(key, key)

    def policy_spec(self, device: DeviceSpec, observation_keys: Iterable[str]) -> PolicySpec:
        """What it reads and produces on a device; ConfigError if they do not fit each other."""
        inputs = self.export.features("input_features")
        observation: dict[str, ArraySpec] = {}
        for key in observation_keys:
            if key not in device.observation:
                raise unknown("observation key", key, device.observation)
            feature = inputs.get(self.model_key(key))
            if feature is not None:
                observation[key] = device.observation[key]
                _check_input(key, device.observation[key], feature, exact=not self._resizes)
        found = {self.model_key(key) for key in observation}
        missing = [k for k in inputs if k not in found and ".empty_camera_" not in k]
        if missing or len(found) < len(observation):
            raise ConfigError(
                f"the LeRobot policy reads {', '.join(inputs)}, of which {', '.join(missing)} is "
                f"not to be had, or twice; the robot has {', '.join(device.observation)}. Name "
                "them alike by policy.rename={ROBOT_KEY: POLICY_KEY}"
            )
        action = self.export.features("output_features").get("action")
        if action is None or action.shape != device.action.shape:
            raise ConfigError(
                f"the LeRobot policy's action is {action}; the robot's has shape "
                f"{device.action.shape}"
            )
        if self.export.tokenizing is not None:
            observation[TASK] = ArraySpec((self.task_bytes,), "uint8")
        executed = self.n_action_steps or min(self._count("n_action_steps"), self.horizon)
        return PolicySpec(observation, device.action, self.n_obs_steps, self.horizon, executed)

    @property
    def _resizes(self) -> bool:
        return self.export.model.get("resize_imgs_with_padding") is not None

    def _count(self, name: str) -> int:
        value = self.export.model.get(name)
        if not isinstance(value, int) or not 1 <= value <= 4096:
            raise ConfigError(
                f"LeRobot's '{self.export.type}' has {name}={value}; a whole number from 1 to 4096 "
                "is needed, since policies here predict chunks of one length"
            )
        return value


def _check_input(key: str, array: ArraySpec, feature: Feature, *, exact: bool) -> None:
    """ConfigError unless an observation is what the model reads."""
    shape = array.shape
    if feature.type == "VISUAL":
        picture = array.dtype == "uint8" and len(shape) == 3 and shape[2] == 3
        fits = picture and (not exact or feature.shape == (3, *shape[:2]))
        wanted = f"a picture of {feature.shape[1:]}, uint8 [height, width, 3]"
    else:
        fits, wanted = shape == feature.shape and array.dtype != "uint8", f"shape {feature.shape}"
    if not fits:
        raise ConfigError(
            f"{key} is {array.dtype} of shape {shape}; the LeRobot policy reads {wanted}"
        )


def _find_backbone(exported: Export, given: str | None) -> Path | None:
    """Folder of the language model; ConfigError if one is needed and is not on this host."""
    named = exported.model.get("vlm_model_name")
    if named is None and exported.tokenizing is None:
        return None
    folder = Path(given or str(named))
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"the LeRobot policy has a language model, {named or 'not named'}; nothing is "
            f"downloaded, and policy.backbone={given} is no folder with its config.json and "
            "tokenizer.json"
        )
    return folder
