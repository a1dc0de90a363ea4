"""Sinusoidal embedding of a time in [0, 1]. Shapes: B batch, E embedding."""

import math

import numpy as np
import torch
from torch import nn

TIME_SCALE = 1000.0
MAX_PERIOD = 10_000.0


class SinusoidalTime(nn.Module):
    """Time [B] in [0, 1] → sines and cosines [B, E] of 1000·time.

    Periods grow geometrically from 2π to 2π·10⁴, as in "Attention is all you need", section 3.5.
    """

    frequencies_F: torch.Tensor

    def __init__(self, dim: int) -> None:
        """dim: E, even and at least 4."""
        super().__init__()
        half = dim // 2
        frequencies_F = TIME_SCALE * np.exp(-math.log(MAX_PERIOD) * np.linspace(0, 1, half))
        self.register_buffer(
            "frequencies_F", torch.as_tensor(frequencies_F, dtype=torch.float32), persistent=False
        )

    def forward(self, time_B: torch.Tensor) -> torch.Tensor:
        """Embed times [B] as [B, E], in their own precision."""
        angle_BF = time_B[:, None] * self.frequencies_F.to(time_B.dtype)
        return torch.cat([angle_BF.sin(), angle_BF.cos()], dim=-1)
