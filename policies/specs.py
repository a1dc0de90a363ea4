"""What policies read and produce, by their options; apart, so that it does not load torch."""

from collections.abc import Iterable
from typing import Protocol

from embodied.core.config import options_of
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
