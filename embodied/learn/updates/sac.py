"""The gradient steps of soft actor-critic on chunks.

Haarnoja et al. 2018 (arXiv:1812.05905). Shapes: B batch, H chunk, D action, E members.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from embodied.learn.config import LearnerConfig, RLPDConfig
from embodied.learn.updates.base import OWN, Batch, Group, Optimisers
from embodied.learn.updates.critic import CriticUpdates, following


class SACUpdates(CriticUpdates):
    """Critic: the chunk of a target is drawn from the policy; with entropy_backup, −α log π of it
    is added. Policy: down α log π − mean Q. Temperature: down α (entropy − target entropy).

    Equations 5, 7 and 18 of the paper. log π is of the steps that are executed, which the critic
    judges, in normalised units: more entropy of the others would cost nothing.
    """

    setting = "algorithm.actor_learning_rate"

    def __init__(self, policy: Any, options: RLPDConfig, learner: LearnerConfig, seed: int) -> None:
        """policy: also with `rsample` in its `policy` (GaussianPolicy)."""
        super().__init__(policy, options, learner, seed)
        self._options = options
        start = math.log(options.initial_temperature)
        device = next(policy.parameters()).device
        self._log_temperature = nn.Parameter(torch.full((1,), start, device=device))
        self.groups["temperature"] = Group(OWN, 0.0, "algorithm.temperature_learning_rate")

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See Updates: log α [1]."""
        return {"log_temperature": self._log_temperature}

    def _draw(self, observation: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunks [B, H, D], and the log-density [B] of what is executed of them."""
        chunk_BHD, log_prob_BH = self._policy.policy.rsample(observation, self._rng)
        return chunk_BHD, log_prob_BH[:, : self._policy.critic.config.horizon].sum(dim=1)

    def _criticise(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        observation = following(batch)
        with torch.no_grad():
            chunk_BHD, log_prob_B = self._draw(observation)
            next_B = self._least(observation, chunk_BHD)
            if self._options.entropy_backup:
                next_B = next_B - self._log_temperature.exp() * log_prob_B
        return self._fit(batch, next_B, optimisers, step)

    def _improve(self, batch: Batch, optimisers: Optimisers, step: int) -> dict[str, float]:
        options, critic = self._options, self._policy.critic
        chunk_BHD, log_prob_B = self._draw(batch)
        with _fixed(critic):
            q_EB1 = critic.values(critic.encode(batch), chunk_BHD[:, None])
        temperature = self._log_temperature.detach().exp()
        loss = (temperature * log_prob_B - q_EB1.mean(dim=0)[:, 0]).mean()
        norm = optimisers.descend("policy", loss, options.actor_learning_rate)
        entropy = -log_prob_B.detach().mean()
        wanted = options.target_entropy * critic.config.horizon * chunk_BHD.shape[2]
        excess = (self._log_temperature.exp() * (entropy - wanted)).sum()
        optimisers.descend("temperature", excess, options.temperature_learning_rate)
        return {
            "policy_loss": loss.item(),
            "grad_norm": norm,
            "entropy": float(entropy),
            "temperature": float(temperature),
        }


@contextmanager
def _fixed(module: nn.Module) -> Generator[None]:
    """Meanwhile gradients go through the module, and none into its parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
