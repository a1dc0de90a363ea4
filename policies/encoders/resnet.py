"""ResNet-18 with group normalisation. N pictures, C channels, H W height and width, K keypoints."""

import torch
from torch import nn
from torch.nn import functional as F

from embodied.core.errors import ConfigError
from policies.configs import CHANNELS_PER_GROUP, ResNet18Config

_STRIDE = 32
"""Pixels between two places of the last map."""


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is projected where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        """n_in, n_out: channels."""
        super().__init__()
        self.first = _conv(n_in, n_out, 3, stride)
        self.second = _conv(n_out, n_out, 3, 1)
        same = n_in == n_out and stride == 1
        self.skip = nn.Identity() if same else _conv(n_in, n_out, 1, stride)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, n_in, H, W] → [N, n_out, H / stride, W / stride]."""
        return F.relu(self.second(F.relu(self.first(x_NCHW))) + self.skip(x_NCHW))


class SpatialSoftmax(nn.Module):
    """Expected place of each keypoint under a softmax over the map (Finn et al. 2016)."""

    def __init__(self, n_in: int, keypoints: int) -> None:
        """n_in: channels of the map."""
        super().__init__()
        self.maps = nn.Conv2d(n_in, keypoints, 1, bias=False)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] → [N, 2 K]: K columns, then K rows, both from −1 to 1."""
        maps_NKHW = self.maps(x_NCHW)
        share_NKHW = maps_NKHW.flatten(2).softmax(dim=-1).view_as(maps_NKHW)
        row_H, column_W = (
            torch.linspace(-1, 1, n, device=x_NCHW.device, dtype=share_NKHW.dtype)
            for n in maps_NKHW.shape[2:]
        )
        column_NK = share_NKHW.sum(2) @ column_W
        return torch.cat([column_NK, share_NKHW.sum(3) @ row_H], dim=-1)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) with GroupNorm of 16 channels a group in place of BatchNorm, as
    Diffusion Policy has it: averages of weights then fit without running statistics."""

    Config = ResNet18Config

    def __init__(self, config: ResNet18Config, shape: tuple[int, int]) -> None:
        """shape: height and width of the pictures, any."""
        super().__init__()
        n = config.width
        self.stem = _conv(3, n, 7, 2)
        stages: list[nn.Module] = []
        n_in = n
        for stage in range(4):
            n_out = n << stage
            stages += [ResidualBlock(n_in, n_out, 1 + (stage > 0)), ResidualBlock(n_out, n_out, 1)]
            n_in = n_out
        self.stages = nn.Sequential(*stages)
        if config.pooling == "spatial_softmax":
            if max(shape) <= _STRIDE:
                raise ConfigError(
                    f"of pictures of {shape[0]} × {shape[1]} pixels a map of 1 × 1 is left, which "
                    "has no places: set policy.images.encoder.pooling=average, or sim.image_size "
                    f"so that more than {_STRIDE} pixels are left after policy.images.crop"
                )
            self.pool: nn.Module = SpatialSoftmax(n_in, config.keypoints)
            n_in = 2 * config.keypoints
        else:
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.outlet = nn.Linear(n_in, config.features)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pictures [N, 3, H, W] → [N, features]."""
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU
        x_NCHW = F.max_pool2d(F.relu(self.stem(x_NCHW)), 3, 2, 1)
        return self.outlet(self.pool(self.stages(x_NCHW)))


def _conv(n_in: int, n_out: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False),
        nn.GroupNorm(n_out // CHANNELS_PER_GROUP, n_out),
    )
