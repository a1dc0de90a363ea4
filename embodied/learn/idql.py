"""Implicit Q-learning beside a cloned policy, whose actions the critic ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embodied.learn.actor_critic import ActorCritic
from embodied.learn.config import IDQLConfig, LearnerConfig

if TYPE_CHECKING:
    from embodied.learn.updates.base import Updates


class IDQL(ActorCritic):
    """IDQL (Hansen-Estruch et al. 2023, arXiv:2304.10573): any policy clones what was done, a
    critic is learned from the recorded actions alone, and acts by choosing among proposals.

    See embodied/learn/updates/idql.py.
    """

    Config = IDQLConfig

    def __init__(self, config: IDQLConfig) -> None:
        super().__init__(config)
        self._options = config
        self.improvement = {"proposals": config.proposals, "kept": config.proposals, "steps": 0}

    def updates(self, policy: Any, options: LearnerConfig, seed: int) -> Updates:
        """See BC; the policy is an improved one."""
        from embodied.learn.updates.idql import IDQLUpdates

        return IDQLUpdates(policy, self._options, options, seed)
