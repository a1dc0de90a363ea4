"""Conditional 1-D U-Net. Shapes: B batch, H chunk, D action, C conditioning, N channels, L length.

The architecture of Diffusion Policy (Chi et al. 2023, section 3.1 and appendix): residual
convolution blocks along the chunk, modulated by FiLM (Perez et al. 2018) from the observation
and the time. Unlike its code, every level but the deepest has a skip connection.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from policies.configs import Unet1DConfig
from policies.networks.stages import Context
from policies.networks.time import SinusoidalTime


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

    def __init__(self, n_in: int, n_out: int, n_context: int, config: Unet1DConfig):
        """n_in, n_out: channels. n_context: size of the context vector."""
        super().__init__()
        self.first = ConvBlock(n_in, n_out, config.kernel_size, config.n_groups)
        self.second = ConvBlock(n_out, n_out, config.kernel_size, config.n_groups)
        self.film = nn.Linear(n_context, 2 * n_out)
        self.skip = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def modulation(self, context_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of every channel, each [B, n_out, 1], from the activated context."""
        scale_BN1, shift_BN1 = self.film(context_BC)[..., None].chunk(2, dim=1)
        return 1 + scale_BN1, shift_BN1

    def forward(
        self, x_BNL: torch.Tensor, scale_BN1: torch.Tensor, shift_BN1: torch.Tensor
    ) -> torch.Tensor:
        """[B, n_in, L] → [B, n_out, L]."""
        h_BNL = torch.addcmul(shift_BN1, self.first(x_BNL), scale_BN1)
        return self.second(h_BNL) + self.skip(x_BNL)


class ConditionalUnet1D(nn.Module):
    """U-Net along the chunk; any horizon is padded to a multiple of the down-sampling."""

    Config = Unet1DConfig

    def __init__(self, config: Unet1DConfig, action_dim: int, horizon: int, cond_dim: int) -> None:
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
        return self.refine(x_BHD, self.prepare(time_B, cond_BC))

    def prepare(self, time_B: torch.Tensor, cond_BC: torch.Tensor) -> Context:
        """Scales and shifts of all blocks (see Staged)."""
        context_BC = torch.cat([self.time_mlp(self.embed_time(time_B)), cond_BC], dim=-1)
        active_BC = F.mish(context_BC)
        films = (block.modulation(active_BC) for block in self._blocks())
        return tuple(itertools.chain.from_iterable(films))

    def refine(self, x_BHD: torch.Tensor, context: Context) -> torch.Tensor:
        """Prediction [B, H, D] (see Staged)."""
        films = iter(context)
        h_BNL = x_BHD.transpose(1, 2)
        if self.padding:
            h_BNL = F.pad(h_BNL, (0, self.padding), mode="replicate")
        skips: list[torch.Tensor] = []
        for level, blocks in enumerate(self.down):
            h_BNL = _apply(blocks, h_BNL, films)
            if level < len(self.shrink):
                skips.append(h_BNL)
                h_BNL = self.shrink[level](h_BNL)
        h_BNL = _apply(self.middle, h_BNL, films)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            h_BNL = torch.cat([grow(h_BNL), skips.pop()], dim=1)
            h_BNL = _apply(blocks, h_BNL, films)
        out_BHD = self.outlet(self.last(h_BNL)).transpose(1, 2)
        return out_BHD[:, : x_BHD.shape[1]]

    def _blocks(self) -> Iterator[FilmBlock]:
        """In the order of `refine`."""
        for blocks in (*self.down, self.middle, *self.up):
            for block in blocks.children():
                assert isinstance(block, FilmBlock)
                yield block


def _apply(blocks: nn.Module, x_BNL: torch.Tensor, films: Iterator[torch.Tensor]) -> torch.Tensor:
    for block in blocks.children():
        x_BNL = block(x_BNL, next(films), next(films))
    return x_BNL
