"""Action tokenizers. B batch, H chunk, D action, R rows of tokens, V vocabulary.

A tokenizer writes a normalised chunk [B, H, D] as tokens [B, R, D], numbers below V, whose rows are
decided in order. What it reads back differs from the chunk by no more than it says.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from policies.tokens.configs import BinsConfig, DCTConfig


class Tokenizer(nn.Module, ABC):
    """Normalised chunks to tokens and back. rows: R. vocabulary: V."""

    rows: int
    vocabulary: int

    def __init__(self, config: Any, horizon: int) -> None:
        """horizon: H."""
        super().__init__()
        self.config = config
        self.horizon = horizon

    @abstractmethod
    def encode(self, x_BHD: torch.Tensor) -> torch.Tensor:
        """Tokens [B, R, D], int64, of normalised chunks; numbers beyond ±1 may be cut off."""

    @abstractmethod
    def decode(self, tokens_BRD: torch.Tensor) -> torch.Tensor:
        """The chunks [B, H, D] that tokens stand for."""

    @abstractmethod
    def weights(self, pad_BH: torch.Tensor) -> torch.Tensor:
        """How much each row counts as a label [B, R], from 0 to 1, where steps are padding."""

    @abstractmethod
    def settled(self, committed: int) -> int:
        """How many of the first rows are known from that many of the first actions alone."""


class Bins(Tokenizer):
    """Each number by itself: the nearest of V values from −1 to 1, evenly spaced, both included.

    Row r is step r. A number within ±1 is read back with an error of at most 1 / (V − 1).
    """

    Config = BinsConfig

    values_V: torch.Tensor

    def __init__(self, config: BinsConfig, horizon: int) -> None:
        """See Tokenizer."""
        super().__init__(config, horizon)
        self.rows, self.vocabulary = horizon, config.bins
        values_V = torch.linspace(-1, 1, config.bins)
        self.register_buffer("values_V", values_V, persistent=False)

    def encode(self, x_BHD: torch.Tensor) -> torch.Tensor:
        """See Tokenizer."""
        last = self.vocabulary - 1
        return ((x_BHD.clamp(-1, 1) + 1) * (last / 2)).round().long()

    def decode(self, tokens_BRD: torch.Tensor) -> torch.Tensor:
        """See Tokenizer."""
        return self.values_V[tokens_BRD]

    def weights(self, pad_BH: torch.Tensor) -> torch.Tensor:
        """See Tokenizer: padded steps count nothing."""
        return (~pad_BH).to(self.values_V)

    def settled(self, committed: int) -> int:
        """See Tokenizer: a row for each action."""
        return committed


class DCT(Tokenizer):
    """Each dimension's cosine transform over the chunk, rounded; low frequencies first.

    The quantisation of FAST (Pertsch et al. 2025, section 5), without its byte-pair encoding: row r
    is frequency r, and the frequencies from R on are left out. With the orthonormal DCT-II c = M x
    the error of a dimension is, in squares summed over the chunk, what was left out, Σ c² of those
    frequencies, plus at most R / (4 scale²).
    """

    Config = DCTConfig

    basis_RH: torch.Tensor

    def __init__(self, config: DCTConfig, horizon: int) -> None:
        """See Tokenizer."""
        super().__init__(config, horizon)
        self.rows = max(1, round(config.share * horizon))
        # No orthonormal coefficient of numbers within ±1 exceeds √H.
        self._most = math.ceil(config.scale * math.sqrt(horizon))
        self.vocabulary = 2 * self._most + 1
        self.register_buffer("basis_RH", cosines(horizon)[: self.rows], persistent=False)

    def encode(self, x_BHD: torch.Tensor) -> torch.Tensor:
        """See Tokenizer."""
        coefficients_BRD = self.basis_RH @ x_BHD.to(self.basis_RH)
        whole_BRD = (coefficients_BRD * self.config.scale).round().long()
        return whole_BRD.clamp(-self._most, self._most) + self._most

    def decode(self, tokens_BRD: torch.Tensor) -> torch.Tensor:
        """See Tokenizer."""
        whole_BRD = (tokens_BRD - self._most).to(self.basis_RH)
        return self.basis_RH.T @ (whole_BRD / self.config.scale)

    def weights(self, pad_BH: torch.Tensor) -> torch.Tensor:
        """See Tokenizer: every frequency has part in every step, so a chunk counts by the share of
        its steps that are no padding."""
        share_B1 = (~pad_BH).to(self.basis_RH).mean(dim=1, keepdim=True)
        return share_B1.expand(-1, self.rows)

    def settled(self, committed: int) -> int:
        """See Tokenizer: none."""
        return 0


def cosines(length: int) -> torch.Tensor:
    """The orthonormal DCT-II [k, i]: √(2/L) cos(π (i + ½) k / L), the first row √(1/L)."""
    steps = torch.arange(length, dtype=torch.float64)
    basis = math.sqrt(2 / length) * torch.cos(math.pi / length * steps[:, None] * (steps + 0.5))
    basis[0] = math.sqrt(1 / length)
    return basis.float()
