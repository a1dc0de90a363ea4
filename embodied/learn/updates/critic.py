"""The gradient steps of algorithms that learn a critic beside the policy.

Shapes: B batch, H chunk, D action, C conditioning, E members of the critic, K outputs.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from embodied.buffer.sample.windows import EPISODE_SUCCESS, NEXT
from embodied.core.errors import EmbodiedError
from embodied.core.seeds import derive_seed
from embodied.learn.config import ActorCriticConfig, LearnerConfig
from embodied.learn.updates.base import Batch, Group, Optimisers, cosine, warmed

_OUTSIDE = 0.1

Penalty = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict[str, float]]]
"""From a batch's conditioning [B, C] and its own chunks' values [E, B] to what is added to the
critic's loss, and metrics."""


def following(batch: Batch) -> dict[str, torch.Tensor]:
    """The observations after the executed steps, under their own names."""
    return {key.removeprefix(NEXT): x for key, x in batch.items() if key.startswith(NEXT)}


class CriticUpdates(ABC):
    """Three phases: the policy is cloned; its critic learns while it stays; both learn.

    Critic: y = return + discount · the value of the observation after the executed steps. A
    subclass says what that value is, and how the policy learns.
    """

    averaged = "policy."
    setting: ClassVar[str]
    """What to lower if the policy diverges."""

    def __init__(
        self, policy: Any, options: ActorCriticConfig, learner: LearnerConfig, seed: int
    ) -> None:
        """policy: with `policy` and `critic` (ImprovedPolicy)."""
        self._policy = policy
        self._shared = options
        self._learner = learner
        self._online_step = options.cloning_steps + options.offline_steps
        self._target = copy.deepcopy(policy.critic).requires_grad_(False)
        self._rng = torch.Generator("cpu").manual_seed(derive_seed(seed, "critic"))
        self.groups = {
            "policy": Group("policy.", learner.weight_decay, self.setting),
            "critic": Group("critic.", learner.weight_decay, "algorithm.critic_learning_rate"),
        }

    @abstractmethod
    def _criticise(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        """One step of the critic, by `_fit`."""

    @abstractmethod
    def _improve(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        """One step of the policy, by its critic."""

    def acts(self, step: int) -> bool:
        """See Updates: in the last phase."""
        return step >= self._online_step

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See Updates: none, unless a subclass has some."""
        return {}

    def step(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        """See Updates."""
        options = self._shared
        if step < options.cloning_steps:
            return self._clone(batch, optimisers, step)
        metrics = self._criticise(batch, optimisers, step)
        if self.acts(step) and (step - self._online_step) % options.critic_steps == 0:
            metrics |= self._improve(batch, optimisers, step)
        return metrics

    def _clone(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        if self._shared.only_successful:
            batch = self._successes(batch)
            if not len(batch[EPISODE_SUCCESS]):
                return {"loss": 0.0}
        warm = warmed(step, self._learner.warmup_steps)
        rate = self._learner.learning_rate * warm * cosine(step / self._shared.cloning_steps)
        loss, metrics = self._policy.loss(batch)
        norm = optimisers.descend("policy", loss, rate)
        return {**metrics, "grad_norm": norm, "learning_rate": rate}

    def _successes(self, batch: Batch) -> Batch:
        """The rows out of episodes that succeeded."""
        return {key: x[batch[EPISODE_SUCCESS]] for key, x in batch.items()}

    @torch.no_grad()
    def _least(self, observation: Batch, chunk_BHD: torch.Tensor) -> torch.Tensor:
        """The least value of random target members [B], of chunks for observations."""
        q_EB = self._target.values(self._target.encode(observation), chunk_BHD[:, None])[:, :, 0]
        return q_EB[self._members(len(q_EB), q_EB.device)].amin(0)

    def _members(self, members: int, device: torch.device) -> torch.Tensor:
        """Numbers of random members, drawn with replacement."""
        drawn = torch.randint(members, (self._shared.backup_members,), generator=self._rng)
        return drawn.to(device)

    def _fit(
        self,
        batch: Batch,
        next_B: torch.Tensor,
        optimisers: Optimisers,
        step: int,
        penalty: Penalty | None = None,
    ) -> dict[str, float]:
        """One step of the critic towards return + discount · next; the target critic follows."""
        options, critic = self._shared, self._policy.critic
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
        metrics: dict[str, float] = {}
        if penalty is not None:
            added, metrics = penalty(cond_BC, critic.head.value(logits_EBK))
            loss = loss + added
        norm = optimisers.descend("critic", loss, options.critic_learning_rate)
        self._follow()
        return {
            "loss": loss.item(),
            "critic_loss": loss.item(),
            "critic_grad_norm": norm,
            "q": float(critic.head.value(logits_EBK.detach()).mean()),
            "target": float(target_B.mean()),
            "outside": outside,
            **metrics,
        }

    @torch.no_grad()
    def _follow(self) -> None:
        """Target parameters ← (1 − τ) target + τ critic."""
        pairs = zip(self._target.parameters(), self._policy.critic.parameters(), strict=True)
        for target, followed in pairs:
            target.lerp_(followed, self._shared.target_rate)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """See Updates."""
        kept = {f"target/{name}": p for name, p in self._target.named_parameters()}
        return {**kept, **self.parameters(), "rng": self._rng.get_state()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See Updates."""
        with torch.no_grad():
            for name, parameter in self._target.named_parameters():
                parameter.copy_(tensors[f"target/{name}"])
            for name, parameter in self.parameters().items():
                parameter.copy_(tensors[name])
        self._rng.set_state(tensors["rng"])
