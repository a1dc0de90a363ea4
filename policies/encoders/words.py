"""Instructions word by word. B batch, L bytes, M words, W width, F features."""

import torch
from torch import nn
from torch.nn import functional as F

from policies.configs import WordsConfig

_FACTOR, _PRIME = 48271, (1 << 31) - 1
_SPACE = 32


class HashedWords(nn.Module):
    """Each word, hashed into a table of embeddings, and its place, through a small MLP.

    Trained from scratch: it tells words of its training data apart and knows no others. Words
    beyond the last place count as parts of the word there.
    """

    Config = WordsConfig

    powers_L: torch.Tensor

    def __init__(self, config: WordsConfig) -> None:
        super().__init__()
        self.buckets, self.count = config.buckets, config.max_words
        self.table = nn.Embedding(1 + config.buckets, config.width)
        self.places_MW = nn.Parameter(
            nn.init.normal_(torch.empty(config.max_words, config.width), std=0.02)
        )
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 2 * config.width)
        self.outlet = nn.Linear(2 * config.width, config.features)
        powers = [pow(_FACTOR, i, _PRIME) for i in range(config.max_bytes)]
        self.register_buffer("powers_L", torch.tensor(powers), persistent=False)

    def forward(self, text_BL: torch.Tensor) -> torch.Tensor:
        """Bytes [B, L], uint8, zero behind the text's end → [B, features]."""
        return self.tokens(text_BL).mean(dim=1)

    def tokens(self, text_BL: torch.Tensor) -> torch.Tensor:
        """[B, M, F], the places behind the last word included."""
        x_BMW = self.table(self.words(text_BL)) + self.places_MW
        return self.outlet(F.silu(self.up(self.norm(x_BMW))))

    def words(self, text_BL: torch.Tensor) -> torch.Tensor:
        """Rows of the table [B, M]; 0 where there is no word."""
        bytes_BL = text_BL.long()
        inside_BL = bytes_BL > _SPACE
        starts_BL = inside_BL & ~F.pad(inside_BL, (1, 0))[:, :-1]
        word_BL = starts_BL.long().cumsum(dim=1) - 1
        at_L = torch.arange(text_BL.shape[1], device=text_BL.device)
        first_BL = torch.where(starts_BL & (word_BL < self.count), at_L, 0).cummax(dim=1).values
        place_BL = word_BL.clamp(0, self.count - 1)
        hashed_BL = bytes_BL * self.powers_L[at_L - first_BL] % _PRIME * inside_BL
        sum_BM = bytes_BL.new_zeros(len(text_BL), self.count).scatter_add(1, place_BL, hashed_BL)
        row_BM = 1 + sum_BM * _FACTOR % _PRIME % self.buckets
        there_BM = torch.arange(self.count, device=text_BL.device) < starts_BL.sum(1, keepdim=True)
        return torch.where(there_BM, row_BM, 0)
