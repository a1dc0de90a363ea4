"""The noise levels that a diffusion is trained on. B batch, N training steps."""

from bisect import bisect_left

import torch
from torch import nn

from policies.conversions import Scalar


class Schedule(nn.Module):
    """ᾱ by training step t, and the network's time, t / N, by log-SNR."""

    alpha_bar_N: torch.Tensor
    rising_log_snr_N: torch.Tensor

    def __init__(self, alpha_bar_N: torch.Tensor) -> None:
        """alpha_bar_N: falling, of the training steps."""
        super().__init__()
        self.register_buffer("alpha_bar_N", alpha_bar_N.clone(), persistent=False)
        rising_N = torch.logit(alpha_bar_N.double()).flip(0)
        self._rising_log_snrs: list[float] = rising_N.tolist()
        self.register_buffer("rising_log_snr_N", rising_N.float(), persistent=False)

    def __len__(self) -> int:
        """N."""
        return len(self._rising_log_snrs)

    def time_of(self, log_snr: Scalar) -> Scalar:
        """The network's time, interpolated between those that it is trained on."""
        if isinstance(log_snr, torch.Tensor):
            return self._times(log_snr)
        grid = self._rising_log_snrs
        right = min(max(bisect_left(grid, log_snr), 1), len(grid) - 1)
        part = (log_snr - grid[right - 1]) / (grid[right] - grid[right - 1])
        return (len(grid) - right - min(max(part, 0.0), 1.0)) / len(grid)

    def _times(self, log_snr_B: torch.Tensor) -> torch.Tensor:
        grid_N = self.rising_log_snr_N
        right_B = torch.searchsorted(grid_N, log_snr_B.to(grid_N)).clamp(1, len(grid_N) - 1)
        low_B, high_B = grid_N[right_B - 1], grid_N[right_B]
        part_B = ((log_snr_B - low_B) / (high_B - low_B)).clamp(0, 1)
        return (len(grid_N) - right_B - part_B) / len(grid_N)
