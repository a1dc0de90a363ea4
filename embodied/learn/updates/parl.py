"""The gradient steps of policy-agnostic reinforcement learning.

Mark et al. 2024 (arXiv:2412.06685). Shapes: B batch, H chunk, D action.
"""

from collections.abc import Mapping
from typing import Any

import torch

from embodied.core.seeds import derive_seed
from embodied.learn.config import LearnerConfig, PARLConfig
from embodied.learn.updates.base import Batch, Optimisers
from embodied.learn.updates.critic import CriticUpdates
from embodied.learn.updates.proposals import ProposalCache

_PROPOSALS = "proposals/"


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
        self._proposals = ProposalCache(options.proposals_age)

    def _ahead(
        self, observation: Batch, optimisers: Optimisers, step: int
    ) -> tuple[torch.Tensor, float]:
        seed = derive_seed(self._seed, "backup", step)
        pool_BnHD = self._pool(observation, optimisers, step, seed)
        best_BHD = self._policy.optimised(observation, pool_BnHD, seed=seed, temperature=None)
        return best_BHD, 0.0

    def _improve(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        options = self._options
        seed = derive_seed(self._seed, "distillation", step)
        observation = {key: batch[key] for key in self._policy.spec.observation}
        best_BHD = self._policy.optimised(
            observation,
            self._pool(observation, optimisers, step, seed),
            seed=seed,
            temperature=options.distil_temperature,
            data_BHD=batch["action"] if options.distil_data else None,
        )
        pad_BH = torch.zeros_like(batch["action_is_pad"])
        labels = {**batch, "action": best_BHD, "action_is_pad": pad_BH}
        loss, metrics = self._policy.loss(labels)
        norm = optimisers.descend("policy", loss, options.distil_learning_rate)
        return {"policy_loss": metrics["loss"], "grad_norm": norm}

    def _pool(
        self, observation: Batch, optimisers: Optimisers, step: int, seed: int
    ) -> torch.Tensor:
        """Proposals [B, n, H, D] of the averaged policy."""
        count = self._policy.config.improvement.proposals

        def draw(chosen: Batch) -> torch.Tensor:
            own_seed = derive_seed(seed, "proposals")
            with optimisers.averaged():
                return self._policy.policy.sample(chosen, count, seed=own_seed)

        return self._proposals.of(observation, step, draw)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """See Updates."""
        kept = self._proposals.tensors()
        return {**super().tensors(), **{_PROPOSALS + name: x for name, x in kept.items()}}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Updates."""
        super().load(tensors)
        kept = {
            name.removeprefix(_PROPOSALS): x
            for name, x in tensors.items()
            if name.startswith(_PROPOSALS)
        }
        self._proposals.load(kept, self._policy.critic.device)
