"""Encoders that see more than one thing in what they read. N inputs, L tokens, F features."""

from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class TokenEncoder(Protocol):
    """What an image or text encoder may offer beside its one vector. count: L."""

    count: int

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[N, L, F] of what the encoder reads."""
        ...


def count_of(encoder: nn.Module) -> int:
    """How many tokens it has for one input: one, its vector, if it offers no others."""
    return encoder.count if isinstance(encoder, TokenEncoder) else 1


def tokens_of(encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Its tokens [N, L, F]."""
    return encoder.tokens(x) if isinstance(encoder, TokenEncoder) else encoder(x)[:, None]
