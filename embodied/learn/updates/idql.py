"""The gradient steps of implicit Q-learning with a cloned policy.

Kostrikov et al. 2022 (IQL, arXiv:2110.06169), Hansen-Estruch et al. 2023 (IDQL, arXiv:2304.10573).
Shapes: E members, B batch, K outputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from embodied.core.seeds import derive_seed
from embodied.learn.config import IDQLConfig, LearnerConfig
from embodied.learn.updates.base import OWN, Batch, Group, Optimisers
from embodied.learn.updates.critic import CriticUpdates, following


class IDQLUpdates(CriticUpdates):
    """V: towards an expectile, over the recorded actions, of what the target critic says of them
    (IQL, equation 5). Critic: the value of what follows is V's (equation 6), so that no other
    action is ever asked for. Policy: its own loss on the batch's actions, as in cloning.
    """

    setting = "algorithm.actor_learning_rate"

    def __init__(self, policy: Any, options: IDQLConfig, learner: LearnerConfig, seed: int) -> None:
        """policy: its critic also with `make_value` (EnsembleCritic)."""
        super().__init__(policy, options, learner, seed)
        self._options = options
        self.value = policy.critic.make_value(seed=derive_seed(seed, "value"))
        self.groups["value"] = Group(OWN, learner.weight_decay, "algorithm.critic_learning_rate")

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See Updates: V's."""
        return dict(self.value.named_parameters(prefix="value"))

    def _criticise(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        metrics = self._appraise(batch, optimisers)
        with torch.no_grad():
            next_B = self.value.values(following(batch)).mean(dim=0)
        return {**self._fit(batch, next_B, optimisers, step), **metrics}

    def _appraise(self, batch: Batch, optimisers: Optimisers) -> dict[str, float]:
        """One step of V."""
        q_B = self._least(batch, batch["action"])
        logits_EBK = self.value.logits(batch, self._rng)
        loss = expectile_loss(self.value.head, logits_EBK, q_B, self._options.expectile).mean()
        norm = optimisers.descend("value", loss, self._options.critic_learning_rate)
        v = float(self.value.head.value(logits_EBK.detach()).mean())
        return {"value_loss": loss.item(), "value_grad_norm": norm, "v": v}

    def _improve(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        loss, metrics = self._policy.loss(batch)
        norm = optimisers.descend("policy", loss, self._options.actor_learning_rate)
        return {"policy_loss": metrics["loss"], "grad_norm": norm}


def expectile_loss(
    head: Any, logits: torch.Tensor, target: torch.Tensor, expectile: float
) -> torch.Tensor:
    """The loss [...] of a value head for outputs [..., K], times |expectile − (target < value)|.

    It comes to rest where the value is the targets' expectile, with any head: that is the mean of
    the targets so weighted, and the mean is what a head learns.
    """
    below = target < head.value(logits.detach())
    weight = torch.where(below, 1 - expectile, expectile)
    return weight * head.loss(logits, target)
