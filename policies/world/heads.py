"""Denoising heads: small networks that say what one token, or one action, is at a noise level.

B batch, H chunk, D action, C conditioning, W width, P numbers of a token, … any axes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from policies.networks.dit import zeros
from policies.networks.stages import Context
from policies.networks.time import SinusoidalTime
from policies.world.configs import UVAConfig


class HeadBlock(nn.Module):
    """x + gate · (Linear → SiLU → Linear)(LN(x) (1 + scale) + shift), begun as the identity."""

    def __init__(self, width: int) -> None:
        """width: W."""
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = zeros(nn.Linear(width, 3 * width))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """[…, W]; context: […, W], activated."""
        shift, scale, gate = self.modulation(context).chunk(3, dim=-1)
        return x + gate * self.layers(self.norm(x) * (1 + scale) + shift)


class DenoisingHead(nn.Module):
    """The prediction for P numbers given C, each row by itself (MAR, Li et al. 2024, section 3.2).

    Residual blocks with adaLN-zero. The published head also learns its variance.
    """

    def __init__(self, config: UVAConfig, size: int, cond_dim: int) -> None:
        """size: P. cond_dim: C."""
        super().__init__()
        width = config.head_width
        self.embed_time = SinusoidalTime(config.time_dim)
        self.time = nn.Sequential(
            nn.Linear(config.time_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.cond = nn.Linear(cond_dim, width)
        self.inlet = nn.Linear(size, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(config.head_depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeros(nn.Linear(width, 2 * width))
        self.outlet = zeros(nn.Linear(width, size))

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Prediction […, P] for noisy x, times […] in [0, 1] and conditioning […, C]."""
        return self.refine(x, self.context(time, cond))

    def context(self, time: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """[…, W], of time and conditioning."""
        embedded = self.embed_time(time.flatten()).unflatten(0, time.shape)
        return F.silu(self.time(embedded) + self.cond(cond))

    def refine(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Prediction […, P]."""
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x, context)
        shift, scale = self.modulation(context).chunk(2, dim=-1)
        return self.outlet(self.norm(x) * (1 + scale) + shift)


class ActionHead(nn.Module):
    """A network of chunks (in two stages) whose conditioning, [B, H·W], has W numbers a step.

    Each action is denoised by itself, given its own step's, or all together given all.
    """

    def __init__(self, config: UVAConfig, action_dim: int, horizon: int) -> None:
        """action_dim: D. horizon: H."""
        super().__init__()
        self.joint = config.action_head == "joint"
        self._horizon = horizon
        factor = horizon if self.joint else 1
        self.head = DenoisingHead(config, factor * action_dim, factor * config.width)

    def forward(
        self, x_BHD: torch.Tensor, time: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        """Prediction [B, H, D]; time: [B], or [B, H] if each action is denoised by itself."""
        return self.refine(x_BHD, self.prepare(time, cond_BC))

    def prepare(self, time: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """What modulates the blocks (see Staged)."""
        if self.joint:
            return (self.head.context(time, cond_BC),)
        cond_BHW = cond_BC.unflatten(1, (self._horizon, -1))
        if time.dim() == 1:
            time = time[:, None].expand(-1, self._horizon)
        return (self.head.context(time, cond_BHW),)

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """Prediction [B, H, D] (see Staged)."""
        (own,) = context
        if self.joint:
            return self.head.refine(x_BHD.flatten(1), own).view_as(x_BHD)
        return self.head.refine(x_BHD, own)
