"""A transformer over a prefix and what is written after it. B batch, S tokens of the prefix,
L tokens, n texts for each row of the batch, W width, N heads, E width of a head, M places."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from policies.networks.attention import FeedForward
from policies.tokens.configs import TransformerConfig

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, [B, N, M, E] each."""


class Layer(nn.Module):
    """Pre-LN block whose attention also sees keys and values that were kept."""

    def __init__(self, width: int, heads: int) -> None:
        """width: W, a multiple of heads."""
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.outlet = nn.Linear(width, width)
        self.feed_forward = FeedForward(width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def project(self, x_BLW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, N, L, E]."""
        qkv = self.query_key_value(self.norm(x_BLW)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def mix(
        self, x_BLW: torch.Tensor, q: torch.Tensor, kv: KeysValues, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, L, W] from the queries of these tokens and all keys and values that they may see."""
        mixed = F.scaled_dot_product_attention(q, *kv, attn_mask=mask)
        x_BLW = x_BLW + self.outlet(mixed.transpose(1, 2).flatten(2))
        return x_BLW + self.feed_forward(self.feed_forward_norm(x_BLW))


class Cache:
    """Keys and values of a prefix, and room for those of n texts after it.

    All texts of a row lie in one list of keys, place after place, and a mask keeps them apart: the
    prefix is neither computed nor copied n times, and the products stay large.
    """

    def __init__(self, prefix: Sequence[KeysValues], texts: int, places: int) -> None:
        """prefix: of each layer, [B, N, S, E]. texts: n. places: tokens of a text, at most."""
        first = prefix[0][0]
        batch, heads, self.prefix, size = first.shape
        room = self.prefix + texts * places
        self.texts = texts
        self.length = self.prefix
        self.layers = [
            (first.new_empty(batch, heads, room, size), first.new_empty(batch, heads, room, size))
            for _ in prefix
        ]
        for kept, found in zip(self.layers, prefix, strict=True):
            for place, x in zip(kept, found, strict=True):
                place[:, :, : self.prefix] = x
        self._mask: torch.Tensor | None = None
        if texts > 1:
            own = torch.eye(texts, device=first.device).repeat(1, places)
            seen = torch.cat([own.new_ones(texts, self.prefix), own], dim=1)
            self._mask = torch.zeros_like(seen, dtype=first.dtype)
            self._mask.masked_fill_(seen == 0, -torch.inf)

    def rewind(self) -> None:
        """Forget the texts."""
        self.length = self.prefix

    def add(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeysValues:
        """Keep one more token of each text [B, N, n, E]; all that is kept of the layer."""
        end = self.length + self.texts
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def mask(self) -> torch.Tensor | None:
        """What the tokens that are being added see [n, M]: 0, or −∞ for another text's."""
        end = self.length + self.texts
        return None if self._mask is None else self._mask[:, :end]


class Transformer(nn.Module):
    """A decoder (Radford et al. 2019) whose prefix is seen whole by every token, itself included.

    Positions are the caller's: it adds them to what it gives in.
    """

    def __init__(self, config: TransformerConfig) -> None:
        """See TransformerConfig."""
        super().__init__()
        self.layers = nn.ModuleList(Layer(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, prefix_BSW: torch.Tensor, text_BLW: torch.Tensor) -> torch.Tensor:
        """What is known behind the prefix and behind each token of the text: [B, 1 + L, W]."""
        x_BLW = torch.cat([prefix_BSW, text_BLW], dim=1)
        prefix, length = prefix_BSW.shape[1], x_BLW.shape[1]
        places_L = torch.arange(length, device=x_BLW.device)
        seen_LL = (places_L <= places_L[:, None]) | (places_L < prefix)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            q, k, v = layer.project(x_BLW)
            x_BLW = layer.mix(x_BLW, q, (k, v), seen_LL)
        return self.norm(x_BLW[:, prefix - 1 :])

    def read(self, prefix_BSW: torch.Tensor) -> tuple[torch.Tensor, list[KeysValues]]:
        """What is known behind the prefix [B, W], and each layer's keys and values of it."""
        states, kept = zip(*self._read(prefix_BSW), strict=True)
        return self.norm(states[-1][:, -1]), list(kept)

    def states(self, prefix_BSW: torch.Tensor) -> list[torch.Tensor]:
        """What each layer has made of the prefix, [B, S, W] each."""
        return [self.norm(x_BSW) for x_BSW, _ in self._read(prefix_BSW)]

    def _read(self, x_BSW: torch.Tensor) -> Iterator[tuple[torch.Tensor, KeysValues]]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            q, k, v = layer.project(x_BSW)
            x_BSW = layer.mix(x_BSW, q, (k, v), None)
            yield x_BSW, (k, v)

    def write(self, x_BnW: torch.Tensor, cache: Cache) -> torch.Tensor:
        """What is known behind one more token of each text [B, n, W]; the cache keeps it."""
        mask = cache.mask()
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            q, k, v = layer.project(x_BnW)
            x_BnW = layer.mix(x_BnW, q, cache.add(index, k, v), mask)
        cache.length += cache.texts
        return self.norm(x_BnW)
