"""Later observations as one vector of tokens, and back.

B batch, S later steps, L tokens, P numbers of a token, N numbers of all tokens, M pictures, h w
height and width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from embodied.core.specs import PolicySpec
from policies.world.latents import Latents


class NextObservation(nn.Module):
    """What a world model predicts: of each state and step one token, of each picture its latents.

    groups: (L, P) by key, in the keys' order.
    """

    def __init__(
        self, spec: PolicySpec, keys: Sequence[str], steps: int, latents: Mapping[str, Latents]
    ) -> None:
        """keys: of the spec's observations. steps: S. latents: of those keys that are pictures."""
        super().__init__()
        self.keys = tuple(keys)
        self.cameras = tuple(latents)
        # Module names may hold no dots, keys do.
        self.latents = nn.ModuleList(latents.values()).requires_grad_(False)
        self._shapes = {key: (steps, *spec.observation[key].shape) for key in keys}
        self.groups = tuple(
            (steps * latents[key].tokens, latents[key].size)
            if key in latents
            else (steps, spec.observation[key].size)
            for key in keys
        )
        self._steps = steps

    @property
    def size(self) -> int:
        """N."""
        return sum(tokens * size for tokens, size in self.groups)

    def encode(
        self, found: Mapping[str, torch.Tensor], rng: torch.Generator | None
    ) -> torch.Tensor:
        """[B, N] from normalised states [B, S, …] and pictures [B, S, 3, h, w] in 0..1.

        rng: see Latents.
        """
        return torch.cat([self._encoded(key, found[key], rng) for key in self.keys], dim=1)

    def decode(self, next_BN: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inverse of encode."""
        parts = next_BN.split([tokens * size for tokens, size in self.groups], dim=1)
        return {
            key: self._decoded(key, part.unflatten(1, group))
            for key, part, group in zip(self.keys, parts, self.groups, strict=True)
        }

    def _of(self, key: str) -> Latents:
        found = self.latents[self.cameras.index(key)]
        assert isinstance(found, Latents)
        return found

    def _encoded(self, key: str, value: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
        if key not in self.cameras:
            return value.flatten(1)
        with torch.no_grad():
            tokens_MLP = self._of(key).encode(2 * value.flatten(0, 1) - 1, rng)
        return tokens_MLP.reshape(len(value), -1)

    def _decoded(self, key: str, tokens_BLP: torch.Tensor) -> torch.Tensor:
        if key not in self.cameras:
            return tokens_BLP.reshape(len(tokens_BLP), *self._shapes[key])
        tokens_MLP = tokens_BLP.reshape(len(tokens_BLP) * self._steps, -1, tokens_BLP.shape[-1])
        pictures = ((self._of(key).decode(tokens_MLP) + 1) / 2).clamp(0, 1)
        return pictures.unflatten(0, (-1, self._steps))
