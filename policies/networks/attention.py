"""Attention and the blocks made of it. B batch, L tokens, M tokens of a context, W width."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017), to the tokens themselves or to a context.

    qk_norm: queries and keys are normalised per head, which bounds the logits (Henry et al. 2020).
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        """width: W, a multiple of heads."""
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width // heads) for _ in range(2 * qk_norm))
        self.outlet = nn.Linear(width, width)

    def forward(
        self,
        x_BLW: torch.Tensor,
        context_BMW: torch.Tensor | None = None,
        keep_BM: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, L, W]; keep_BM: which tokens of the context may be looked at, bool."""
        context_BMW = x_BLW if context_BMW is None else context_BMW
        q = self.query(x_BLW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.key_value(context_BMW).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        if len(self.norms):
            q, k = (norm(x) for norm, x in zip(self.norms, (q, k), strict=True))
        mask = None if keep_BM is None else keep_BM[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.outlet(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Linear → GELU → Linear with four times the width between."""

    def __init__(self, width: int) -> None:
        """width: W."""
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-LN transformer block; with cross, tokens also attend to a context."""

    def __init__(self, width: int, heads: int, *, cross: bool = False) -> None:
        """width: W, a multiple of heads."""
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.cross = Attention(width, heads) if cross else None
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.feed_forward = FeedForward(width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BLW: torch.Tensor,
        context_BMW: torch.Tensor | None = None,
        keep_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, L, W]; keep_BL: which of the tokens may be looked at, bool."""
        x_BLW = x_BLW + self.attention(self.attention_norm(x_BLW), None, keep_BL)
        if self.cross is not None and self.cross_norm is not None:
            x_BLW = x_BLW + self.cross(self.cross_norm(x_BLW), context_BMW)
        return x_BLW + self.feed_forward(self.feed_forward_norm(x_BLW))
