"""The gradient steps of policy-agnostic reinforcement learning.

Mark et al. 2024 (arXiv:2412.06685). Shapes: B batch, H chunk, D action.
"""

from typing import Any

import torch

from embodied.buffer.sample.windows import FUTURE_IS_PAD
from embodied.core.seeds import derive_seed
from embodied.learn.config import LearnerConfig, PARLConfig
from embodied.learn.updates.base import Batch, Optimisers
from embodied.learn.updates.critic import CriticUpdates


class PARLUpdates(CriticUpdates):
    """Critic: the chunk of a target is π°pt(next observation), the best that the optimiser of
    actions finds. Distillation: the policy's own loss on what that finds for the batch's
    observations.
    """

    setting = "algorithm.distil_learning_rate"

    def __init__(self, policy: Any, options: PARLConfig, learner: LearnerConfig, seed: int) -> None:
        """policy: also with `optimised`."""
        super().__init__(policy, options, learner, seed)
        self._options = options
        self._seed = seed

    def _ahead(
        self, observation: Batch, optimisers: Optimisers, step: int
    ) -> tuple[torch.Tensor, float]:
        seed = derive_seed(self._seed, "backup", step)
        with optimisers.averaged():
            return self._policy.optimised(observation, seed=seed, temperature=None), 0.0

    def _improve(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        options = self._options
        seed = derive_seed(self._seed, "distillation", step)
        data_BHD = batch["action"] if options.distil_data else None
        with optimisers.averaged():
            best_BHD = self._policy.optimised(
                batch, seed=seed, temperature=options.distil_temperature, data_BHD=data_BHD
            )
        pad_BH = torch.zeros_like(batch["action_is_pad"])
        labels = {**batch, "action": best_BHD, "action_is_pad": pad_BH}
        if FUTURE_IS_PAD in batch:  # what was seen later came of other actions
            labels[FUTURE_IS_PAD] = torch.ones_like(batch[FUTURE_IS_PAD])
        loss, metrics = self._policy.loss(labels)
        norm = optimisers.descend("policy", loss, options.distil_learning_rate)
        return {"policy_loss": metrics["loss"], "grad_norm": norm}
