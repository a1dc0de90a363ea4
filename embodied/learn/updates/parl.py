"""The gradient steps of policy-agnostic reinforcement learning.

Mark et al. 2024 (arXiv:2412.06685). Shapes: B batch, H chunk, D action, E members of the critic.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from embodied.core.errors import EmbodiedError
from embodied.core.seeds import derive_seed
from embodied.learn.config import LearnerConfig, PARLConfig
from embodied.learn.updates.base import Batch, Group, Optimisers, cosine, warmed

_NEXT = "next."
_OUTSIDE = 0.1


class PARLUpdates:
    """Three phases: the policy is cloned; its critic learns while it stays; both learn.

    Critic: y = return + discount · min of random target members at π°pt(next observation), the
    best chunk that the optimiser of actions finds. Distillation: the policy's own loss on what
    that finds for the batch's observations.
    """

    averaged = "policy."

    def __init__(self, policy: Any, options: PARLConfig, learner: LearnerConfig, seed: int) -> None:
        """policy: with `policy`, `critic` and `optimised` (ImprovedPolicy)."""
        self._policy = policy
        self._options = options
        self._learner = learner
        self._seed = seed
        self._online_step = options.cloning_steps + options.offline_steps
        self._target = copy.deepcopy(policy.critic).requires_grad_(False)
        self._rng = torch.Generator("cpu").manual_seed(derive_seed(seed, "critic"))
        self.groups = {
            "policy": Group("policy.", learner.weight_decay, "algorithm.distil_learning_rate"),
            "critic": Group("critic.", learner.weight_decay, "algorithm.critic_learning_rate"),
        }

    def acts(self, step: int) -> bool:
        """See Updates: in the last phase."""
        return step >= self._online_step

    def step(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        """See Updates."""
        options = self._options
        if step < options.cloning_steps:
            return self._clone(batch, optimisers, step)
        metrics = self._criticise(batch, optimisers, step)
        if self.acts(step) and (step - self._online_step) % options.critic_steps == 0:
            metrics |= self._distil(batch, optimisers, step)
        return metrics

    def _clone(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        warm = warmed(step, self._learner.warmup_steps)
        rate = self._learner.learning_rate * warm * cosine(step / self._options.cloning_steps)
        loss, metrics = self._policy.loss(batch)
        norm = optimisers.descend("policy", loss, rate)
        return {**metrics, "grad_norm": norm, "learning_rate": rate}

    def _criticise(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        options, critic = self._options, self._policy.critic
        ahead = {key.removeprefix(_NEXT): x for key, x in batch.items() if key.startswith(_NEXT)}
        seed = derive_seed(self._seed, "backup", step)
        with torch.no_grad():
            with optimisers.averaged():
                best_BHD = self._policy.optimised(ahead, seed=seed, temperature=None)
            q_EB1 = self._target.values(self._target.encode(ahead), best_BHD[:, None])
            members = torch.randint(len(q_EB1), (options.backup_members,), generator=self._rng)
            next_B = q_EB1[members.to(q_EB1.device), :, 0].amin(0)
            target_B = batch["return"] + batch["discount"] * next_B
            outside = float(critic.head.outside(target_B))
        if outside > _OUTSIDE:
            raise EmbodiedError(
                f"{outside:.0%} of step {step}'s target values, which lie between "
                f"{float(target_B.min()):.3g} and {float(target_B.max()):.3g}, are beyond what "
                "algorithm.critic.head can say: widen its low and high"
            )
        cond_BC = critic.encode(batch, self._rng)
        logits_EBK = critic.logits(cond_BC, batch["action"][:, None])[:, :, 0]
        loss = critic.head.loss(logits_EBK, target_B).mean()
        norm = optimisers.descend("critic", loss, options.critic_learning_rate)
        self._follow()
        return {
            "loss": loss.item(),
            "critic_loss": loss.item(),
            "critic_grad_norm": norm,
            "q": float(critic.head.value(logits_EBK.detach()).mean()),
            "target": float(target_B.mean()),
            "outside": outside,
        }

    def _distil(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        options = self._options
        seed = derive_seed(self._seed, "distillation", step)
        data_BHD = batch["action"] if options.distil_data else None
        with optimisers.averaged():
            best_BHD = self._policy.optimised(
                batch, seed=seed, temperature=options.distil_temperature, data_BHD=data_BHD
            )
        pad_BH = torch.zeros_like(batch["action_is_pad"])
        labels = {**batch, "action": best_BHD, "action_is_pad": pad_BH}
        loss, metrics = self._policy.loss(labels)
        norm = optimisers.descend("policy", loss, options.distil_learning_rate)
        return {"policy_loss": metrics["loss"], "grad_norm": norm}

    @torch.no_grad()
    def _follow(self) -> None:
        """Target parameters ← (1 − τ) target + τ critic."""
        pairs = zip(self._target.parameters(), self._policy.critic.parameters(), strict=True)
        for target, followed in pairs:
            target.lerp_(followed, self._options.target_rate)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """See Updates."""
        kept = {f"target/{name}": p for name, p in self._target.named_parameters()}
        return {**kept, "rng": self._rng.get_state()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Updates."""
        with torch.no_grad():
            for name, parameter in self._target.named_parameters():
                parameter.copy_(tensors[f"target/{name}"])
        self._rng.set_state(tensors["rng"])
