"""Options of policies that decide in tokens; reading them does not load torch."""

from typing import Annotated, Any, Literal

import msgspec

from embodied.core.errors import ConfigError
from policies.configs import ChunkConfig, Depth, check_heads


class BinsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the uniform bins. bins: how many values each number of an action can have; with
    an odd count 0 is one of them."""

    bins: Annotated[int, msgspec.Meta(ge=2, le=4096)] = 129


class DCTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the quantised cosine transform.

    scale: a coefficient c is kept as round(scale · c). share: of the chunk's frequencies, from the
    lowest on, that are kept, at least one.
    """

    scale: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 16.0
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5


class TransformerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the transformer that reads observations and writes tokens."""

    width: Annotated[int, msgspec.Meta(ge=8, le=4096)] = 128
    depth: Depth = 3
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4

    def __post_init__(self) -> None:
        """Raise ConfigError for a width that the heads cannot share."""
        check_heads(self.width, self.heads)


class AutoregressiveConfig(ChunkConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the autoregressive policy.

    tokenizer: a registered one and its options. decoding: "step" writes one row of tokens (a step
    of the actions, or a frequency) with one pass of the transformer, its numbers one after another
    through a small head; "parallel" draws a row's numbers independently of one another, given the
    rows before; "token" takes one pass for each number. temperature: what the logits are divided
    by in drawing; 0 takes the likeliest token.
    """

    tokenizer: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "bins"})
    decoding: Literal["step", "parallel", "token"] = "step"
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    transformer: TransformerConfig = msgspec.field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        """Raise ConfigError for actions that tokens do not cover."""
        if self.action_normalization == "gaussian":
            raise ConfigError(
                "action_normalization is gaussian; tokens cover actions within ±1: set "
                "action_normalization: spec or limits"
            )

    def parts(self) -> list[tuple[str, Any, str]]:
        """See ChunkConfig."""
        return [*super().parts(), ("tokenizers", self.tokenizer, "policy.tokenizer")]
