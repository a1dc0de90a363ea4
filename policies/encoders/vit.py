"""A small vision transformer. N pictures, H W height and width, L patches, F width."""

import torch
from torch import nn

from embodied.core.errors import ConfigError
from policies.configs import ViTConfig
from policies.networks.attention import Block


class ViT(nn.Module):
    """Patches as tokens with learned positions, averaged at the end (Dosovitskiy et al. 2021)."""

    Config = ViTConfig

    def __init__(self, config: ViTConfig, shape: tuple[int, int]) -> None:
        """shape: height and width of the pictures, at least one patch."""
        super().__init__()
        self.count = patches = (shape[0] // config.patch) * (shape[1] // config.patch)
        if patches == 0:
            raise ConfigError(
                f"pictures of {shape[0]} × {shape[1]} pixels hold no patch of {config.patch}; "
                "lower policy.images.encoder.patch"
            )
        self.inlet = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.positions_LF = nn.Parameter(
            nn.init.normal_(torch.empty(patches, config.width), std=0.02)
        )
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads) for _ in range(config.depth))
        )
        self.norm = nn.LayerNorm(config.width)
        self.outlet = nn.Linear(config.width, config.features)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pictures [N, 3, H, W] → [N, features]."""
        return self.outlet(self._patches(x_NCHW).mean(dim=1))

    def tokens(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, L, features], a token for each patch."""
        return self.outlet(self._patches(x_NCHW))

    def _patches(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        x_NLF = self.inlet(x_NCHW).flatten(2).transpose(1, 2) + self.positions_LF
        return self.norm(self.blocks(x_NLF))
