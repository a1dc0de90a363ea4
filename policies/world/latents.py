"""What a picture is predicted as: tokens, and back.

M pictures, h w height and width, L tokens, P numbers of a token.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from embodied.core.errors import ConfigError
from policies.world.configs import PatchesConfig


class Latents(nn.Module):
    """Made of its options and the pictures' height and width; its parameters are not trained.

    config: the options, with what was found of them when it was made. tokens: L. size: P.
    """

    config: Any
    tokens: int
    size: int

    @abstractmethod
    def encode(self, pictures_M3hw: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
        """[M, L, P] of about ±1 from pictures [M, 3, h, w] in −1..1; no gradient is needed.

        rng: draws what is random of them in training; None for inference.
        """

    @abstractmethod
    def decode(self, tokens_MLP: torch.Tensor) -> torch.Tensor:
        """Pictures [M, 3, h, w]."""


class Patches(Latents):
    """The pixels of square patches, of the picture or of a smaller one."""

    Config = PatchesConfig

    def __init__(self, config: PatchesConfig, picture: tuple[int, int]) -> None:
        """ConfigError unless the patches fill the picture."""
        super().__init__()
        side = config.patch * config.shrink
        if any(length % side for length in picture):
            raise ConfigError(
                f"policy.latents: pictures are seen as {picture[0]} × {picture[1]} pixels, which "
                f"patches of {side} do not fill (patch × shrink): change one of them, or "
                "policy.images.crop"
            )
        self.config = config
        self._rows = picture[0] // side
        self.tokens = self._rows * (picture[1] // side)
        self.size = 3 * config.patch**2

    def encode(self, pictures_M3hw: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
        """See Latents; nothing of them is random."""
        small = F.avg_pool2d(pictures_M3hw, self.config.shrink)
        return F.pixel_unshuffle(small, self.config.patch).flatten(2).transpose(1, 2)

    def decode(self, tokens_MLP: torch.Tensor) -> torch.Tensor:
        """See Latents; pixels of a smaller picture are repeated."""
        grid = tokens_MLP.transpose(1, 2).unflatten(2, (self._rows, -1))
        small = F.pixel_shuffle(grid, self.config.patch)
        return F.interpolate(small, scale_factor=self.config.shrink, mode="nearest")
