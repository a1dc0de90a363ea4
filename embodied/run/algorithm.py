"""The run's algorithm, and the critic that it may train beside the policy."""

from collections.abc import Mapping
from typing import Any

import msgspec

from embodied.buffer.sample.sampling import SamplingConfig
from embodied.core.config import component, convert, options_of
from embodied.core.errors import ConfigError
from embodied.core.instructions import TASK
from embodied.core.specs import DeviceSpec, PolicySpec
from embodied.learn.bc import BC
from embodied.run.observing import read_keys
from policies.configs import ChunkConfig
from policies.critics.configs import CriticConfig, ImprovementConfig
from policies.specs import union_spec


def make_algorithm(options: Mapping[str, Any]) -> BC:
    """The algorithm of this name and these options; ConfigError if they cannot be."""
    cls, typed = component("algorithms", options, "algorithm")
    return cls(typed)


def critic_options(algorithm: BC, n_action_steps: int) -> dict[str, Any]:
    """Options of the algorithm's critic, as of CriticConfig: it judges what is executed."""
    options = dict(algorithm.critic or {})
    if "horizon" in options:
        raise ConfigError(
            "algorithm.critic.horizon is policy.n_action_steps, what is executed of a chunk: leave "
            "it out"
        )
    return {**options, "horizon": n_action_steps}


def critic_spec(algorithm: BC, device: DeviceSpec, policy: PolicySpec) -> PolicySpec:
    """What the critic of this policy reads and judges; the policy's own if there is none.

    ConfigError for an observation that the device does not have.
    """
    if algorithm.critic is None:
        return policy
    told = algorithm.critic.get("language") is not None
    if told and TASK not in policy.observation:
        raise ConfigError(
            "algorithm.critic.language reads instructions, and this policy is given none: set "
            "policy.language as well, or leave it null"
        )
    if algorithm.critic_observations is None:
        return policy
    keys = read_keys(device, algorithm.critic_observations)
    observation = {key: device.observation[key] for key in keys}
    if told:
        observation[TASK] = policy.observation[TASK]
    return msgspec.structs.replace(policy, observation=observation)


def observed_spec(algorithm: BC, device: DeviceSpec, policy: PolicySpec) -> PolicySpec:
    """What the policy and its critic read."""
    judged = critic_spec(algorithm, device, policy)
    return union_spec(("policy", "critic"), (policy, judged), horizon=policy.horizon)


def improvement_options(algorithm: BC) -> ImprovementConfig:
    """How the critic improves what the policy proposes."""
    return convert(algorithm.improvement, ImprovementConfig, "algorithm.improvement")


def check_critic(algorithm: BC, n_action_steps: int) -> None:
    """Raise ConfigError for a critic that cannot be, or whose values the rewards exceed."""
    if algorithm.critic is None:
        return
    options = convert(critic_options(algorithm, n_action_steps), CriticConfig, "algorithm.critic")
    improvement_options(algorithm)
    head = options_of("value_heads", options.head, "algorithm.critic.head")
    low, high = getattr(head, "low", None), getattr(head, "high", None)
    if low is not None and high is not None:
        algorithm.check_value_range(low, high)


def check_actor(algorithm: BC, policy: ChunkConfig, episodes: int) -> None:
    """Raise ConfigError if the algorithm trains no such policy, or one that commands no robot is
    to be evaluated in so many episodes."""
    if policy.acts and not algorithm.acts:
        raise ConfigError(
            "algorithm=reconstruction trains autoencoders of pictures, and this policy commands a "
            "robot: choose algorithm=bc, or policy=vae"
        )
    if not policy.acts and (algorithm.acts or episodes):
        raise ConfigError(
            "policy=vae is an autoencoder of pictures and commands no robot: it needs "
            "algorithm=reconstruction, evaluation.episodes=0 and evaluation.final_episodes=0"
        )


def check_density(algorithm: BC, policy: ChunkConfig) -> None:
    """Raise ConfigError if the algorithm needs a density that the policy lacks."""
    if algorithm.needs_density and not policy.has_density:
        raise ConfigError(
            f"{type(algorithm).__name__} needs the density of what a policy draws, and this one "
            "has none: choose policy=gaussian, or algorithm=parl, by which any policy learns"
        )


def check_action_free(algorithm: BC, policy: ChunkConfig, sampling: SamplingConfig) -> None:
    """Raise ConfigError for sources without actions of which policy or critic can learn nothing."""
    names = [name for name, source in sampling.sources.items() if not source.actions]
    if not names:
        return
    where = f"sampling.sources.{names[0]}.actions=false"
    if not policy.learns_without_actions:
        raise ConfigError(
            f"{where}: this policy learns nothing from steps without actions; choose a world model "
            "that predicts what will be seen (policy=uwm, or policy=uva with mode video), or leave "
            "the source out"
        )
    if algorithm.critic is not None:
        raise ConfigError(
            f"{where}: {type(algorithm).__name__} learns a critic from recorded actions, and that "
            "source has none; choose algorithm=bc, or another without a critic"
        )
