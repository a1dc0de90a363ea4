"""What a critic's last layer means: values, and how they are learned. K outputs, K bins."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from policies.critics.configs import HLGaussConfig, ScalarConfig

_START = 0.05


class ValueHead(nn.Module, ABC):
    """From outputs [..., K] to values [...]; nothing of it is learned."""

    outputs: int
    """K."""

    @abstractmethod
    def start(self) -> torch.Tensor:
        """Outputs [K] from which learning begins."""

    @abstractmethod
    def value(self, logits: torch.Tensor) -> torch.Tensor:
        """Values [...] of outputs [..., K]."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of each output [..., K], for target values that broadcast to [...]: [...]."""

    @abstractmethod
    def outside(self, target: torch.Tensor) -> torch.Tensor:
        """Share of the target values, a scalar, that `value` cannot reach: above 0, the range is
        wrong for the rewards."""


class Scalar(ValueHead):
    """The one output is the value; the loss is its squared error."""

    Config = ScalarConfig
    outputs = 1

    def __init__(self, config: ScalarConfig) -> None:
        super().__init__()

    def start(self) -> torch.Tensor:
        """See ValueHead: a value of 0."""
        return torch.zeros(1)

    def value(self, logits: torch.Tensor) -> torch.Tensor:
        """See ValueHead."""
        return logits.squeeze(-1)

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See ValueHead."""
        return (self.value(logits) - target).square()

    def outside(self, target: torch.Tensor) -> torch.Tensor:
        """See ValueHead: none."""
        return target.new_zeros(())


class HLGauss(ValueHead):
    """A histogram over values, learned by the cross-entropy with a Gaussian's around the target.

    Imani and White 2018; for values Farebrother et al. 2024. The Gaussian's standard
    deviation is sigma bin widths; it is cut off at the range's ends and what is left sums to 1.
    """

    Config = HLGaussConfig
    edges: torch.Tensor
    centres_K: torch.Tensor

    def __init__(self, config: HLGaussConfig) -> None:
        """K bins of equal width from low to high."""
        super().__init__()
        self.config = config
        self.outputs = config.bins
        self.width = (config.high - config.low) / config.bins
        edges = torch.linspace(config.low, config.high, config.bins + 1, dtype=torch.float64)
        self.register_buffer("edges", edges.float(), persistent=False)
        self.register_buffer("centres_K", ((edges[1:] + edges[:-1]) / 2).float(), persistent=False)

    def start(self) -> torch.Tensor:
        """See ValueHead: near the low end, so that nothing is thought good before it is known. The
        shares fall exponentially, with a mean of a twentieth of the range: a steeper fall would
        have to be unlearned for long."""
        return -torch.arange(self.outputs) / (_START * self.outputs)

    def value(self, logits: torch.Tensor) -> torch.Tensor:
        """See ValueHead: the histogram's mean, Σ p·centre."""
        return (logits.softmax(-1) * self.centres_K).sum(-1)

    def histogram(self, target: torch.Tensor) -> torch.Tensor:
        """Shares of the bins [..., K] for values [...], those outside put to the nearest end."""
        y = target.to(self.edges.dtype).clamp(self.config.low, self.config.high)[..., None]
        below = torch.erf((self.edges - y) / (2**0.5 * self.config.sigma * self.width))
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See ValueHead."""
        return -(self.histogram(target) * logits.log_softmax(-1)).sum(-1)

    def outside(self, target: torch.Tensor) -> torch.Tensor:
        """See ValueHead."""
        return ((target < self.config.low) | (target > self.config.high)).float().mean()
