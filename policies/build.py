"""From names and plain mappings to policies and critics."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from embodied.core.config import component, convert
from embodied.core.specs import DeviceSpec, PolicySpec
from policies.critics.configs import CriticConfig
from policies.critics.ensemble import EnsembleCritic
from policies.lerobot.policy import LeRobotPolicy
from policies.normalizer import FeatureStats
from policies.specs import policy_spec


def build_policy(
    name: str,
    config: Mapping[str, Any],
    device: DeviceSpec,
    observation_keys: Iterable[str],
    stats: Mapping[str, FeatureStats],
    *,
    seed: int,
) -> Any:
    """A policy for a device, fresh unless its options name a trained one.

    config: options of the policy, among them `network`, a mapping with a name of its own.
    observation_keys: what it reads of the device. stats: statistics of the demonstrations for
    those of these keys that are neither pictures nor text (and for "action" if it is normalised
    from data). seed: the initial weights and the training noise depend on it alone.
    """
    cls, typed_config = component("policies", {**config, "name": name}, "policy")
    spec = policy_spec(device, observation_keys, typed_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = cls(spec, typed_config)
    if isinstance(policy, LeRobotPolicy):
        policy.load_export()
    policy.set_statistics(stats)
    policy.seed_training(seed)
    return policy


def build_critic(
    config: Mapping[str, Any],
    spec: PolicySpec,
    stats: Mapping[str, FeatureStats],
    *,
    seed: int,
) -> EnsembleCritic:
    """Fresh critics of a policy's chunks.

    config: options of CriticConfig. spec: the policy's, or one with fewer observation keys. stats,
    seed: as of `build_policy`; no statistics of actions are needed.
    """
    typed_config = convert(config, CriticConfig, "critic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = EnsembleCritic(spec, typed_config)
    critic.set_statistics(stats)
    return critic
