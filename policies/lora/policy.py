"""Low-rank adaptation of any policy with linear layers: little trains, and no more travels."""

import copy
import fnmatch
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from embodied.core.errors import ConfigError, CorruptDataError, MissingDependencyError
from embodied.core.protocols import Carry
from embodied.core.registry import unknown
from embodied.core.specs import PolicySpec
from policies.checkpoint import construct, load_policy
from policies.folder import CONFIG, read_config
from policies.lerobot.policy import LeRobotPolicy
from policies.lora.config import WHERE, LoRAConfig
from policies.lora.merge import merge_adapters
from policies.normalizer import FeatureStats


class LoRAPolicy(nn.Module):
    """A policy whose weights stay but for low-rank updates of linear layers (Hu et al. 2021).

    Its state, hence checkpoints and what is published, holds the updates alone, with the
    normalisers if those come from the data; the base is read from its folder, and must hash to
    what it did when training began.
    """

    name: ClassVar[str] = "lora"
    Config = LoRAConfig

    def __init__(self, spec: PolicySpec, config: LoRAConfig) -> None:
        """Starts as the base acts. On torch's meta device, the base's weights are not read.

        CorruptDataError: the base is another than at first. ConfigError: it has no layer that
        `targets` names, or is not here.
        """
        super().__init__()
        seal = config.found_sha256()
        if config.base_sha256 not in (None, seal):
            raise CorruptDataError(
                f"{WHERE}={config.folder} is another policy than these updates are for: its "
                f"SHA-256 is {seal}, {config.base_sha256} was adapted; bring that one back"
            )
        self.config = msgspec.structs.replace(config, base_sha256=seal)
        self.base: Any = _load(spec, config)
        if self.base.spec != spec:
            raise CorruptDataError("the adapted policy's spec is not the one of its base")
        self.spec = spec
        self.base.requires_grad_(False)
        for module in self.base.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                raise ConfigError(
                    f"{WHERE} has batch normalisation, whose statistics would change without being "
                    "published; adapt a policy without, or train this one whole"
                )
        _adapt(self.base, config)
        self._kept = {n for n, p in self.named_parameters() if p.requires_grad}
        if isinstance(self.base, LeRobotPolicy) and self.base.config.statistics == "data":
            self._kept |= {n for n, _ in self.named_buffers() if n.startswith("base.normalizers.")}
        self.register_state_dict_post_hook(_keep_updates)

    def set_statistics(self, stats: Mapping[str, FeatureStats]) -> None:
        """The base has its own, unless LeRobot's is told to take the data's."""
        if isinstance(self.base, LeRobotPolicy):
            self.base.set_statistics(stats)

    def init(self, batch: int) -> Carry | None:
        """The base's."""
        return self.base.init(batch)

    def act(
        self,
        carry: Carry | None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[Carry | None, np.ndarray]:
        """As the base, with adapted weights."""
        return self.base.act(carry, obs, prefix=prefix, seed=seed)

    def sample(self, obs: Mapping[str, Any], n: int, *, seed: int) -> torch.Tensor:
        """As the base, with adapted weights."""
        return self.base.sample(obs, n, seed=seed)

    def loss(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """The base's, with adapted weights."""
        return self.base.loss(batch)

    def seed_training(self, seed: int) -> None:
        """Start the base's stream of training noise."""
        self.base.seed_training(seed)

    def training_rng_state(self) -> torch.Tensor:
        """State of the base's stream of training noise."""
        return self.base.training_rng_state()

    def set_training_rng_state(self, state: torch.Tensor) -> None:
        """Continue the base's stream of training noise."""
        self.base.set_training_rng_state(state)


def merged(policy: LoRAPolicy) -> Any:
    """The base with the updates folded in: a policy of its own, which needs no other folder."""
    whole = copy.deepcopy(policy.base)
    merge_adapters(whole)
    return whole


def _load(spec: PolicySpec, config: LoRAConfig) -> Any:
    """The base; without its weights on the meta device."""
    skeleton = torch.get_default_device().type == "meta"
    exported = config.exported
    if exported is not None:
        policy = LeRobotPolicy(spec, exported)
        if not skeleton:
            policy.load_export()
        return policy
    if skeleton:
        return construct(read_config(config.folder / CONFIG))
    return load_policy(config.folder)


def _adapt(base: nn.Module, config: LoRAConfig) -> None:
    """Add the low-rank layers, the only parameters that train then."""
    names = [name for name, module in base.named_modules() if type(module) is nn.Linear]
    chosen = [name for name in names if _matches(name, config.targets)]
    for pattern in config.targets or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise unknown("linear layer in policy.targets", pattern, names)
    if not chosen:
        raise ConfigError(f"{WHERE} has no linear layer that could be adapted")
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"policy=lora needs the package '{error.name}', which is not installed; "
            "pip install 'embodied-stack[vla]' brings it"
        ) from error
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules="|".join(map(re.escape, chosen)),
        lora_dropout=0.0,
        bias="none",
    )
    peft.inject_adapter_in_model(options, base)


def _matches(name: str, targets: tuple[str, ...] | None) -> bool:
    return targets is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in targets)


def _keep_updates(
    policy: LoRAPolicy, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Leave the base's own tensors out of the state."""
    own = {prefix + name for name in policy._kept}
    for key in [k for k in state if k.startswith(prefix + "base.") and k not in own]:
        del state[key]
