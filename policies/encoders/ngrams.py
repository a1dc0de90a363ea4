"""Instructions by hashed runs of bytes. B batch, L bytes, W width."""

import torch
from torch import nn
from torch.nn import functional as F

from policies.configs import NgramsConfig

_LONGEST = 4
_FACTOR, _PRIME = 48271, (1 << 31) - 1


class HashedNgrams(nn.Module):
    """A bag of runs of 1 to 4 bytes, hashed into a table of embeddings, then a small MLP.

    Trained from scratch: it tells the tasks of a data set apart and knows no language. The order
    of words counts only where words touch. fastText's way (Bojanowski et al. 2017) with bytes for
    letters.
    """

    Config = NgramsConfig

    def __init__(self, config: NgramsConfig) -> None:
        super().__init__()
        self.buckets = config.buckets
        self.table = nn.Embedding(config.buckets, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 2 * config.width)
        self.outlet = nn.Linear(2 * config.width, config.features)

    def forward(self, text_BL: torch.Tensor) -> torch.Tensor:
        """Bytes [B, L], uint8, zero behind the text's end → [B, features]."""
        bytes_BL = text_BL.long()
        run_BL, sum_BW = bytes_BL, torch.zeros((), device=text_BL.device)
        for length in range(1, _LONGEST + 1):
            if length > 1:
                if bytes_BL.shape[1] < length:
                    break
                run_BL = run_BL[:, :-1] * 256 + bytes_BL[:, length - 1 :]
            # A run that ends in a zero byte reaches beyond the text.
            inside_BL = bytes_BL[:, length - 1 :] != 0
            bucket_BL = (run_BL + length) * _FACTOR % _PRIME % self.buckets
            sum_BW = sum_BW + (self.table(bucket_BL) * inside_BL[..., None]).sum(dim=1)
        return self.outlet(F.silu(self.up(self.norm(sum_BW))))
