"""Later observations as one vector of tokens, and back.

B batch, S later steps, L tokens, P numbers of a token, N numbers of all tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from embodied.core.specs import PolicySpec


class NextObservation(nn.Module):
    """What a world model predicts: of each state and step one token.

    groups: (L, P) by key, in the keys' order.
    """

    def __init__(self, spec: PolicySpec, keys: Sequence[str], steps: int) -> None:
        """keys: of the spec's observations. steps: S."""
        super().__init__()
        self.keys = tuple(keys)
        self._shapes = {key: (steps, *spec.observation[key].shape) for key in keys}
        self.groups = tuple((steps, spec.observation[key].size) for key in keys)

    @property
    def size(self) -> int:
        """N."""
        return sum(tokens * size for tokens, size in self.groups)

    def encode(self, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, N] from normalised states [B, S, …]."""
        return torch.cat([found[key].flatten(1) for key in self.keys], dim=1)

    def decode(self, next_BN: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inverse of encode."""
        parts = next_BN.split([tokens * size for tokens, size in self.groups], dim=1)
        return {
            key: part.unflatten(1, self._shapes[key])
            for key, part in zip(self.keys, parts, strict=True)
        }
