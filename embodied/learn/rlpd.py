"""Reinforcement learning with prior data: soft actor-critic that learns from demonstrations too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embodied.learn.actor_critic import ActorCritic
from embodied.learn.config import LearnerConfig, RLPDConfig

if TYPE_CHECKING:
    from embodied.learn.updates.base import Updates


class RLPD(ActorCritic):
    """RLPD (Ball et al. 2023, arXiv:2302.02948) on chunks; see embodied/learn/updates/sac.py.

    The policy acts by itself; its critic is stored with it, as that of an improved policy with one
    proposal, which nothing improves.
    """

    Config = RLPDConfig
    needs_density = True
    improvement = {"proposals": 1, "kept": 1, "steps": 0}

    def __init__(self, config: RLPDConfig) -> None:
        super().__init__(config)
        self._options = config

    def updates(self, policy: Any, options: LearnerConfig, seed: int) -> Updates:
        """See BC; the policy is an improved one."""
        from embodied.learn.updates.sac import SACUpdates

        return SACUpdates(policy, self._options, options, seed)
