"""Policy-agnostic reinforcement learning: any policy learns the actions that a critic prefers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from embodied.buffer.sample.windows import WindowSpec
from embodied.learn.actor_critic import ActorCritic
from embodied.learn.config import LearnerConfig, PARLConfig

if TYPE_CHECKING:
    from embodied.learn.proposers import Proposers
    from embodied.learn.updates.base import Updates


class PARL(ActorCritic):
    """PA-RL (Mark et al. 2024, arXiv:2412.06685): cloning, an offline critic, then both online.

    The policy acts through the optimiser of actions; see embodied/learn/updates/parl.py.
    """

    Config = PARLConfig

    def __init__(self, config: PARLConfig) -> None:
        super().__init__(config)
        self._options = config
        self.improvement = config.improvement
        self.proposers = config.proposers

    def windows(self, spec: WindowSpec, n_action_steps: int) -> WindowSpec:
        """See ActorCritic; with what an episode came to, if something asks for it."""
        options = self._options
        windows = super().windows(spec, n_action_steps)
        return msgspec.structs.replace(
            windows,
            return_to_go=options.conservatism > 0,
            episode_success=windows.episode_success or options.distil_successes,
        )

    def updates(
        self, policy: Any, options: LearnerConfig, seed: int, proposers: Proposers | None = None
    ) -> Updates:
        """See BC; the policy is an improved one. proposers: who draws in the learner's place."""
        from embodied.learn.updates.parl import PARLUpdates

        return PARLUpdates(policy, self._options, options, seed, proposers)
