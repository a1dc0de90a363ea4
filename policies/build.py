"""From names and plain mappings to policies."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from embodied.core.config import component
from embodied.core.registry import unknown
from embodied.core.specs import DeviceSpec, PolicySpec
from policies.base import GenerativePolicy
from policies.normalizer import FeatureStats


def policy_spec(
    device: DeviceSpec,
    observation_keys: Iterable[str],
    *,
    n_obs_steps: int,
    horizon: int,
    n_action_steps: int,
) -> PolicySpec:
    """What a policy for `device` reads and produces; ConfigError for keys it does not sense."""
    keys = list(observation_keys)
    for key in keys:
        if key not in device.observation:
            raise unknown("observation key", key, device.observation)
    return PolicySpec(
        observation={key: device.observation[key] for key in keys},
        action=device.action,
        n_obs_steps=n_obs_steps,
        horizon=horizon,
        n_action_steps=n_action_steps,
    )


def build_policy(
    name: str,
    config: Mapping[str, Any],
    device: DeviceSpec,
    observation_keys: Iterable[str],
    stats: Mapping[str, FeatureStats],
    *,
    seed: int,
) -> GenerativePolicy[Any]:
    """A fresh policy for a device.

    config: options of the policy, among them `network`, a mapping with a name of its own.
    stats: statistics of the demonstrations for every observation key (and for "action" if it is
    normalised from data). seed: the initial weights and the training noise depend on it alone.
    """
    cls, typed_config = component("policies", {**config, "name": name}, "policy")
    spec = policy_spec(
        device,
        observation_keys,
        n_obs_steps=typed_config.n_obs_steps,
        horizon=typed_config.horizon,
        n_action_steps=typed_config.n_action_steps,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = cls(spec, typed_config)
    policy.set_statistics(stats)
    policy.seed_training(seed)
    return policy
