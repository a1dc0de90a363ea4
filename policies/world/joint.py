"""A transformer over a chunk and what is seen after it, each at a noise level of its own.

B batch, H chunk, D action, C what was observed, L tokens of the next observation, P numbers of such
a token, N of them all, R registers, W width.
"""

from collections.abc import Sequence

import torch
from torch import nn

from policies.networks.dit import ModulatedBlock, zeros
from policies.networks.stages import Context
from policies.networks.time import SinusoidalTime
from policies.world.configs import UWMConfig


class JointTransformer(nn.Module):
    """Tokens [actions | next observation | registers]; all attend to all (Zhu et al. 2025).

    What was observed, and both times, act through adaLN-zero alone. As a network of chunks
    (`forward`, in two stages) it is told of the next observation by its conditioning,
    [B, C + 1 + N]: what was observed, the next observation's time, and what it is at that time. For
    [B, C] the next observation has no tokens, and its time is the last.
    """

    def __init__(
        self,
        config: UWMConfig,
        action_dim: int,
        horizon: int,
        groups: Sequence[tuple[int, int]],
        cond_dim: int,
        last_time: float,
    ) -> None:
        """action_dim: D. horizon: H. cond_dim: C. groups: (L, P) of each kind of token; the next
        observation, N numbers, is one group after the other. last_time: of pure noise."""
        super().__init__()
        self.last_time = last_time
        width = config.width
        self.horizon = horizon
        self.groups = tuple(groups)
        self._sizes = [tokens * size for tokens, size in groups]
        self._parts = [cond_dim, 1, sum(self._sizes)]
        self.embed_time = SinusoidalTime(config.time_dim)
        self.context = nn.Sequential(
            nn.Linear(cond_dim + 2 * config.time_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.inlet = nn.Sequential(
            nn.Linear(action_dim, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        self.next_inlets = nn.ModuleList(nn.Linear(size, width) for _, size in groups)
        length = horizon + sum(tokens for tokens, _ in groups) + config.registers
        self.registers_RW = nn.Parameter(_normal(config.registers, width))
        self.positions_LW = nn.Parameter(_normal(length, width))
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, config.heads, qk_norm=config.qk_norm) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeros(nn.Linear(width, 2 * width))
        self.outlet = nn.Sequential(
            nn.Linear(width, 4 * width), nn.Mish(), zeros(nn.Linear(4 * width, action_dim))
        )
        self.next_outlets = nn.ModuleList(zeros(nn.Linear(width, size)) for _, size in groups)

    def forward(
        self, x_BHD: torch.Tensor, time_B: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        """The chunk's prediction [B, H, D] for times in [0, 1] and the whole conditioning."""
        return self.refine(x_BHD, self.prepare(time_B, cond_BC))

    def prepare(self, time_B: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """What modulates the blocks and the outlet, and all tokens but the chunk's (see Staged)."""
        if cond_BC.shape[-1] == self._parts[0]:
            modulations = self._modulations(
                cond_BC, time_B, torch.full_like(time_B, self.last_time)
            )
            return (*modulations, self._registers(len(cond_BC)))
        seen_BC, next_time_B1, next_BN = cond_BC.split(self._parts, dim=-1)
        modulations = self._modulations(seen_BC, time_B, next_time_B1[:, 0])
        return (*modulations, self._given(next_BN))

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """The chunk's prediction [B, H, D] (see Staged)."""
        *modulations, given_BLW = context
        return self.outlet(self._run(x_BHD, given_BLW, modulations, self.horizon))

    def both(
        self,
        x_BHD: torch.Tensor,
        time_B: torch.Tensor,
        next_BN: torch.Tensor,
        next_time_B: torch.Tensor,
        seen_BC: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions of the chunk [B, H, D] and of the next observation [B, N]."""
        modulations = self._modulations(seen_BC, time_B, next_time_B)
        x_BLW = self._run(x_BHD, self._given(next_BN), modulations)
        parts = x_BLW[:, self.horizon :].split(
            [*(n for n, _ in self.groups), len(self.registers_RW)], 1
        )
        found = [
            outlet(part).flatten(1)
            for outlet, part in zip(self.next_outlets, parts[:-1], strict=True)
        ]
        return self.outlet(x_BLW[:, : self.horizon]), torch.cat(found, dim=1)

    def _modulations(
        self, seen_BC: torch.Tensor, time_B: torch.Tensor, next_time_B: torch.Tensor
    ) -> list[torch.Tensor]:
        times = [self.embed_time(time) for time in (time_B, next_time_B)]
        context_BW = nn.functional.silu(self.context(torch.cat([seen_BC, *times], dim=-1)))
        layers = [block.get_submodule("modulation") for block in self.blocks]
        return [layer(context_BW) for layer in (*layers, self.modulation)]

    def _given(self, next_BN: torch.Tensor) -> torch.Tensor:
        """Tokens of the next observation and registers, with their positions: [B, L + R, W]."""
        tokens = [
            inlet(part.unflatten(1, group))
            for inlet, part, group in zip(
                self.next_inlets, next_BN.split(self._sizes, dim=1), self.groups, strict=True
            )
        ]
        count = len(self.registers_RW)
        positions_LW = self.positions_LW[self.horizon : len(self.positions_LW) - count]
        registers_BRW = self._registers(len(next_BN)).to(tokens[0])
        return torch.cat([torch.cat(tokens, dim=1) + positions_LW, registers_BRW], dim=1)

    def _registers(self, rows: int) -> torch.Tensor:
        """With their positions [B, R, W]."""
        first = len(self.positions_LW) - len(self.registers_RW)
        return (self.registers_RW + self.positions_LW[first:]).expand(rows, -1, -1)

    def _run(
        self,
        x_BHD: torch.Tensor,
        given_BLW: torch.Tensor,
        modulations: Sequence[torch.Tensor],
        first: int | None = None,
    ) -> torch.Tensor:
        """The first tokens, or all of them, behind the blocks and the modulated norm."""
        *blocks, last_BM = modulations
        chunk_BHW = self.inlet(x_BHD) + self.positions_LW[: self.horizon]
        x_BLW = torch.cat([chunk_BHW, given_BLW.to(chunk_BHW)], dim=1)
        last = len(self.blocks) - 1
        for k, (block, modulation_BM) in enumerate(zip(self.blocks, blocks, strict=True)):
            x_BLW = block(x_BLW, modulation_BM, first if k == last else None)
        shift, scale = last_BM[:, None].chunk(2, dim=-1)
        return self.norm(x_BLW) * (1 + scale) + shift


def _normal(rows: int, width: int) -> torch.Tensor:
    return nn.init.normal_(torch.empty(rows, width), std=0.02)
