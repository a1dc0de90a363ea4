"""An ensemble of values of situations, beside a critic of what is done in them.

Shapes: B batch, T history, C conditioning, E members, K outputs.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from policies.critics.ensemble import EnsembleCritic, StackedMLP
from policies.reading import Array, read_observations


class EnsembleValue(nn.Module):
    """V(s): networks as a critic's, but without actions, behind an encoder of their own."""

    def __init__(self, critic: EnsembleCritic) -> None:
        """critic: what it reads, its options, its observations' statistics and its encoder's
        present weights; the networks are fresh, and are where the critic is."""
        super().__init__()
        self.spec = critic.spec
        self.encoder = copy.deepcopy(critic.encoder)
        self.head = copy.deepcopy(critic.head)
        self.network = StackedMLP(critic.config, self.encoder.dim, 0, self.head.outputs)
        with torch.no_grad():
            self.network.outlet.bias_E1O.add_(self.head.start())
        self.to(critic.device)

    def logits(self, obs: Mapping[str, Array], rng: torch.Generator | None = None) -> torch.Tensor:
        """Outputs of every member [E, B, K], for observations [B, T, …]; rng: see
        EnsembleCritic.encode."""
        device = self.network.outlet.bias_E1O.device
        cond_BC = self.encoder(read_observations(obs, self.spec, device), rng)
        nothing_B10 = cond_BC.new_zeros(len(cond_BC), 1, 0)
        return self.network(cond_BC, nothing_B10)[:, :, 0]

    def values(self, obs: Mapping[str, Array]) -> torch.Tensor:
        """Every member's values [E, B]."""
        return self.head.value(self.logits(obs))
