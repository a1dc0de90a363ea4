"""Options of critics and of the optimiser of actions; reading them does not load torch."""

import math
from typing import Annotated, Any, Literal

import msgspec

from embodied.core.errors import ConfigError
from policies.configs import Count, ImagesConfig


class ScalarConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No options."""


class HLGaussConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of values as a histogram.

    low, high: the range that the bins cover. Values within 3 bins of an end are drawn inward, the
    end itself by 0.7 bins at sigma .75: choose it wider than what the rewards can sum to.
    bins: K. sigma: standard deviation of a target's Gaussian, in bin widths.
    """

    low: float
    high: float
    bins: Annotated[int, msgspec.Meta(ge=2, le=4096)] = 128
    sigma: Annotated[float, msgspec.Meta(gt=0, le=100)] = 0.75

    def __post_init__(self) -> None:
        """Raise ConfigError for a range that is empty or not finite."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                f"a value head's low is {self.low} and high {self.high}; they must be finite, and "
                "low the lower one"
            )


class CriticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of an ensemble of critics.

    members: E. width, depth: units and number of hidden layers of each. horizon: how many steps of
    a chunk are judged, from its first. head: a registered value head and its options.
    observation_normalization, images, language: see ChunkConfig; the members share one encoder.
    """

    head: dict[str, Any]
    horizon: Count
    members: Annotated[int, msgspec.Meta(ge=1, le=128)] = 10
    width: Annotated[int, msgspec.Meta(ge=8, le=8192)] = 256
    depth: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    observation_normalization: Literal["limits", "gaussian"] = "limits"
    images: ImagesConfig = msgspec.field(default_factory=ImagesConfig)
    language: dict[str, Any] | None = None


class ImprovementConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the optimiser of actions (policies/improvement.py).

    proposals: drawn from the policy for a decision. mean: whether their mean is one more. kept: how
    many of these, the best, are improved; all, and nothing is ranked. steps: of gradient ascent on
    each; 0 for none. step_size: α, where each action's bounds are −1 and 1: its effect grows with
    the values' scale.
    temperature: None takes the best, a number draws from softmax(q / temperature).
    """

    proposals: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 32
    mean: bool = False
    kept: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 10
    steps: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 10
    step_size: Annotated[float, msgspec.Meta(gt=0)] = 3e-4
    temperature: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError if more would be kept than there are."""
        if self.kept > self.proposals:
            raise ConfigError(
                f"improvement.kept is {self.kept} and improvement.proposals {self.proposals}; at "
                "most all proposals can be kept"
            )
