"""Options of the vision-language-action policy; reading them does not load torch."""

from typing import Annotated

import msgspec

from policies.configs import FlowOptions, check_heads
from policies.tokens.configs import TransformerConfig


class ExpertConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the action expert; it has a layer for each of the transformer's."""

    width: Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=2)] = 128
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    time_dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=2)] = 64

    def __post_init__(self) -> None:
        """Raise ConfigError for a width that the heads cannot share."""
        check_heads(self.width, self.heads)


class VLAConfig(FlowOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the vision-language-action policy, beside those of a flow.

    transformer: what reads the observations. expert: what carries noise to actions.
    """

    transformer: TransformerConfig = msgspec.field(default_factory=TransformerConfig)
    expert: ExpertConfig = msgspec.field(default_factory=ExpertConfig)
