"""A convolutional autoencoder with a Gaussian posterior, laid out as diffusers' AutoencoderKL.

Names and shapes of its parameters are that class's, but for the attention's projections, which are
convolutions here; with `fold` 1 it computes the same (Rombach et al. 2022, appendix G).

M pictures, h w height and width, i j those of the latents, C channels, Z latent channels.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from policies.autoencoder.configs import Sizes

_EPS = 1e-6


class AutoencoderKL(nn.Module):
    """Pictures in −1..1 to the mean and log-variance of their latents, and latents to pictures."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        numbers, latent = 3 * sizes.fold**2, sizes.latent_channels
        self.encoder = _ToLatents(sizes, numbers, 2 * latent)
        self.decoder = _FromLatents(sizes, latent, numbers)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if sizes.quant else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if sizes.post_quant else None

    def encode(self, pictures_M3hw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, [M, Z, i, j] each."""
        x = self.encoder(F.pixel_unshuffle(pictures_M3hw, self.sizes.fold))
        if self.quant_conv is not None:
            x = self.quant_conv(x)
        mean, log_var = x.to(pictures_M3hw).chunk(2, dim=1)
        return mean, log_var.clamp(-30.0, 20.0)

    def decode(self, latents_MZij: torch.Tensor) -> torch.Tensor:
        """Pictures [M, 3, h, w]."""
        x = latents_MZij
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return F.pixel_shuffle(self.decoder(x), self.sizes.fold).to(latents_MZij)


class _ToLatents(nn.Module):
    def __init__(self, sizes: Sizes, inputs: int, outputs: int) -> None:
        super().__init__()
        width = sizes.channels[0]
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, channels in enumerate(sizes.channels):
            widths = (width, *[channels] * sizes.blocks)
            made = _Level(widths, sizes.groups, attends=sizes.down[level])
            if level + 1 < len(sizes.channels):
                made.downsamplers.append(_Halved(channels))
            self.down_blocks.append(made)
            width = channels
        self.mid_block = _Middle(width, sizes)
        self.conv_norm_out = nn.GroupNorm(sizes.groups, width, _EPS)
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _FromLatents(nn.Module):
    def __init__(self, sizes: Sizes, inputs: int, outputs: int) -> None:
        super().__init__()
        width = sizes.channels[-1]
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.mid_block = _Middle(width, sizes)
        self.up_blocks = nn.ModuleList()
        for level, channels in enumerate(reversed(sizes.channels)):
            widths = (width, *[channels] * (sizes.blocks + 1))
            made = _Level(widths, sizes.groups, attends=sizes.up[level])
            if level + 1 < len(sizes.channels):
                made.upsamplers.append(_Doubled(channels))
            self.up_blocks.append(made)
            width = channels
        self.conv_norm_out = nn.GroupNorm(sizes.groups, width, _EPS)
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Level(nn.Module):
    """Residual blocks, each followed by attention if it attends, then a change of the sides."""

    def __init__(self, widths: tuple[int, ...], groups: int, *, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _Residual(before, after, groups) for before, after in pairwise(widths)
        )
        self.attentions = nn.ModuleList(
            _Attention(width, groups) for width in widths[1:] if attends
        )
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place, block in enumerate(self.resnets):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[place](x)
        for change in (*self.downsamplers, *self.upsamplers):
            x = change(x)
        return x


class _Middle(nn.Module):
    def __init__(self, width: int, sizes: Sizes) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width, width, sizes.groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(width, sizes.groups)] if sizes.middle else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        return last(x)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, _EPS)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, _EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = None if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nn.Module):
    """One head over all cells."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, _EPS)
        self.to_q, self.to_k, self.to_v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Conv2d(width, width, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.group_norm(x)
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.to_out[0](found.reshape(x.shape))


class _Halved(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Doubled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
