"""What policies read and produce, by their options; apart, so that it does not load torch."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from embodied.core.config import options_of
from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK
from embodied.core.registry import unknown
from embodied.core.specs import ArraySpec, DeviceSpec, PolicySpec
from policies.configs import ChunkConfig


class KnowsSpec(Protocol):
    """Options that are read off a trained policy, and with them what it reads and produces."""

    @property
    def future(self) -> tuple[int, ...]:
        """As of ChunkConfig."""
        ...

    def future_keys(self, observation_keys: Iterable[str]) -> tuple[str, ...]:
        """As of ChunkConfig."""
        ...

    def policy_spec(self, device: DeviceSpec, observation_keys: Iterable[str]) -> PolicySpec:
        """As the function of this name; keys that it does not read are left out."""
        ...


def policy_spec(
    device: DeviceSpec, observation_keys: Iterable[str], config: ChunkConfig | KnowsSpec
) -> PolicySpec:
    """What a policy for `device` reads and produces; ConfigError for keys it does not sense."""
    if not isinstance(config, ChunkConfig):
        return config.policy_spec(device, observation_keys)
    observation: dict[str, ArraySpec] = {}
    for key in observation_keys:
        if key not in device.observation:
            raise unknown("observation key", key, device.observation)
        observation[key] = device.observation[key]
    for key in config.goals:
        if key not in observation:
            raise unknown("key in policy.goals", key, observation)
        observation[GOAL + key] = observation[key]
    if config.language is not None:
        options = options_of("text_encoders", config.language, "policy.language")
        observation[TASK] = ArraySpec((options.max_bytes,), "uint8")
    return PolicySpec(
        observation, device.action, config.n_obs_steps, config.horizon, config.n_action_steps
    )


def union_spec(labels: Sequence[str], specs: Sequence[PolicySpec], *, horizon: int) -> PolicySpec:
    """Union of the observations, longest history, fewest executed steps; the actions agree."""
    observation: dict[str, ArraySpec] = {}
    owners: dict[str, str] = {}
    for label, spec in zip(labels, specs, strict=True):
        for key, array in spec.observation.items():
            owner = owners.setdefault(key, label)
            if observation.setdefault(key, array) != array:
                raise ConfigError(
                    f"'{owner}' and '{label}' read '{key}' with other specs: {observation[key]} "
                    f"and {array}; policies that are composed must observe the same robot"
                )
    return PolicySpec(
        observation=observation,
        action=specs[0].action,
        n_obs_steps=max(spec.n_obs_steps for spec in specs),
        horizon=horizon,
        n_action_steps=min(spec.n_action_steps for spec in specs),
    )
