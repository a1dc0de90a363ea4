"""Residual MLP denoiser. Shapes: B batch, H chunk, D action, C conditioning, W width."""

import torch
from torch import nn
from torch.nn import functional as F

from policies.configs import MLPConfig
from policies.networks.stages import Context
from policies.networks.time import SinusoidalTime


class ResidualBlock(nn.Module):
    """x + down(silu(up(LN(x) + context))): pre-LN residual with the conditioning injected."""

    def __init__(self, width: int, hidden: int) -> None:
        """width: W of the residual stream. hidden: units between the two layers."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_BW: torch.Tensor, context_BW: torch.Tensor) -> torch.Tensor:
        """Add one correction to the residual stream [B, W]."""
        return x_BW + self.down(F.silu(self.up(self.norm(x_BW) + context_BW)))


class ResidualMLP(nn.Module):
    """Flattens the chunk and refines it by residual blocks that all see conditioning and time."""

    Config = MLPConfig

    def __init__(self, config: MLPConfig, action_dim: int, horizon: int, cond_dim: int) -> None:
        """action_dim: D. horizon: H. cond_dim: C."""
        super().__init__()
        width, size = config.width, horizon * action_dim
        self.embed_time = SinusoidalTime(config.time_dim)
        self.context = nn.Linear(cond_dim + config.time_dim, width)
        self.inlet = nn.Linear(size, width)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, config.hidden or width) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.outlet = nn.Linear(width, size)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(
        self, x_BHD: torch.Tensor, time_B: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        """Prediction [B, H, D] for noisy chunks, times in [0, 1] and conditioning [B, C]."""
        return self.refine(x_BHD, self.prepare(time_B, cond_BC))

    def prepare(self, time_B: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """The activated context [B, W] (see Staged)."""
        both_BC = torch.cat([cond_BC, self.embed_time(time_B)], dim=-1)
        return (F.silu(self.context(both_BC)),)

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """Prediction [B, H, D] (see Staged)."""
        (context_BW,) = context
        h_BW = self.inlet(x_BHD.flatten(1)) + context_BW
        for block in self.blocks:
            h_BW = block(h_BW, context_BW)
        return self.outlet(self.norm(h_BW)).view_as(x_BHD)
