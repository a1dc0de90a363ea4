"""Diffusion transformer over the chunk. B batch, H chunk, D action, C conditioning, W width."""

import torch
from torch import nn

from policies.configs import DiTConfig
from policies.networks.attention import Attention, FeedForward
from policies.networks.stages import Context
from policies.networks.time import SinusoidalTime


class ModulatedBlock(nn.Module):
    """Attention and feed-forward between LayerNorms whose shift, scale and gate the context sets.

    adaLN-zero (Peebles and Xie 2023, section 3.2): the gates begin at 0, the block as identity.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        """width: W, a multiple of heads."""
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, qk_norm=qk_norm)
        self.feed_forward = FeedForward(width)
        self.modulation = zeros(nn.Linear(width, 6 * width))

    def forward(
        self, x_BHW: torch.Tensor, modulation_BM: torch.Tensor, first: int | None = None
    ) -> torch.Tensor:
        """[B, H, W]; modulation_BM: what `modulation` made of the context, M = 6 W.

        first: of how many of the tokens the result is wanted, which attend to all; None for all.
        """
        parts = modulation_BM[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = parts
        inner_BHW = self.norm(x_BHW) * (1 + scale) + shift
        x_BHW = x_BHW[:, :first] + gate * self.attention(inner_BHW[:, :first], inner_BHW)
        return x_BHW + gate_ff * self.feed_forward(self.norm(x_BHW) * (1 + scale_ff) + shift_ff)


class DiT(nn.Module):
    """One token for each step of the chunk; all attend to all.

    Time and conditioning act through adaLN-zero alone.
    """

    Config = DiTConfig

    def __init__(self, config: DiTConfig, action_dim: int, horizon: int, cond_dim: int) -> None:
        """action_dim: D. horizon: H. cond_dim: C."""
        super().__init__()
        width = config.width
        self.embed_time = SinusoidalTime(config.time_dim)
        self.context = nn.Sequential(
            nn.Linear(cond_dim + config.time_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.inlet = nn.Linear(action_dim, width)
        if config.positions == "learned":
            self.positions_HW = nn.Parameter(nn.init.normal_(torch.empty(horizon, width), std=0.02))
        else:
            steps_H = torch.arange(horizon) / 1000
            self.register_buffer("positions_HW", SinusoidalTime(width)(steps_H), persistent=False)
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, config.heads, qk_norm=config.qk_norm) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeros(nn.Linear(width, 2 * width))
        self.outlet = zeros(nn.Linear(width, action_dim))

    def forward(
        self, x_BHD: torch.Tensor, time_B: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        """Prediction [B, H, D] for noisy chunks, times in [0, 1] and conditioning [B, C]."""
        return self.refine(x_BHD, self.prepare(time_B, cond_BC))

    def prepare(self, time_B: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """What modulates each block, and the outlet (see Staged)."""
        both_BC = torch.cat([cond_BC, self.embed_time(time_B)], dim=-1)
        context_BW = nn.functional.silu(self.context(both_BC))
        layers = [block.get_submodule("modulation") for block in self.blocks]
        return tuple(layer(context_BW) for layer in (*layers, self.modulation))

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """Prediction [B, H, D] (see Staged)."""
        *modulations, last_BM = context
        x_BHW = self.inlet(x_BHD) + self.positions_HW
        for block, modulation_BM in zip(self.blocks, modulations, strict=True):
            x_BHW = block(x_BHW, modulation_BM)
        shift, scale = last_BM[:, None].chunk(2, dim=-1)
        return self.outlet(self.norm(x_BHW) * (1 + scale) + shift)


def zeros(layer: nn.Linear) -> nn.Linear:
    """The layer, with weights and biases of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
