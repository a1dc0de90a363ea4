"""What algorithms share that learn a critic from demonstrations and from what the policy did."""

from __future__ import annotations

import msgspec
import numpy as np

from embodied.buffer.read.replay import EpisodeInfo
from embodied.buffer.sample.samplers import StepFlags
from embodied.buffer.sample.sampling import OWN, OwnSource
from embodied.buffer.sample.windows import WindowSpec
from embodied.learn.bc import BC, EpisodePlan
from embodied.learn.config import ActorCriticConfig


class ActorCritic(BC):
    """The policy acts alone, to the end of its episodes. Batches come half from demonstrations and
    half from what it did (RLPD, Ball et al. 2023, section 4.1)."""

    collects = True

    def __init__(self, config: ActorCriticConfig) -> None:
        super().__init__(config)
        self._shared = config
        self.critic = config.critic
        self.critic_observations = config.critic_observations

    def plan(self, demonstration_ticks: int, rng: np.random.Generator) -> EpisodePlan:
        """The policy acts to the end."""
        return EpisodePlan(None)

    def check_value_range(self, low: float, high: float) -> None:
        """See BC."""
        self._shared.check_value_range(low, high)

    def sources(self) -> dict[str, OwnSource]:
        """Demonstrations, and what a policy did; either may be missing."""
        share = self._shared.demonstrations
        return {
            f"{OWN}.demonstrations": OwnSource(self.select, share, optional=True),
            f"{OWN}.online": OwnSource(select_own_actions, 1 - share, optional=True),
        }

    def windows(self, spec: WindowSpec, n_action_steps: int) -> WindowSpec:
        """With returns over the actions that are executed, and success if it is asked for."""
        return msgspec.structs.replace(
            spec,
            n_step=n_action_steps,
            discount=self._shared.discount,
            rewards=self._shared.rewards,
            episode_success=self._shared.only_successful,
        )


def select_own_actions(episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
    """Whatever was done in an episode that is no whole demonstration."""
    whole = bool(flags.intervention.all())
    return np.full(len(flags.intervention), not whole)
