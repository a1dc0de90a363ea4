"""The run's algorithm, and the critic that it may train beside the policy."""

from collections.abc import Mapping
from typing import Any

from embodied.core.config import component, convert, options_of
from embodied.core.errors import ConfigError
from embodied.learn.bc import BC
from policies.configs import ChunkConfig
from policies.critics.configs import CriticConfig, ImprovementConfig


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
