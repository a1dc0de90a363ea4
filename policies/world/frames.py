"""Observations of several steps as a grid of tokens, and back.

B batch, S steps, L tokens of a step, P numbers of a token, N numbers of all steps, M of one.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn


class Frames(nn.Module):
    """Each step's keys, one after another, cut into tokens; what a token has too few of is 0.

    tokens: L. size: P. counts_LP: whether a place holds a number.
    """

    counts_LP: torch.Tensor
    _numbers_LP: torch.Tensor
    _places_M: torch.Tensor

    def __init__(self, keys: Sequence[tuple[int, int]]) -> None:
        """keys: of each key how many numbers a step of it has, and a token of it at most."""
        super().__init__()
        self._sizes = [numbers for numbers, _ in keys]
        self.size = max(min(pair) for pair in keys)
        total, rows = sum(self._sizes), list[list[int]]()
        begin = 0
        for numbers, size in keys:
            for first in range(begin, begin + numbers, size):
                row = list(range(first, min(first + size, begin + numbers)))
                rows.append(row + [total] * (self.size - len(row)))
            begin += numbers
        self.tokens = len(rows)
        numbers_LP = np.array(rows)
        counts_LP = numbers_LP < total
        places_M = np.flatnonzero(counts_LP)
        for name, x in (
            ("_numbers_LP", numbers_LP),
            ("counts_LP", counts_LP),
            ("_places_M", places_M),
        ):
            self.register_buffer(name, torch.from_numpy(x), persistent=False)

    def grid(self, x_BN: torch.Tensor) -> torch.Tensor:
        """[B, S, L, P] of a vector that has all steps of a key before those of the next one."""
        steps = x_BN.shape[1] // sum(self._sizes)
        parts = x_BN.split([steps * size for size in self._sizes], dim=1)
        x_BSM = torch.cat([part.unflatten(1, (steps, -1)) for part in parts], dim=2)
        return nn.functional.pad(x_BSM, (0, 1))[..., self._numbers_LP]

    def flat(self, x_BSLP: torch.Tensor) -> torch.Tensor:
        """Inverse of grid."""
        x_BSM = x_BSLP.flatten(2)[..., self._places_M]
        return torch.cat([part.flatten(1) for part in x_BSM.split(self._sizes, dim=2)], dim=1)


def count_hidden(tokens: int, rng: torch.Generator) -> int:
    """How many of L tokens are hidden in training: ⌈L m⌉, the ratio m from a normal of mean 1 and
    deviation .25 that is cut to [.7, 1] (Li et al. 2025, after MAR, Li et al. 2024); E[m] = .867.
    """
    low = torch.special.ndtr(torch.tensor((0.7 - 1) / 0.25, dtype=torch.float64))
    share = low + (0.5 - low) * torch.rand((), generator=rng, dtype=torch.float64)
    ratio = (1 + 0.25 * torch.special.ndtri(share)).item()
    return min(tokens, max(1, _ceil(tokens * ratio)))


def draw_hidden(rows: int, tokens: int, rng: torch.Generator) -> torch.Tensor:
    """Which tokens are hidden, bool [B, L] on the CPU: equally many in each row, at random."""
    ranks_BL = torch.rand((rows, tokens), generator=rng).argsort(dim=1).argsort(dim=1)
    return ranks_BL < count_hidden(tokens, rng)


def reveals(tokens: int, iterations: int) -> list[int]:
    """How many tokens each pass reveals: ⌊L cos(π/2 · k/K)⌋ stay hidden after k of K passes, but
    each pass reveals one at least (MaskGIT, Chang et al. 2022, section 3.3)."""
    left = [tokens]
    passes = min(tokens, iterations)
    for k in range(1, passes):
        angle = torch.tensor(torch.pi / 2 * k / passes, dtype=torch.float64)
        kept = int(tokens * angle.cos().item())
        left.append(max(passes - k, min(left[-1] - 1, kept)))
    left.append(0)
    return [before - after for before, after in pairwise(left)]


def _ceil(x: float) -> int:
    return -int(-x // 1)
