"""The gradient steps of policy-agnostic reinforcement learning.

Mark et al. 2024 (arXiv:2412.06685). Shapes: E members, B batch, n random chunks, p best ones, H
chunk, D action, C conditioning.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from embodied.buffer.sample.windows import EPISODE_SUCCESS, FUTURE_IS_PAD, RETURN_TO_GO
from embodied.core.seeds import derive_seed
from embodied.learn.config import LearnerConfig, PARLConfig
from embodied.learn.proposers import Proposers
from embodied.learn.updates.base import Batch, Optimisers
from embodied.learn.updates.calql import calibrated
from embodied.learn.updates.critic import CriticUpdates, following
from embodied.learn.updates.proposals import ProposalCache

_PROPOSALS = "proposals/"


class PARLUpdates(CriticUpdates):
    """Critic: the chunk of a target is π°pt(next observation), the best that the optimiser of
    actions finds; with conservatism, the regulariser of Cal-QL is added to its loss, in both
    phases. Distillation: the policy's own loss on what that finds for the batch's observations.
    """

    setting = "algorithm.distil_learning_rate"

    def __init__(
        self,
        policy: Any,
        options: PARLConfig,
        learner: LearnerConfig,
        seed: int,
        proposers: Proposers | None = None,
    ) -> None:
        """policy: also with `optimised`. proposers: see ProposalCache."""
        super().__init__(policy, options, learner, seed)
        self._options = options
        self._seed = seed
        self._proposals = ProposalCache(options.proposals_age, proposers)
        self._proposers = proposers

    def step(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        """See CriticUpdates; with proposers, also how old the proposals were."""
        metrics = super().step(batch, optimisers, step)
        return {**metrics, **self._proposals.metrics()}

    def _criticise(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        observation = following(batch)
        ahead_BHD = self._best(observation, optimisers, step, "backup")
        next_B = self._least(observation, ahead_BHD)
        if not self._options.conservatism:
            return self._fit(batch, next_B, optimisers, step)
        here_BHD = self._best(self._observed(batch), optimisers, step, "conservatism")
        penalty = partial(self._penalty, batch, here_BHD, ahead_BHD)
        return self._fit(batch, next_B, optimisers, step, penalty)

    def _best(
        self, observation: Batch, optimisers: Optimisers, step: int, purpose: str
    ) -> torch.Tensor:
        """π°pt: chunks [B, H, D]."""
        seed = derive_seed(self._seed, purpose, step)
        pool_BnHD = self._pool(observation, optimisers, step, seed)
        return self._policy.optimised(observation, pool_BnHD, seed=seed, temperature=None)

    def _observed(self, batch: Batch) -> Batch:
        return {key: batch[key] for key in self._policy.spec.observation}

    def _penalty(
        self,
        batch: Batch,
        here_BHD: torch.Tensor,
        ahead_BHD: torch.Tensor,
        cond_BC: torch.Tensor,
        q_EB: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """α times the mean of R over the batch and random members. here, ahead: the best chunks for
        the observation and for the one that follows, both judged at the former."""
        options, policy = self._options, self._policy
        shape = (len(here_BHD), options.conservatism_actions, *here_BHD.shape[1:])
        share_BnHD = torch.rand(shape, generator=self._rng).to(policy.low_D.device)
        random_BnHD = torch.lerp(policy.low_D, policy.high_D, share_BnHD)
        best_BpHD = torch.stack([here_BHD, ahead_BHD], dim=1)
        q_EBj = policy.critic.values(cond_BC, torch.cat([best_BpHD, random_BnHD], dim=1))
        members = self._members(len(q_EB), q_EB.device)
        q_policy_EBp, q_random_EBn = q_EBj[members].split([2, options.conservatism_actions], dim=2)
        excess = calibrated(
            q_EB[members],
            q_random_EBn,
            q_policy_EBp,
            batch[RETURN_TO_GO],
            copies=options.conservatism_actions,
        ).mean()
        return options.conservatism * excess, {"conservatism": excess.item()}

    def _improve(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        options = self._options
        seed = derive_seed(self._seed, "distillation", step)
        if options.distil_successes:
            batch = self._successes(batch)
            if not len(batch[EPISODE_SUCCESS]):
                return {}
        observation = self._observed(batch)
        best_BHD = self._policy.optimised(
            observation,
            self._pool(observation, optimisers, step, seed),
            seed=seed,
            temperature=options.distil_temperature,
            data_BHD=batch["action"] if options.distil_data else None,
        )
        pad_BH = torch.zeros_like(batch["action_is_pad"])
        labels = {**batch, "action": best_BHD, "action_is_pad": pad_BH}
        if FUTURE_IS_PAD in batch:  # what was seen later came of other actions
            labels[FUTURE_IS_PAD] = torch.ones_like(batch[FUTURE_IS_PAD])
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
                return self._policy.propose(chosen, count, seed=own_seed)

        if self._proposers is not None:
            self._proposers.offer(optimisers.weights, step)
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
