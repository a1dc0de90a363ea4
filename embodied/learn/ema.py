"""Exponential moving average of a policy's parameters."""

from collections.abc import Mapping

import torch
from torch import nn

from embodied.core.errors import ConfigError, CorruptDataError


class EMA:
    """Averages θ̄ ← d θ̄ + (1 − d) θ with d = min(decay, 1 − (1 + k)^(−power)), k updates so far.

    The power schedule forgets the initial weights at once (Karras et al. 2024, section 3.1;
    Diffusion Policy uses power .75). Buffers, such as normalisers, are not averaged.
    """

    def __init__(
        self, policy: nn.Module, *, decay: float = 0.9999, power: float = 0.75, prefix: str = ""
    ) -> None:
        """Start at the policy's present parameters. decay: largest d. power: 0 averages nothing.
        prefix: parameters of other names are left alone, as are those that are not trained."""
        if not (0 <= decay < 1 and power >= 0):
            raise ConfigError(
                f"decay is {decay} and power {power}; they need 0 ≤ decay < 1, 0 ≤ power"
            )
        self.decay = decay
        self.power = power
        self.updates = 0
        self._average = {
            key: parameter.detach().clone()
            for key, parameter in policy.named_parameters()
            if key.startswith(prefix) and parameter.requires_grad
        }

    @property
    def present_decay(self) -> float:
        """d of the next update."""
        return min(self.decay, 1 - (1 + self.updates) ** -self.power)

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        """Fold in the policy's present parameters."""
        weight = 1 - self.present_decay
        for key, parameter in policy.named_parameters():
            if key in self._average:
                self._average[key].lerp_(parameter, weight)
        self.updates += 1

    def exchange(self, policy: nn.Module) -> None:
        """Put the averages into the policy and its parameters here, without copying: the second
        time all is as it was."""
        for key, parameter in policy.named_parameters():
            if key in self._average:
                self._average[key], parameter.data = parameter.data, self._average[key]

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of the averages by parameter name."""
        return {key: value.clone() for key, value in self._average.items()}

    def load(self, parameters: Mapping[str, torch.Tensor], updates: int) -> None:
        """Continue from saved averages; CorruptDataError if they are not this policy's."""
        if parameters.keys() != self._average.keys():
            odd = sorted(parameters.keys() ^ self._average.keys())
            raise CorruptDataError(f"averages missing or of another network: {', '.join(odd[:4])}")
        for key, value in self._average.items():
            new = parameters[key]
            if new.shape != value.shape or new.dtype != value.dtype:
                raise CorruptDataError(
                    f"the average of {key} is {new.dtype} {tuple(new.shape)}; "
                    f"this policy has {value.dtype} {tuple(value.shape)}"
                )
        for key, value in self._average.items():
            value.copy_(parameters[key])
        self.updates = updates
