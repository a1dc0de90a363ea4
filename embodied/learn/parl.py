"""Policy-agnostic reinforcement learning: any policy learns the actions that a critic prefers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from embodied.buffer.read.replay import EpisodeInfo
from embodied.buffer.sample.samplers import StepFlags
from embodied.buffer.sample.sampling import OWN, OwnSource
from embodied.buffer.sample.windows import WindowSpec
from embodied.learn.bc import BC, EpisodePlan
from embodied.learn.config import LearnerConfig, PARLConfig

if TYPE_CHECKING:
    from embodied.learn.updates.base import Updates


class PARL(BC):
    """PA-RL (Mark et al. 2024, arXiv:2412.06685): cloning, an offline critic, then both online.

    The policy acts alone, through the optimiser of actions. Batches come half from demonstrations
    and half from what it did (RLPD, Ball et al. 2023); see embodied/learn/updates/parl.py.
    """

    Config = PARLConfig
    collects = True

    def __init__(self, config: PARLConfig) -> None:
        super().__init__(config)
        self._options = config
        self.critic = config.critic
        self.improvement = config.improvement

    def plan(self, demonstration_ticks: int, rng: np.random.Generator) -> EpisodePlan:
        """The policy acts to the end."""
        return EpisodePlan(None)

    def check_value_range(self, low: float, high: float) -> None:
        """See BC."""
        self._options.check_value_range(low, high)

    def sources(self) -> dict[str, OwnSource]:
        """Demonstrations, and what the policy did since it acts."""
        share = self._options.demonstrations
        return {
            f"{OWN}.demonstrations": OwnSource(self.select, share),
            f"{OWN}.online": OwnSource(select_own_actions, 1 - share, optional=True),
        }

    def windows(self, spec: WindowSpec, n_action_steps: int) -> WindowSpec:
        """With returns over the actions that are executed."""
        return msgspec.structs.replace(
            spec,
            n_step=n_action_steps,
            discount=self._options.discount,
            rewards=self._options.rewards,
        )

    def updates(self, policy: Any, options: LearnerConfig, seed: int) -> Updates:
        """See BC; the policy is an improved one."""
        from embodied.learn.updates.parl import PARLUpdates

        return PARLUpdates(policy, self._options, options, seed)


def select_own_actions(episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
    """Whatever was done in an episode that is no whole demonstration."""
    whole = bool(flags.intervention.all())
    return np.full(len(flags.intervention), not whole)
