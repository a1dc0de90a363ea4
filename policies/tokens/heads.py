"""From what is known before a row of tokens to its tokens. G tokens of a row, V vocabulary,
W width; … any axes before."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Choose = Callable[[torch.Tensor, int], torch.Tensor]
"""(logits […, V], which token of the row) → tokens […]."""


class Head(nn.Module, ABC):
    """The law of a row's tokens, given what is known before it."""

    @abstractmethod
    def logits(self, known_W: torch.Tensor, tokens_G: torch.Tensor) -> torch.Tensor:
        """Logits […, G, V] of tokens […, G], each given those before it in the row."""

    @abstractmethod
    def draw(self, known_W: torch.Tensor, choose: Choose) -> torch.Tensor:
        """Tokens […, G], each as `choose` takes it from its logits."""


class Parallel(Head):
    """All tokens of a row at once: independent of one another, given what is known before it."""

    def __init__(self, width: int, tokens: int, vocabulary: int) -> None:
        """width: W. tokens: G. vocabulary: V."""
        super().__init__()
        self.shape = (tokens, vocabulary)
        self.outlet = nn.Linear(width, tokens * vocabulary)

    def logits(self, known_W: torch.Tensor, tokens_G: torch.Tensor) -> torch.Tensor:
        """See Head."""
        return self.outlet(known_W).unflatten(-1, self.shape)

    def draw(self, known_W: torch.Tensor, choose: Choose) -> torch.Tensor:
        """See Head."""
        logits_GV = self.outlet(known_W).unflatten(-1, self.shape)
        drawn = [choose(logits_V, g) for g, logits_V in enumerate(logits_GV.unbind(dim=-2))]
        return torch.stack(drawn, dim=-1)


class OneByOne(Head):
    """Each token after those before it in its row, by a network of one hidden layer.

    The network reads the sum of what is known, the token's place and the embeddings of the row's
    earlier tokens (as NADE, Larochelle and Murray 2011).
    """

    def __init__(self, width: int, tokens: int, vocabulary: int) -> None:
        """width: W. tokens: G, at least 2. vocabulary: V."""
        super().__init__()
        self.vocabulary = vocabulary
        self.places_GW = nn.Parameter(nn.init.normal_(torch.empty(tokens, width), std=0.02))
        self.embed = nn.Embedding((tokens - 1) * vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.outlet = nn.Linear(width, vocabulary)

    def logits(self, known_W: torch.Tensor, tokens_G: torch.Tensor) -> torch.Tensor:
        """See Head."""
        count = len(self.places_GW) - 1
        offsets_G = torch.arange(count, device=tokens_G.device) * self.vocabulary
        before_GW = self.embed(tokens_G[..., :-1] + offsets_G).cumsum(dim=-2)
        before_GW = F.pad(before_GW, (0, 0, 1, 0))
        return self._logits(known_W[..., None, :] + self.places_GW + before_GW)

    def draw(self, known_W: torch.Tensor, choose: Choose) -> torch.Tensor:
        """See Head."""
        drawn: list[torch.Tensor] = []
        for g, place_W in enumerate(self.places_GW):
            drawn.append(choose(self._logits(known_W + place_W), g))
            if g < len(self.places_GW) - 1:
                known_W = known_W + self.embed(drawn[-1] + g * self.vocabulary)
        return torch.stack(drawn, dim=-1)

    def _logits(self, x_W: torch.Tensor) -> torch.Tensor:
        return self.outlet(F.silu(self.hidden(self.norm(x_W))))


def choose_by(u: torch.Tensor, logits_V: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tokens […] of the law softmax(logits / temperature): the first whose cumulated probability
    exceeds u […], uniform on [0, 1). At temperature 0, the likeliest."""
    if temperature == 0:
        return logits_V.argmax(dim=-1)
    scaled_V = logits_V.float() / temperature
    mass_V = (scaled_V - scaled_V.amax(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    found = torch.searchsorted(mass_V, u[..., None] * mass_V[..., -1:], right=True)
    return found[..., 0].clamp(max=logits_V.shape[-1] - 1)
