"""Conditional 1-D U-Net. Shapes: B batch, H chunk, D action, C conditioning, N channels, L length.

The architecture of Diffusion Policy (Chi et al. 2023, section 3.1 and appendix): residual
convolution blocks along the chunk, modulated by FiLM (Perez et al. 2018) from the observation
and the time. Unlike its code, every level but the deepest has a skip connection.
"""

from typing import Annotated

import msgspec
import torch
from torch import nn
from torch.nn import functional as F

from embodied.core.errors import ConfigError
from policies.networks.time import SinusoidalTime

Channels = Annotated[int, msgspec.Meta(ge=8, le=4096)]


class ConvBlock(nn.Module):
    """Conv1d → GroupNorm → Mish at constant length."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int, n_groups: int) -> None:
        """n_in, n_out: channels."""
        super().__init__()
        self.conv = nn.Conv1d(n_in, n_out, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(n_groups, n_out)

    def forward(self, x_BNL: torch.Tensor) -> torch.Tensor:
        """[B, n_in, L] → [B, n_out, L]."""
        return F.mish(self.norm(self.conv(x_BNL)))


class FilmBlock(nn.Module):
    """Two ConvBlocks with a residual path; the context scales and shifts after the first."""

    def __init__(self, n_in: int, n_out: int, n_context: int, config: "ConditionalUnet1D.Config"):
        """n_in, n_out: channels. n_context: size of the context vector."""
        super().__init__()
        self.first = ConvBlock(n_in, n_out, config.kernel_size, config.n_groups)
        self.second = ConvBlock(n_out, n_out, config.kernel_size, config.n_groups)
        self.film = nn.Linear(n_context, 2 * n_out)
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x_BNL: torch.Tensor, context_BC: torch.Tensor) -> torch.Tensor:
        """[B, n_in, L] → [B, n_out, L]."""
        scale_BN, shift_BN = self.film(F.mish(context_BC)).chunk(2, dim=-1)
        h_BNL = self.first(x_BNL) * (1 + scale_BN[..., None]) + shift_BN[..., None]
        return self.second(h_BNL) + self.skip(x_BNL)


class ConditionalUnet1D(nn.Module):
    """U-Net along the chunk; any horizon is padded to a multiple of the down-sampling."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Sizes. channels: one entry per level, each level halves the length of the one before."""

        channels: Annotated[tuple[Channels, ...], msgspec.Meta(min_length=1, max_length=6)] = (
            32,
            64,
            128,
        )
        kernel_size: Annotated[int, msgspec.Meta(ge=1, le=15)] = 5
        n_groups: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
        time_dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=2)] = 64

        def __post_init__(self) -> None:
            """Raise ConfigError for combinations that no layer can have."""
            if self.kernel_size % 2 == 0:
                raise ConfigError(f"kernel_size is {self.kernel_size}; it must be odd")
            odd = [n for n in self.channels if n % self.n_groups]
            if odd:
                raise ConfigError(
                    f"channels {odd} are no multiples of n_groups={self.n_groups}; "
                    "change channels or n_groups"
                )

    def __init__(self, config: Config, action_dim: int, horizon: int, cond_dim: int) -> None:
        """action_dim: D. horizon: H, any. cond_dim: C."""
        super().__init__()
        channels = config.channels
        factor = 2 ** (len(channels) - 1)
        self.padding = -horizon % factor
        self.embed_time = SinusoidalTime(config.time_dim)
        self.time_mlp = nn.Sequential(
            nn.Linear(config.time_dim, 4 * config.time_dim),
            nn.Mish(),
            nn.Linear(4 * config.time_dim, config.time_dim),
        )
        n_context = config.time_dim + cond_dim

        def pair(n_in: int, n_out: int) -> nn.ModuleList:
            return nn.ModuleList(
                [
                    FilmBlock(n_in, n_out, n_context, config),
                    FilmBlock(n_out, n_out, n_context, config),
                ]
            )

        ins = (action_dim, *channels[:-1])
        self.down = nn.ModuleList(pair(a, b) for a, b in zip(ins, channels, strict=True))
        self.shrink = nn.ModuleList(nn.Conv1d(n, n, 3, 2, 1) for n in channels[:-1])
        self.middle = pair(channels[-1], channels[-1])
        steps = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(a, b, 4, 2, 1) for a, b in steps)
        self.up = nn.ModuleList(pair(2 * b, b) for _, b in steps)
        self.last = ConvBlock(channels[0], channels[0], config.kernel_size, config.n_groups)
        self.outlet = nn.Conv1d(channels[0], action_dim, 1)
        nn.init.zeros_(self.outlet.weight)
        if self.outlet.bias is not None:
            nn.init.zeros_(self.outlet.bias)

    def forward(
        self, x_BHD: torch.Tensor, time_B: torch.Tensor, cond_BC: torch.Tensor
    ) -> torch.Tensor:
        """Prediction [B, H, D] for noisy chunks, times in [0, 1] and conditioning [B, C]."""
        context_BC = torch.cat([self.time_mlp(self.embed_time(time_B)), cond_BC], dim=-1)
        h_BNL = F.pad(x_BHD.transpose(1, 2), (0, self.padding), mode="replicate")
        skips: list[torch.Tensor] = []
        for level, blocks in enumerate(self.down):
            h_BNL = _apply(blocks, h_BNL, context_BC)
            if level < len(self.shrink):
                skips.append(h_BNL)
                h_BNL = self.shrink[level](h_BNL)
        h_BNL = _apply(self.middle, h_BNL, context_BC)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            h_BNL = torch.cat([grow(h_BNL), skips.pop()], dim=1)
            h_BNL = _apply(blocks, h_BNL, context_BC)
        out_BHD = self.outlet(self.last(h_BNL)).transpose(1, 2)
        return out_BHD[:, : x_BHD.shape[1]]


def _apply(blocks: nn.Module, x_BNL: torch.Tensor, context_BC: torch.Tensor) -> torch.Tensor:
    for block in blocks.children():
        x_BNL = block(x_BNL, context_BC)
    return x_BNL
