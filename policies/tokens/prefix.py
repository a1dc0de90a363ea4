"""From tokens of observations to a prefix. B batch, S tokens, W width."""

from collections.abc import Sequence

import torch
from torch import nn


class Prefix(nn.Module):
    """Tokens of all parts of an observation in one width, with learned positions."""

    def __init__(self, sizes: Sequence[tuple[int, int]], width: int) -> None:
        """sizes: how many tokens a part has, and their size (ObservationEncoder.token_sizes)."""
        super().__init__()
        self.inlets = nn.ModuleList(nn.Linear(size, width) for _, size in sizes)
        positions_SW = torch.empty(sum(count for count, _ in sizes), width)
        self.positions_SW = nn.Parameter(nn.init.normal_(positions_SW, std=0.02))

    def forward(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, S, W] from the parts' tokens."""
        tokens = [inlet(part) for inlet, part in zip(self.inlets, parts, strict=True)]
        return torch.cat(tokens, dim=1) + self.positions_SW
