"""The action expert. B batch, H chunk, D action, S tokens of the prefix, U width of what read them,
W width of the expert, K layers, N heads, E width of a head, C = K · 2 · S · W conditioning."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from policies.networks.attention import FeedForward
from policies.networks.dit import zeros
from policies.networks.stages import Context
from policies.networks.time import SinusoidalTime
from policies.vla.configs import ExpertConfig


class Memory(nn.Module):
    """What was read of the prefix, as keys and values for each layer of an expert."""

    def __init__(self, depth: int, width: int, expert_width: int) -> None:
        """depth: K. width: U. expert_width: W."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 2 * expert_width) for _ in range(depth))

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, C] from what each layer read, K times [B, S, U]."""
        found = [
            layer(state_BSU).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer, state_BSU in zip(self.layers, states, strict=True)
        ]
        return torch.stack(found, dim=1).flatten(1)


class ExpertLayer(nn.Module):
    """Actions attend to the prefix and to one another, between LayerNorms that the time modulates.

    As in networks/dit.py, but the gates begin at 1: only through them do gradients reach what read
    the prefix, which learns later from 0.
    """

    def __init__(self, width: int, heads: int) -> None:
        """width: W, a multiple of heads."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.outlet = nn.Linear(width, width)
        self.feed_forward = FeedForward(width)
        self.modulation = zeros(nn.Linear(width, 6 * width))

    def forward(
        self, x_BHW: torch.Tensor, memory_B2SW: torch.Tensor, modulation_BM: torch.Tensor
    ) -> torch.Tensor:
        """[B, H, W]; modulation_BM: what `modulation` made of the time, M = 6 W."""
        parts = modulation_BM[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = parts
        qkv = self.query_key_value(self.norm(x_BHW) * (1 + scale) + shift)
        q_BHW, *own = qkv.chunk(3, dim=-1)
        k, v = (
            self._split(torch.cat([kept_BSW, own_BHW], dim=1))
            for kept_BSW, own_BHW in zip(memory_B2SW.unbind(dim=1), own, strict=True)
        )
        mixed = F.scaled_dot_product_attention(self._split(q_BHW), k, v)
        x_BHW = x_BHW + (1 + gate) * self.outlet(mixed.transpose(1, 2).flatten(2))
        change_BHW = self.feed_forward(self.norm(x_BHW) * (1 + scale_ff) + shift_ff)
        return x_BHW + (1 + gate_ff) * change_BHW

    def _split(self, x_BLW: torch.Tensor) -> torch.Tensor:
        """[B, N, L, E]."""
        return x_BLW.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ActionExpert(nn.Module):
    """A network that denoises chunks, one token for each step, and looks at a prefix that another
    network has read (π0, Black et al. 2024, section IV)."""

    def __init__(
        self, config: ExpertConfig, action_dim: int, horizon: int, depth: int, prefix: int
    ) -> None:
        """action_dim: D. horizon: H. depth: K. prefix: S."""
        super().__init__()
        width = config.width
        self.memory_shape = (depth, 2, prefix, width)
        self.embed_time = SinusoidalTime(config.time_dim)
        self.context = nn.Sequential(
            nn.Linear(config.time_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.inlet = nn.Linear(action_dim, width)
        self.positions_HW = nn.Parameter(nn.init.normal_(torch.empty(horizon, width), std=0.02))
        self.layers = nn.ModuleList(ExpertLayer(width, config.heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeros(nn.Linear(width, 2 * width))
        self.outlet = zeros(nn.Linear(width, action_dim))

    def forward(
        self, x_BHD: torch.Tensor, time_B: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        """Prediction [B, H, D] for noisy chunks, times in [0, 1] and a memory of the prefix."""
        return self.refine(x_BHD, self.prepare(time_B, cond_BC))

    def prepare(self, time_B: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """The memory as it is, and what modulates each layer and the outlet (see Staged)."""
        context_BW = F.silu(self.context(self.embed_time(time_B)))
        layers = [layer.get_submodule("modulation") for layer in self.layers]
        return (cond_BC, *(layer(context_BW) for layer in (*layers, self.modulation)))

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """Prediction [B, H, D] (see Staged)."""
        cond_BC, *modulations, last_BM = context
        memories = cond_BC.unflatten(1, self.memory_shape).unbind(dim=1)
        x_BHW = self.inlet(x_BHD) + self.positions_HW
        for layer, memory_B2SW, modulation_BM in zip(
            self.layers, memories, modulations, strict=True
        ):
            x_BHW = layer(x_BHW, memory_B2SW, modulation_BM)
        shift, scale = last_BM[:, None].chunk(2, dim=-1)
        return self.outlet(self.norm(x_BHW) * (1 + scale) + shift)
